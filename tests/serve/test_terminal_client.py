"""The terminal chat's two partners with a model that thinks, and bases that the service keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Service, served

from khaosz.cli.terminal.conversation import (
    Conversation,
    Ended,
    Forgotten,
    Part,
    Partner,
    Settings,
)
from khaosz.cli.terminal.local import LocalPartner
from khaosz.cli.terminal.server import ServerPartner

GREEDY = Settings(64, temperature=0.0, top_p=1.0)


@pytest.fixture(scope="module")
def thinker(taught: Path) -> Iterator[Service]:
    with served(taught) as running:
        yield running


def answered(partner: Partner, message: str) -> tuple[str, str, Ended]:
    """What was thought, what was said, and how it ended."""
    thought = said = ""
    for event in partner.answer(Conversation(GREEDY), message):
        match event:
            case Part(text, True):
                thought += text
            case Part(text):
                said += text
            case Ended():
                return thought, said, event
    raise AssertionError("it did not end")


def test_both_partners_tell_thoughts_apart(thinker: Service, taught: Path) -> None:
    remote = ServerPartner(f"http://127.0.0.1:{thinker.port}/v1")
    for partner in (remote, LocalPartner.from_path(taught)):
        assert answered(partner, "think") == ("一 + 一", "二", Ended("stop"))
        assert answered(partner, "plain") == ("", "the fox", Ended("stop"))


@pytest.mark.parametrize("counts", [True, False])
def test_the_oldest_are_left_out_whether_the_server_counts_or_refuses(
    thinker: Service, counts: bool
) -> None:
    partner = ServerPartner(f"http://127.0.0.1:{thinker.port}/v1")
    partner._counts = counts  # as with a server that has no /tokenize
    old = [
        {"role": "user", "content": "x " * 600},
        {"role": "assistant", "content": "y"},
    ]
    conversation = Conversation(GREEDY, turns=old * 3)
    events = list(partner.answer(conversation, "plain"))
    assert any(isinstance(event, Forgotten) for event in events)
    assert partner._counts == counts


def test_an_answer_has_room_where_the_server_counts(thinker: Service) -> None:
    partner = ServerPartner(f"http://127.0.0.1:{thinker.port}/v1")
    conversation = Conversation(GREEDY)

    def count() -> int:
        turns = conversation.asking("plain")
        return len(thinker.generator.chat_ids(turns))

    while count() <= thinker.generator.context - GREEDY.max_tokens:  # that would be enough
        conversation.turns.append({"role": "user", "content": "x x x"})
        conversation.turns.append({"role": "assistant", "content": "y"})
    assert count() < thinker.generator.context
    assert isinstance(next(partner.answer(conversation, "plain")), Forgotten)
