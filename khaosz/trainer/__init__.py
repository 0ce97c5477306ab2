"""Training: one loop (`trainer.py`), what a stage means (`strategy.py`), and what surrounds them."""
