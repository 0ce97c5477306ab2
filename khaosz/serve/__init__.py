"""The HTTP service: one model behind OpenAI's interface, on this machine.

`worker` runs the engine in its thread, `schema` says what may be asked, `answers` how it is
answered, `guard` who may ask, `app` joins them, `run` is `khaosz serve`.
"""
