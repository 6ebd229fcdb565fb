"""FP8 number formats, scales and casts. Imports torch and nothing else of the project but its errors."""
