"""SentencePiece vocabularies of GGUF files ("llama") <-> the BPE of tokenizer.json.

SentencePiece merges the neighbours whose joined piece has the highest score, wherever they are; a
list of merges says the same where each piece comes once, with all its splits, in the order of
scores. Spaces are "▁"; characters that are not in the vocabulary become bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

SPACE = "▁"
_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_UNMARK = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_PREFIX = {"type": "Prepend", "prepend": SPACE}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges, first ones first, of pieces with these scores: of a piece those with the longer
    left side before others, as transformers lists them."""
    pairs: list[tuple[str, str]] = []
    counts = []
    with without_collection():  # of which each would look at half a million pairs
        for piece in scores:
            found = [
                (left, right)
                for cut in range(len(piece) - 1, 0, -1)
                if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
            ]
            pairs += found
            counts.append(len(found))
        values = np.repeat(np.fromiter(scores.values(), np.float64, len(scores)), counts)
        cuts = np.fromiter((len(left) for left, _ in pairs), np.int64, len(pairs))
        return [pairs[i] for i in np.lexsort((-cuts, -values)).tolist()]


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's search for garbage, which grows with all that is kept, waits meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def scores_of(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> dict[str, float] | None:
    """Scores that give these merges, of the pieces of a vocabulary; None where none do."""
    scores = dict.fromkeys(vocab, -1e6)  # of pieces that come from no merge
    rank = 0
    for left, right in merges:
        if left + right in scores and scores[left + right] == -1e6:
            scores[left + right] = -float(rank)
            rank += 1
    again = merges_of(scores)
    return scores if again == [tuple(merge) for merge in merges] else None


def spec_of(
    vocab: dict[str, int], merges: Sequence[Sequence[str]], unknown: str | None, prefix: bool
) -> dict[str, Any]:
    """What tokenizer.json says of the normaliser, decoder and model. `prefix`: whether a space is
    put before a text."""
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    steps = [_UNMARK, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [_PREFIX, _MARK]} if prefix else _MARK,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*steps, _STRIP] if prefix else steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def prefix_of(spec: dict[str, Any]) -> bool | None:
    """Whether a tokenizer.json puts a space before a text; None if its rules are not those of
    SentencePiece."""
    steps = spec.get("normalizer") or {}
    steps = steps.get("normalizers") or [steps]
    before = spec.get("pre_tokenizer")
    # Gemma's splits at spaces, of which the normaliser has left none.
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    if before is not None and {**before, "invert": False} != {**idle, "invert": False}:
        return None
    if steps == [_MARK]:
        return False
    return True if steps == [_PREFIX, _MARK] else None
