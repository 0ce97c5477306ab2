"""A chat model as a reranker against a plain forward pass in float64."""

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
from khaosz.rag.models.rerankers import ChatReranker, open_reranker

PASSAGES = ["春眠不觉晓，处处闻啼鸟。", "the quick brown fox", "no"]


@pytest.fixture
def reranker(tiny_generator: Generator) -> ChatReranker:
    return ChatReranker(tiny_generator)


def reference(reranker: ChatReranker, query: str, passage: str) -> float:
    network, tokenizer = reranker._generator.model, reranker._generator.tokenizer
    assert isinstance(network, Transformer)
    ids = reranker._prompt(query, passage)
    text = tokenizer.decode(ids)
    assert query in text and passage in text
    yes, no = tokenizer.encode("yes")[0], tokenizer.encode("no")[0]
    with torch.no_grad():
        wide = deepcopy(network).double()
        logits = wide.logits(wide(torch.tensor([ids])))[0, -1]
    return float(logits[yes] - logits[no])


def test_scores_are_logits_of_yes_minus_no(reranker: ChatReranker) -> None:
    scores = reranker.scores("闻啼鸟", PASSAGES)
    expected = [reference(reranker, "闻啼鸟", passage) for passage in PASSAGES]
    assert np.ptp(expected) > 0.01
    # fp32 against float64, over two layers of width 32.
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert reranker.scores("q", []).shape == (0,)


def test_long_passage_has_the_score_of_its_best_part(reranker: ChatReranker) -> None:
    sentences = [f"{text} {i}. " for i in range(160) for text in PASSAGES]
    (whole,) = reranker.scores("fox", ["".join(sentences)])
    prompts = reranker._prompts("fox", "".join(sentences))
    assert len(prompts) > 1 and all(len(ids) <= reranker._generator.context for ids in prompts)
    prompt_texts = [reranker._generator.tokenizer.decode(ids) for ids in prompts]
    parts = [text.split("<Document>: ")[1].split("<|")[0] for text in prompt_texts]
    assert "".join("".join(parts).split()) == "".join("".join(sentences).split())
    logits = [reranker._generator.next_logits([ids], reranker._answers)[0] for ids in prompts]
    assert whole == pytest.approx(max(float(yes - no) for yes, no in logits), abs=1e-5)
    with pytest.raises(GenerationError, match="fills the reranker's context"):
        reranker.scores("fox " * 2500, ["a passage"])


def test_search_is_in_the_order_of_the_reranker(
    tmp_path: Path, tiny_model: Path, reranker: ChatReranker
) -> None:
    kb = tmp_path / "a.kb"
    with KnowledgeBase(kb) as base:
        for i, text in enumerate(["fox one", "the fox is two", "three is a fox by the river"]):
            base.add_text(text, name=f"{i}")
        plain_order = [hit.doc for hit in base.search("fox", 3)]
        hits = base.search("fox", 3, reranker=reranker)
    scores = reranker.scores("fox", [hit.text for hit in hits])
    assert list(scores) == sorted(scores, reverse=True)
    # Other neighbours in the pass, other order of fp32 sums.
    assert [hit.score for hit in hits] == pytest.approx(scores.tolist(), abs=1e-5)
    assert {hit.doc for hit in hits} == set(plain_order)
    assert [hit.legs["rerank"].rank for hit in hits] == [1, 2, 3]
    command = ["rag", "search", "fox", "--kb", str(kb), "-k", "3", "--json"]
    result = CliRunner().invoke(app, [*command, "--reranker", str(tiny_model)])
    assert result.exit_code == 0, result.output
    assert [hit["doc"] for hit in json.loads(result.stdout)] == [hit.doc for hit in hits]


def test_refuses_names_that_are_not_a_reranker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local folder"):
        open_reranker("http://127.0.0.1:9/v1")
    with pytest.raises(ModelError):
        open_reranker(str(tmp_path / "none"))
