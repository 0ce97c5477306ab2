"""Query-passage records: layouts, what is refused and where, what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khaosz.data.records.pairs import TextEncoder, Texts, load_text_pairs, to_texts
from khaosz.data.tokenizer import load_tokenizer
from khaosz.errors import DataError


@pytest.fixture(scope="session")
def encoder(tokenizer_dir: Path) -> TextEncoder:
    return TextEncoder(load_tokenizer(tokenizer_dir), 24, "问：", "文：")


def lines(path: Path, *records: Any) -> Path:
    given = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(given) + "\n", encoding="utf-8")
    return path


WHOLE = Texts("q", ("p",), ("n", "m"))


@pytest.mark.parametrize(
    "record",
    [
        {"query": "q", "positive": "p", "negatives": ["n", "m"]},
        {"anchor": "q", "positive": "p", "negative": ["n", "m"]},
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"query": "q", "pos": ["p"], "neg": ["n", "m", "n"], "pos_scores": [0.9], "prompt": None},
    ],
)
def test_layouts(record: dict[str, Any]) -> None:
    assert to_texts(record) == WHOLE


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "q"}, "a text .*, with keys text, is not read by this stage"),
        ({"query": "q"}, "keys query; nearest is a query and its passages, without positive"),
        ({"query": " ", "pos": ["p"]}, "query is empty"),
        ({"query": 3, "pos": ["p"]}, "query is not text"),
        ({"query": "q", "pos": []}, "pos is empty"),
        ({"query": "q", "pos": [["p"]]}, "pos is neither text nor a list of texts"),
        ({"query": "q", "pos": "p", "neg": [""]}, "neg has an empty text"),
        ({"query": "q", "pos": ["p"], "neg": ["n", "p"]}, "a negative is the positive"),
    ],
)
def test_rejects_records_without_a_pair(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_texts(record)


def test_bad_records_are_named_by_line(tmp_path: Path, encoder: TextEncoder) -> None:
    good = {"query": "a", "positive": "b"}
    path = lines(tmp_path / "pairs.jsonl", good, "{", {"query": "a"}, good, {"query": "a"})
    with pytest.raises(DataError, match="3 of 5 records cannot be read: 2: unknown layout"):
        load_text_pairs([path], encoder)
    data, held_out, report = load_text_pairs([path], encoder, allow_unread=True)
    assert (len(data), len(held_out)) == (2, 0)
    said = report.lines()
    assert said[0].endswith("pairs.jsonl: 5 records, 2 kept, 3 not read")
    assert any(
        line.startswith("  skipped 2: unknown layout with keys query; nearest is a query")
        and line.endswith("(pairs.jsonl:3, pairs.jsonl:5)")
        for line in said
    )
    assert any("not valid JSON" in line and "(pairs.jsonl:2)" in line for line in said)
    with pytest.raises(DataError, match=r"nothing to train on in 1 records.*bad\.jsonl line 1"):
        load_text_pairs([lines(tmp_path / "bad.jsonl", {"query": "a"})], encoder)


def test_texts_are_encoded_as_for_the_model(tmp_path: Path, encoder: TextEncoder) -> None:
    """Prefix, begin token, and a cut that is counted; the same passage stands once."""
    long = "春天" * 40
    path = lines(
        tmp_path / "pairs.jsonl",
        {"query": "a", "positive": long, "neg": ["x"]},
        {"query": "b", "positive": long + "了", "neg": ["y", "x"]},
        {"query": "a", "pos": ["z", "x"]},
    )
    data, _, report = load_text_pairs([path], encoder, negatives=1)
    bos, tokenizer = encoder.tokenizer.bos_id, encoder.tokenizer
    assert data.queries[0].tolist() == [bos, *tokenizer.encode("问：a")]
    assert data.passages[0].tolist() == [bos, *tokenizer.encode("文：" + long)][:24]
    assert all(ids.dtype == np.int32 for ids in (*data.queries, *data.passages))
    # Of the second record one negative only; its passage is the first's, as far as it is read.
    texts = ["文：x", "文：y", "文：z"]
    assert [p.tolist()[1:] for p in data.passages[1:]] == [tokenizer.encode(t) for t in texts]
    assert data.positive == [0, 0, 3, 1] and data.negatives == [(1,), (2,), (), ()]
    assert data.answers == [{0, 3, 1}, {0}, {0, 3, 1}, {0, 3, 1}]
    assert (report.cut_queries, report.cut_passages, report.negatives) == (0, 2, 2)
    assert report.lines()[-1] == "cut to 24 tokens: 0 queries, 2 passages"


def test_held_out_passages_answer_no_training_query(tmp_path: Path, encoder: TextEncoder) -> None:
    records = [{"query": f"q{i}", "positive": f"p{i % 50}"} for i in range(200)]
    path = lines(tmp_path / "pairs.jsonl", *records)
    data, held_out, report = load_text_pairs([path], encoder, val_fraction=0.3, seed=1)
    assert 0 < len(held_out) < len(data) and report.validation == len(held_out)
    inside = {ids.tobytes() for ids in data.passages}
    assert not inside & {ids.tobytes() for ids in held_out.passages}
    again = load_text_pairs([path], encoder, val_fraction=0.3, seed=2)[1]
    assert [q.tolist() for q in again.queries] != [q.tolist() for q in held_out.queries]
