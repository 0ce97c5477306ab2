"""The HTTP service: models, knowledge bases, conversations and training runs, served to local
programs, or to others with a key.

run      `khaosz serve`              worker            an engine's thread, and its requests
app      all routes in one           models            chat models, loaded on first use
guard    Host, Origin, key, size     retrieval_models  embedders and rerankers by name
errors   errors as responses         metrics           counters for Prometheus
schema   request bodies              page              the built page, in `page/`
replies  response bodies             openai/           chat, completions, embeddings, tokens
                                     knowledge/        documents in, search and citations out
                                     records/          conversations, preferences, training runs
"""
