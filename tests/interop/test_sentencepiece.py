"""SentencePiece vocabularies in GGUF files: merges by score, and back."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from tokenizer_families import CONFIG
from tokenizer_families import FAMILIES as TOKENIZERS

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ModelError
from khaosz.interop.gguf.sentencepiece import merges_of, scores_of
from khaosz.interop.gguf.tokenizer import tokenizer_from_metadata, tokenizer_to_metadata

NASTY = [
    "Hello world", "  two  spaces ", "\n\n\tx\n", "你好，世界！", "👨‍👩‍👧 family", "e\u0301 Å ﬁ",
    "ＡＢＣ　全角", "a\u200bb\ufeff", "\x00\x01", "123456789 3.14", "𠮷野家 𝒜", "<|im_end|> <s>",
    "▁under▁score ▁", "a" * 90, " " * 20 + "x", "\r\n\r\n", "<0x41>", "", "\u2028\xa0nbsp",
]  # fmt: skip


def texts() -> list[str]:
    rnd = random.Random(0)
    pool = "aZ9 ,.\n\t中文字😀é\u0301　▁<>|helo wrd"
    return NASTY + ["".join(rnd.choices(pool, k=rnd.randint(1, 60))) for _ in range(100)]


def converted(family: str) -> Tokenizer:
    """A tokenizer as transformers makes it of a SentencePiece model: with all merges of each piece,
    in the order of scores."""
    build, _, changes = TOKENIZERS[family]
    spec = json.loads(build().to_str())
    model = spec["model"]
    added = {token["content"] for token in spec["added_tokens"]}
    ranks = {left + right: -i for i, (left, right) in enumerate(model["merges"])}
    scores = {
        piece: float(ranks.get(piece, -1e6))
        for piece in model["vocab"]
        if piece not in added and not piece.startswith("<0x")
    }
    model["merges"] = merges_of(scores)
    return Tokenizer(json.dumps(spec).encode(), {**CONFIG, **changes, "add_bos_token": True})


@pytest.mark.parametrize("family", ["gemma", "llama2", "phi3"])
def test_vocabulary_there_and_back(family: str) -> None:
    ours = converted(family)
    metadata = tokenizer_to_metadata(ours, ours.vocab_size + 3)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == (family != "gemma")
    again = tokenizer_from_metadata(metadata, "file")
    for text in texts():
        assert again.encode(text) == ours.encode(text), text
        assert again.decode(again.encode(text)) == ours.decode(ours.encode(text)), text
    assert (again.begin_ids, again.bos_id) == (ours.begin_ids, ours.bos_id)
    # Built from the file's lists; its tokenizer.json gives the same one, chats too.
    read = Tokenizer(again.serialized, again.config)
    name = next(iter(read.special_ids))
    for text in texts():
        ids = [
            each.control_encoder.encode(f"{each.control_encoder.aliases[name]}{text}{name}")[0]
            for each in (again, read)
        ]
        assert ids[0] == ids[1] and again.encode(text) == read.encode(text), text
        assert ids[0][:1] == [read.special_ids[name]]


def test_listed_merges_are_taken_as_they_are() -> None:
    """Gemma 4's files list them and have no scores of use."""
    ours = converted("gemma")
    metadata = tokenizer_to_metadata(ours, ours.vocab_size)
    metadata["tokenizer.ggml.model"] = "gemma4"
    merges = json.loads(ours.serialized)["model"]["merges"]
    metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    metadata["tokenizer.ggml.scores"] = np.full(ours.vocab_size, -1000, np.float32)
    del metadata["tokenizer.ggml.add_space_prefix"]
    again = tokenizer_from_metadata(metadata, "file")
    for text in texts():
        assert again.encode(text) == ours.encode(text), text
    metadata["tokenizer.ggml.merges"].append("no token")
    with pytest.raises(ModelError, match="merge 'no token' is not made of tokens"):
        tokenizer_from_metadata(metadata, "file")


def by_score(text: str, scores: dict[str, float]) -> list[str]:
    """What SentencePiece does: join the neighbours of the highest score, the first ones first."""
    pieces = list(text)
    while True:
        joined = [
            (scores[left + right], -i)
            for i, (left, right) in enumerate(pairwise(pieces))
            if left + right in scores
        ]
        if not joined:
            return pieces
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_merges_are_those_of_sentencepiece() -> None:
    rnd = random.Random(1)
    pieces = {letter: -1e6 for letter in "abcd▁"}
    for _ in range(60):
        piece = "".join(rnd.choices("abcd▁", k=rnd.randint(2, 5)))
        pieces.setdefault(piece, -float(len(pieces)))
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * len(pieces)], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = tokenizer_from_metadata(metadata, "file")
    reachable = {left + right for left, right in merges_of(pieces)}
    known = {p: s for p, s in pieces.items() if p in reachable}
    for _ in range(200):
        text = "".join(rnd.choices("abcd ", k=rnd.randint(1, 30)))
        expected = by_score(text.replace(" ", "▁"), known)
        assert [tokens[i] for i in tokenizer.encode(text)] == expected, text
    assert tokenizer.encode("é") == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.begin_ids == [1]  # by default


@pytest.mark.parametrize("scores", [None, np.zeros(2, np.float32)])
def test_scores_that_do_not_fit_are_refused(scores: np.ndarray | None) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "a"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    if scores is not None:
        metadata["tokenizer.ggml.scores"] = scores
    with pytest.raises(ModelError, match="scores is not one number for each token"):
        tokenizer_from_metadata(metadata, "file")


def test_merges_that_follow_no_scores_are_refused() -> None:
    """As BPE trains them: "bc" comes of one split, "abc" before "bc" is possible."""
    assert scores_of({"a": 0, "b": 1, "c": 2, "ab": 3}, [["a", "b"]]) is not None
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    trained = [["a", "b"], ["b", "c"], ["ab", "c"]]  # without "a" + "bc"
    assert scores_of(vocab, trained) is None
    spec = json.loads(converted("gemma").serialized)
    special = [t for t in spec["model"]["vocab"] if t.startswith("<") or len(t) > 4]
    known = dict.fromkeys([*special, "a", "b", "c", "ab", "bc", "abc"])
    spec["model"] |= {"vocab": {token: i for i, token in enumerate(known)}, "merges": trained}
    tokenizer = Tokenizer(json.dumps(spec).encode(), CONFIG)
    with pytest.raises(ModelError, match="has no name in llama"):
        tokenizer_to_metadata(tokenizer, tokenizer.vocab_size)
