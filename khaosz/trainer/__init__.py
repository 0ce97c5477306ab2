"""Training: one loop (`trainer.py`), what a stage means (`strategy.py`), what surrounds them."""
