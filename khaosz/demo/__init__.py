"""The demo: bilingual texts, a model trained on them in minutes, and its answers."""
