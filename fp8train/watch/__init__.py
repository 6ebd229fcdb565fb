"""Hangs and slow ranks: every rank shows signs of life, watches those of the others when it stands still
itself, and ends a run that hangs with the name of the rank that the others wait for.

``heartbeat`` is what a rank shows, ``verdict`` decides who is to blame (no files, no clocks), ``process``
looks at processes of this machine, ``watchdog`` is the thread that does all of it, ``last_words`` what it
leaves behind. ``stragglers`` finds ranks that are merely slow.
"""
