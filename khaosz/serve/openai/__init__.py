"""OpenAI's API: `chat` (chats and completions), `vectors` (embeddings and reranking), `tokens`;
`completion_output` formats the engine's output, `tools` describes tools to a model.
"""
