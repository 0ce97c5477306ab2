"""The former place of `khaosz.rag.models.chat_models`, for programs that import it from here."""

from khaosz.rag.models.chat_models import HttpModel, LocalModel, open_chat_model
from khaosz.rag.models.protocols import ChatModel, Messages

__all__ = ["ChatModel", "HttpModel", "LocalModel", "Messages", "open_chat_model"]
