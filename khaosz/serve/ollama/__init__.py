"""Ollama's API: `routes` translates requests, `output` answers, `models` describes models, `schema`
has the bodies.
"""
