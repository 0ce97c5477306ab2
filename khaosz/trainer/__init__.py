"""Training: one loop (`trainer.py`), a strategy per stage (`strategy.py`, `stages/`), callbacks."""
