"""The directory of a run: who may write there, its records, its status, and what it ran on."""
