"""Contrastive training of an embedder, through the one loop.

`loss.py` (arithmetic without models), `strategy.py` (a step's texts, and how its gradient is had
pass by pass), `validation.py` (held-out retrieval), `build.py` (what a run is made of).
"""
