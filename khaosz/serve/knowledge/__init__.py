"""Knowledge bases over HTTP: `library` is all of them, `catalogue` what exists, `uploads` the files
as uploaded, `ingest` the threads of one base; `search`, `grounding` (chats) and the `routes`.
"""
