"""A model that says yes or no, held against a plain forward pass in float64."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import ConfigError, GenerationError, ModelError
from khaosz.inference.generator import Generator
from khaosz.model import Transformer
from khaosz.rag import KnowledgeBase
from khaosz.rag.models.rerank import ModelJudge, open_reranker

PASSAGES = ["春眠不觉晓，处处闻啼鸟。", "the quick brown fox", "no"]


@pytest.fixture
def judge(tiny_generator: Generator) -> ModelJudge:
    return ModelJudge(tiny_generator)


def plain(judge: ModelJudge, query: str, passage: str) -> float:
    network, tokenizer = judge._generator.model, judge._generator.tokenizer
    assert isinstance(network, Transformer)
    ids = judge._asked(query, passage)
    text = tokenizer.decode(ids)
    assert query in text and passage in text
    yes, no = tokenizer.encode("yes")[0], tokenizer.encode("no")[0]
    with torch.no_grad():
        wide = deepcopy(network).double()
        logits = wide.logits(wide(torch.tensor([ids])))[0, -1]
    return float(logits[yes] - logits[no])


def test_scores_are_yes_less_no(judge: ModelJudge) -> None:
    scores = judge.scores("闻啼鸟", PASSAGES)
    expected = [plain(judge, "闻啼鸟", passage) for passage in PASSAGES]
    assert np.ptp(expected) > 0.01
    # fp32 against float64, over two layers of width 32.
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert judge.scores("q", []).shape == (0,)


def test_the_best_part_of_a_passage_beyond_the_context_counts(judge: ModelJudge) -> None:
    sentences = [f"{text} {i}. " for i in range(160) for text in PASSAGES]
    (whole,) = judge.scores("fox", ["".join(sentences)])
    prompts = judge._prompts("fox", "".join(sentences))
    assert len(prompts) > 1 and all(len(ids) <= judge._generator.context for ids in prompts)
    said = [judge._generator.tokenizer.decode(ids) for ids in prompts]
    read = [text.split("<Document>: ")[1].split("<|")[0] for text in said]
    assert "".join("".join(read).split()) == "".join("".join(sentences).split())
    logits = [judge._generator.next_logits([ids], judge._answers)[0] for ids in prompts]
    assert whole == pytest.approx(max(float(yes - no) for yes, no in logits), abs=1e-5)
    with pytest.raises(GenerationError, match="fills the judge's context"):
        judge.scores("fox " * 2500, ["a passage"])


def test_a_search_is_reordered_by_its_judge(
    tmp_path: Path, tiny_model: Path, judge: ModelJudge
) -> None:
    kb = tmp_path / "a.kb"
    with KnowledgeBase(kb) as base:
        for i, text in enumerate(["fox one", "the fox is two", "three is a fox by the river"]):
            base.add_text(text, name=f"{i}")
        plain_order = [hit.doc for hit in base.search("fox", 3)]
        hits = base.search("fox", 3, reranker=judge)
    scores = judge.scores("fox", [hit.text for hit in hits])
    assert list(scores) == sorted(scores, reverse=True)
    # Other neighbours in the pass, other order of fp32 sums.
    assert [hit.score for hit in hits] == pytest.approx(scores.tolist(), abs=1e-5)
    assert {hit.doc for hit in hits} == set(plain_order)
    assert [hit.legs["rerank"].rank for hit in hits] == [1, 2, 3]
    asked = ["rag", "search", "fox", "--kb", str(kb), "-k", "3", "--json"]
    found = CliRunner().invoke(app, [*asked, "--reranker", str(tiny_model)])
    assert found.exit_code == 0, found.output
    assert [hit["doc"] for hit in json.loads(found.stdout)] == [hit.doc for hit in hits]


def test_what_is_no_reranker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local folder"):
        open_reranker("http://127.0.0.1:9/v1")
    with pytest.raises(ModelError):
        open_reranker(str(tmp_path / "none"))
