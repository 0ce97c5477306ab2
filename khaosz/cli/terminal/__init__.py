"""`khaosz chat`: a conversation in the terminal.

`conversation` holds the conversation and the `ChatBackend` protocol; `local_backend` runs a model
in this process, `server_backend` is a client of an OpenAI-compatible server. `input` reads
messages, `commands` runs the lines that begin with /, `loop` connects them.
"""
