"""Running a model: scoring text, sampling tokens, generating and chatting."""
