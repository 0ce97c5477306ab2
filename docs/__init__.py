"""The guides (`docs/en`, `docs/zh`) and `python -m docs`, which writes `docs/commands.md`."""
