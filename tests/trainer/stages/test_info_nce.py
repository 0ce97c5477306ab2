"""InfoNCE against plain arithmetic, and a step's gradient against the plain computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from khaosz.config import EmbedConfig
from khaosz.data.records.pairs import TextEncoder, TextPairs, load_text_pairs
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.embed import EmbedStrategy
from khaosz.trainer.stages.embed_validation import evaluate_retrieval
from khaosz.trainer.stages.losses import info_nce, ranks
from khaosz.trainer.strategy import BatchLayout, Compute


def written_out(
    queries: Tensor, passages: Tensor, positive: list[int], answers: Any, t: float, both: bool
) -> float:
    """Sum over the queries, number by number."""

    def exp(i: int, j: int) -> float:
        return math.exp(float(queries[i] @ passages[j]) / t)

    total = 0.0
    for i, p in enumerate(positive):
        seen = [j for j in range(len(passages)) if j == p or not answers[i][j]]
        one = -math.log(exp(i, p) / sum(exp(i, j) for j in seen))
        if both:
            asked = [k for k in range(len(queries)) if k == i or not answers[k][p]]
            one = (one - math.log(exp(i, p) / sum(exp(k, p) for k in asked))) / 2
        total += one
    return total


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_equals_the_formula_of_the_paper(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    passages = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    queries, passages = (x / x.norm(dim=-1, keepdim=True) for x in (queries, passages))
    positive = [2, 0, 2, 5]  # two queries have one passage
    answers = torch.zeros(4, 7, dtype=torch.bool)
    answers[range(4), positive] = True
    answers[1, 6] = answers[3, 0] = True  # answers that other records name
    actual = info_nce(
        queries, passages, torch.tensor(positive), answers, 0.3, symmetric=symmetric
    ).sum()
    expected = written_out(queries, passages, positive, answers.tolist(), 0.3, symmetric)
    assert float(actual) == pytest.approx(expected, rel=1e-12)


def test_false_negative_has_no_effect() -> None:
    """Neither the loss nor a gradient changes, even by a NaN."""
    queries = torch.eye(2, 3, dtype=torch.float64)
    passages = torch.eye(3, dtype=torch.float64)
    passages[2] = torch.nan
    positive = torch.tensor([0, 1])
    answers = torch.tensor([[True, False, True], [False, True, True]])
    leaf = queries.requires_grad_()
    loss = info_nce(leaf, passages, positive, answers, 1.0)
    assert torch.equal(loss, info_nce(leaf, passages[:2], positive, answers[:, :2], 1.0))
    with_it = info_nce(leaf, passages, positive, answers.new_tensor([[1, 0, 0], [0, 1, 0]]), 1.0)
    assert with_it.isnan().all()


def test_ranks_are_pessimistic() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    passages = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    answers = torch.tensor([[True, False, False], [False, False, True], [True, True, False]])
    actual = ranks(queries, passages, torch.tensor([0, 2, 0]), answers)
    assert actual.tolist() == [2, 1, 1]  # a tie counts against it; another answer does not


def strategy_of(data: TextPairs, tokenizer: Tokenizer, **changes: Any) -> EmbedStrategy:
    given: dict[str, Any] = {"pooling": "mean", "temperature": 0.1}
    rows = changes.pop("micro_rows", 1)
    return EmbedStrategy(
        data=data,
        held_out=TextPairs(),
        layout=BatchLayout(10, 64, rows, tokenizer.pad_id, seed=3),
        parallel=ParallelContext(torch.device("cpu")),
        config=EmbedConfig.parse({**given, **changes}),
    )


def plain_loss(model: Transformer, strategy: EmbedStrategy, step: int) -> Tensor:
    """Each text alone, everything in one graph, each row's columns as lists of texts."""
    whole = strategy.micro_batches(step)[0].step
    data, config = strategy.data, strategy.config
    drawn = []  # the step's pairs, identified by the texts of its queries
    texts: dict[int, list[int]] = {}
    for packed in whole.passes:
        for i, number in enumerate(packed.fields["text"].tolist()):
            texts[number] = packed.ids[packed.doc_ids == i].tolist()
    for row in range(len(whole.positive)):
        own = [i for i, ids in enumerate(data.queries) if ids.tolist() == texts[row]]
        passage = texts[len(whole.positive) + int(whole.positive[row])]
        drawn += [i for i in own if data.passages[data.positive[i]].tolist() == passage][:1]

    def vector(ids: Any) -> Tensor:
        hidden = model(torch.tensor([list(map(int, ids))]))[0]
        pooled = hidden.mean(0) if config.pooling == "mean" else hidden[-1]
        return pooled / pooled.norm()

    assert len(drawn) == strategy.layout.per_step
    columns = sorted({n for i in drawn for n in (data.positive[i], *data.negatives[i])})
    queries = [vector(data.queries[i]) for i in drawn]
    passages = {n: vector(data.passages[n]) for n in columns}
    total = torch.zeros((), dtype=torch.float64)
    for row, (i, query) in enumerate(zip(drawn, queries, strict=True)):
        own = data.positive[i]
        seen = [n for n in columns if n == own or n not in answers_of(data, i)]
        scores = torch.stack([query @ passages[n] for n in seen]) / config.temperature
        one = scores.logsumexp(0) - query @ passages[own] / config.temperature
        if config.symmetric:
            asked = [k for k, j in enumerate(drawn) if k == row or own not in answers_of(data, j)]
            back = torch.stack([queries[k] @ passages[own] for k in asked]) / config.temperature
            one = (one + back.logsumexp(0) - query @ passages[own] / config.temperature) / 2
        total = total + one
    return total


def answers_of(data: TextPairs, pair: int) -> set[int]:
    """Passages that any record names for the query of this pair."""
    query = data.queries[pair].tolist()
    return {p for ids, p in zip(data.queries, data.positive, strict=True) if ids.tolist() == query}


@pytest.fixture
def data(tmp_path: Path, text_pairs_file: Path, tokenizer: Tokenizer) -> TextPairs:
    """With a passage that answers two queries and a query with two answers."""
    lines = text_pairs_file.read_text(encoding="utf-8").splitlines()[:12]
    lines.append('{"query": "a b", "pos": ["天地", "天地玄"], "neg": ["玄黄"]}')
    lines.append('{"query": "a b b", "positive": "天地"}')
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_text_pairs([path], TextEncoder(tokenizer, 48, "q: ", "p: "))[0]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    "changes", [{}, {"pooling": "last"}, {"symmetric": True}], ids=["mean", "last", "symmetric"]
)
def test_pass_by_pass_is_the_plain_gradient(
    model: Transformer, tokenizer: Tokenizer, data: TextPairs, changes: dict[str, Any], rows: int
) -> None:
    model = model.double()
    strategy = strategy_of(data, tokenizer, micro_rows=rows, **changes)
    compute = Compute()
    for step in range(2):  # of ten pairs of fifteen: the second wraps around
        model.zero_grad()
        plain = plain_loss(model, strategy, step)
        plain.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        batches = strategy.micro_batches(step)
        assert (len(batches) > 3) == (rows == 1)
        assert sum(map(strategy.count, batches)) == 10
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = strategy.loss(model, batch, compute)
            loss.backward()
            total += loss.detach()
        assert float(total) == pytest.approx(float(plain.detach()), rel=1e-10)
        assert expected and "lm_head.weight" not in expected
        for name, gradient in expected.items():
            actual = model.get_parameter(name).grad
            scale = float(gradient.abs().max())
            assert actual is not None and scale > 0, name
            # fp64, summed in another order.
            torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-9 * scale, msg=name)


def test_held_out_retrieval_by_hand(
    model: Transformer, tokenizer: Tokenizer, data: TextPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query against every held-out passage but its other answers, in parts or at once."""
    model = model.double()
    strategy = strategy_of(data, tokenizer)
    strategy.held_out = data
    with torch.no_grad():

        def vector(ids: Any) -> Tensor:
            pooled = model(torch.tensor([ids.tolist()]))[0].mean(0)
            return pooled / pooled.norm()

        passages = torch.stack([vector(ids) for ids in data.passages])
        losses, places = [], []
        for i, query in enumerate(data.queries):
            scores, own = passages @ vector(query), data.positive[i]
            others = [n for n in range(len(passages)) if n not in answers_of(data, i)]
            seen = scores[[own, *others]]
            losses.append(float((seen / 0.1).logsumexp(0) - seen[0] / 0.1))
            places.append(1 + int((scores[others] >= scores[own]).sum()))
    assert len(set(places)) > 2
    expected = {
        "loss": sum(losses) / len(losses),
        "accuracy": places.count(1) / len(places),
        "mrr": sum(1 / place for place in places) / len(places),
    }
    for compared in (1 << 24, 1):
        monkeypatch.setattr("khaosz.trainer.stages.embed_validation._COMPARED", compared)
        assert evaluate_retrieval(strategy, model, Compute()) == pytest.approx(expected, rel=1e-9)
