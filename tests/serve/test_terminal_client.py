"""The terminal chat's two backends with a reasoning model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Service, served

from khaosz.cli.terminal.conversation import (
    ChatBackend,
    Conversation,
    Finished,
    Settings,
    Truncated,
)
from khaosz.cli.terminal.local_backend import LocalBackend
from khaosz.cli.terminal.server_backend import ServerBackend
from khaosz.inference.parts import Part

GREEDY = Settings(64, temperature=0.0, top_p=1.0)


@pytest.fixture(scope="module")
def thinker(taught: Path) -> Iterator[Service]:
    with served(taught) as running:
        yield running


def answered(backend: ChatBackend, message: str) -> tuple[str, str, Finished]:
    """Reasoning, answer, and how it ended."""
    thought = said = ""
    for event in backend.answer(Conversation(GREEDY), message):
        match event:
            case Part("reasoning", text):
                thought += text
            case Part(_, text):
                said += text
            case Finished():
                return thought, said, event
    raise AssertionError("it did not end")


def test_both_backends_separate_reasoning(thinker: Service, taught: Path) -> None:
    remote = ServerBackend(f"http://127.0.0.1:{thinker.port}/v1")
    for backend in (remote, LocalBackend.from_path(taught)):
        assert answered(backend, "think") == ("一 + 一", "二", Finished("stop"))
        assert answered(backend, "plain") == ("", "the fox", Finished("stop"))


@pytest.mark.parametrize("counts", [True, False])
def test_oldest_turns_are_left_out(thinker: Service, counts: bool) -> None:
    backend = ServerBackend(f"http://127.0.0.1:{thinker.port}/v1")
    backend._can_count = counts  # as with a server that has no /tokenize
    old = [
        {"role": "user", "content": "x " * 600},
        {"role": "assistant", "content": "y"},
    ]
    conversation = Conversation(GREEDY, turns=old * 3)
    events = list(backend.answer(conversation, "plain"))
    assert any(isinstance(event, Truncated) for event in events)
    assert backend._can_count == counts


def test_answer_fits_where_server_counts_tokens(thinker: Service) -> None:
    backend = ServerBackend(f"http://127.0.0.1:{thinker.port}/v1")
    conversation = Conversation(GREEDY)

    def count() -> int:
        turns = conversation.with_message("plain")
        return len(thinker.generator.chat_ids(turns))

    while count() <= thinker.generator.context - GREEDY.max_tokens:  # that would be enough
        conversation.turns.append({"role": "user", "content": "x x x"})
        conversation.turns.append({"role": "assistant", "content": "y"})
    assert count() < thinker.generator.context
    assert isinstance(next(backend.answer(conversation, "plain")), Truncated)
