"""`khaosz eval retrieval`: ranks counted by hand, and pairs from documents."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.data.records.pairs import inverse_cloze
from khaosz.demo.pairs import unit_pairs
from khaosz.demo.texts import Unit
from khaosz.errors import DataError
from khaosz.evaluation import retrieval_accuracy
from khaosz.rag import StructureSplitter
from khaosz.rag.training_records import pair_records

PAIRS = [
    {
        "query": "penguins",
        "positive": "Penguins live in the south.",
        "negatives": ["Bears do not."],
    },
    {"query": "合同到期", "pos": ["合同五月到期。", "合同到期后续签。"]},
    {"query": "nothing of it", "positive": "Rain."},
]


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
    return path


class Fixed:
    """An embedder with given vectors."""

    name, good_cosine, dimension = "fixed", None, 2

    def __init__(self, vectors: dict[str, tuple[float, float]]) -> None:
        self.vectors = vectors

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self.vectors.get(text, (0.0, 1.0)) for text in texts], np.float32)

    queries = passages


def test_accuracy_of_bm25(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", [*PAIRS, {"query": "x"}])
    with pytest.raises(DataError, match="1 of 4 records cannot be read"):
        retrieval_accuracy(path)
    result = retrieval_accuracy(path, allow_unread=True)
    # The passages about penguins and contracts are first; rain shares no word and is last of five.
    assert (result.found_by, result.queries, result.passages, result.skipped) == ("bm25", 4, 5, 1)
    assert result.accuracy == 0.75 and result.mrr == pytest.approx((3 + 1 / 5) / 4)


def test_accuracy_of_an_embedder(tmp_path: Path) -> None:
    """Other right passages are excluded, and a tie counts against the right one."""
    path = lines(tmp_path / "pairs.jsonl", PAIRS)
    vectors = {
        "penguins": (1.0, 0.0),
        "Bears do not.": (1.0, 0.0),
        "Penguins live in the south.": (0.8, 0.6),
        "合同到期": (0.0, 1.0),
        "Rain.": (0.6, 0.8),
        "nothing of it": (0.6, 0.8),
    }
    result = retrieval_accuracy(path, Fixed(vectors))
    # The two passages about contracts have the vector of the query, and so does rain.
    assert result.accuracy == 0.75 and result.mrr == pytest.approx((1 / 2 + 1 + 1 + 1) / 4)
    alike = retrieval_accuracy(path, Fixed({}))
    assert alike.accuracy == 0.0


def test_refuses_file_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pairs in 1 records .*without positive.*line 1"):
        retrieval_accuracy(lines(tmp_path / "bad.jsonl", [{"query": "x"}]))


def test_eval_retrieval_command(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", PAIRS)
    done = CliRunner().invoke(app, ["eval", "retrieval", str(path), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["accuracy"] == 0.75


def test_inverse_cloze_pairs_a_sentence_with_its_context() -> None:
    parts = ["企鹅住在南极的冰上。", "它们不会飞，但是很会游泳。", "北极没有企鹅，只有北极熊。"]
    kept = 0
    for seed in range(200):
        pair = inverse_cloze(parts, "", random.Random(seed))
        assert pair is not None and pair[0] in parts
        rest = "".join(p for p in parts if p != pair[0])
        assert pair[1] in (rest, "".join(parts))
        kept += pair[1] != rest
    assert 8 <= kept <= 35  # one in ten
    assert inverse_cloze(parts[:1], "", random.Random(0)) is None
    assert inverse_cloze(["短。", "也短。"], "", random.Random(0)) is None


def test_query_for_an_idiom_is_its_meaning() -> None:
    text = "成语：画蛇添足。释义：比喻做了多余的事。出处：《战国策》。"
    (pair,) = unit_pairs(Unit("idioms", "画蛇添足", "zh", (text,)), 0)
    assert (
        pair["query"] == "比喻做了多余的事。" and pair["positive"] == "画蛇添足。出处：《战国策》。"
    )


def test_article_of_a_statute_keeps_its_title() -> None:
    text = (
        "《某法》\n第一章\n第一条　为了保护某物，根据宪法，制定本法。国家对某物实行特别保护的制度。"
    )
    (pair,) = unit_pairs(Unit("laws", "某法", "zh", (text,)), 0)
    title, _, rest = pair["positive"].partition("\n")
    assert title == "《某法》" and rest and "第一条" not in pair["query"] + rest


def test_pair_records_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(
        "# Birds\n\n## Penguins\n\nPenguins live in the south. They swim very well. None can fly.\n"
    )
    problems: list[Any] = []
    result = list(pair_records([path], StructureSplitter(max_chars=200), 0, problems.append))
    queries = [pair["query"] for pair in result]
    assert "Birds Penguins" in queries and not problems
    of_heading = next(p for p in result if p["query"] == "Birds Penguins")
    assert of_heading["positive"].startswith("Penguins live") and "#" not in of_heading["positive"]
    out = tmp_path / "pairs.jsonl"
    done = CliRunner().invoke(app, ["data", "pairs", str(path), "--out", str(out)])
    assert done.exit_code == 0 and len(out.read_text().splitlines()) == len(result)
