"""Stages: the assembly of each (`assembly.py`), and of alignment and embedding strategies, losses
and validation. `losses.py` and `logprobs.py` are arithmetic without models."""
