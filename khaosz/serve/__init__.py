"""The HTTP service: models, documents and what the page keeps, to this machine or with a key.

run        `khaosz serve`             models     loaded when they are asked for
app        all routes in one          worker     an engine's own thread, and its tickets
guard      who may ask, how much      offered    embedders and rerankers by name
refusals   errors as answers          metrics    what was done, for Prometheus
openai/    OpenAI's interface         page       the built page, `page/`
knowledge/ documents in, cited        records/   conversations, preferences, runs
"""
