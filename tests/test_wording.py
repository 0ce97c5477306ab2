"""The wording check finds what it names and leaves plain English alone."""

from __future__ import annotations

import pytest
from wording import PHRASES, phrases


@pytest.mark.parametrize(
    "text",
    [
        "there is no tokenizer",
        "There are no shards",
        "X is no directory",
        "rendered anew",
        "read by and by",
        "the client is told",
        "the folder wherein it lies",
        "the table whereof",
        "whoever asks",
        "amid a step",
        "a begun stage",
        "nobody reads it",
        "training goes on",
        "no such recipe",
        "what shall be answered",
        "packages not to be had",
        "for want of memory",
        "a list without end",
    ],
)
def test_phrase_is_found(text: str) -> None:
    assert len(phrases(text)) == 1


def test_every_phrase_has_a_replacement() -> None:
    assert len(PHRASES) == 17 and all(PHRASES.values())


def test_plain_english_is_left_alone() -> None:
    text = "The file is no longer needed; training continues on rank 0. A marshalled record. Gone."
    assert phrases(text) == []
