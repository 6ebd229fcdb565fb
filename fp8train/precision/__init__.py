"""What precision is made of, as frozen values that check themselves: formats, casts, GEMMs, optimizer states,
gradients, traffic.

A rule about precision is written here, once. The configuration builds these values and says where in the file
a rule is broken; layers, collectives, gradient store and optimizer take them as they are, and so do tests and
tools that have no file. Nothing here needs torch or a parser.
"""
