"""Texts into chunks: by structure (`structure.py`) or by subject (`semantic.py`)."""
