"""OpenAI's interface: what may be asked (`schema`), what is answered (`replies`, `answers`), the
routes (`chat`, `vectors`, `tokens`). `parts` takes a model's text apart, `tools` tells it of tools.
"""
