"""Splitters: by structure (`structure.py`) or where the subject changes (`semantic.py`)."""
