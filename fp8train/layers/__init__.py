"""The pieces of a decoder. Layers receive what they need as arguments and know nothing of configuration
files."""
