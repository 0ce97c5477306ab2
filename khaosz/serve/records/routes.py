"""What the service keeps and shows beside models and documents."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter

from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import conversation_routes
from khaosz.serve.records.preferences import FILE, PreferenceFile, preference_routes
from khaosz.serve.records.runs import run_routes


def record_routes(data: Path, runs: Path) -> list[APIRouter]:
    """Conversations and preferences in the folder `data`, and training runs below `runs`. Raises
    `DataError` for a file in `data` that cannot be used."""
    return [
        conversation_routes(ConversationStore(data / "conversations.db")),
        preference_routes(PreferenceFile(data / FILE)),
        run_routes(runs),
    ]
