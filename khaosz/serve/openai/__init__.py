"""OpenAI's API: `chat` (chats and completions), `vectors` (embeddings and reranking), `tokens`;
`completion_output` formats the pieces of an answer.
"""
