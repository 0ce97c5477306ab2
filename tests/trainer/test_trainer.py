"""The loop: normalisation, guards, and the output of a run."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import Recipe

from khaosz.data.batches.batch import Batch
from khaosz.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    KhaoszError,
    TokenizerError,
    TrainingError,
)
from khaosz.interop.models import load_model
from khaosz.model import Transformer
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run
from khaosz.trainer.strategy import Compute, Strategy
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer

QUIET = Console(file=io.StringIO())


class Ragged(Strategy):
    """Micro-batches of very different numbers of labels, as fine-tuning has them."""

    examples = 1

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def micro_batches(self, step: int) -> list[Batch]:
        return self.batches

    def count(self, batch: Batch) -> int:
        return batch.tokens

    def loss(self, model: Transformer, batch: Batch, compute: Compute) -> torch.Tensor:
        from khaosz.trainer.loss import cross_entropy_sum

        hidden = model(batch.ids, batch.positions, batch.doc_ids)
        return cross_entropy_sum(hidden, model.output_weight, batch.labels)


def ragged_batches() -> list[Batch]:
    torch.manual_seed(0)
    batches = []
    for scored in (30, 2, 0, 11):  # the third trains on nothing at all
        ids, labels = torch.randint(0, 600, (2, 16)), torch.full((2, 16), -100)
        labels.view(-1)[:scored] = torch.randint(0, 600, (scored,))
        positions = torch.arange(16).expand(2, 16)
        batches.append(Batch(ids, labels, positions, torch.zeros(2, 16, dtype=torch.long)))
    return batches


def test_accumulated_gradients_equal_one_big_batch(recipe: Recipe) -> None:
    """transformers #34191 and many more: the mean of micro-batch means is not the mean."""
    context = run(recipe(max_steps=1), console=QUIET)
    model = context.model
    batches = ragged_batches()
    trainer = Trainer(context, Ragged(batches), Compute())
    count = sum(batch.tokens for batch in batches)
    trainer._accumulate(batches, count)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    double = copy.deepcopy(model).double()
    double.zero_grad()
    ids = torch.cat([b.ids for b in batches])
    labels = torch.cat([b.labels for b in batches])
    logits = double.logits(double(ids))
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    for name, parameter in double.named_parameters():
        assert parameter.grad is not None
        # fp32 against fp64 on sums of 43 tokens: a few units in the seventh digit.
        torch.testing.assert_close(ours[name].double(), parameter.grad, rtol=1e-4, atol=1e-7)


def test_run_learns_and_saves_a_servable_model(recipe: Recipe) -> None:
    context = run(
        recipe(max_steps=60, batch_tokens=512, eval_every=20, save_every=30), console=QUIET
    )
    out = context.config.out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(math.log(context.tokenizer.vocab_size), rel=0.02)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert {"tokens", "lr", "tokens_per_s", "grad_norm"} <= rows[0].keys()
    assert rows[-1]["val_bits_per_byte"] < rows[19]["val_bits_per_byte"]
    last = resolve(out / "last")
    assert last is not None and last.name == "step-000060"
    names = {path.name for path in last.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "generation_config.json", "train_config.json", "state"} <= names  # fmt: skip
    assert (out / "loss.png").stat().st_size > 10_000
    loaded = load_model(out / "last")
    for name, parameter in context.model.named_parameters():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name])
        assert parameter.dtype == torch.float32


def test_number_of_steps_counts_accumulation(recipe: Recipe) -> None:
    """epochs=1 visits every window once, the last incomplete step included."""
    context = run(
        recipe(max_steps=None, epochs=1, eval_every=10_000, save_every=10_000), console=QUIET
    )
    assert context.plan.rows == 8 and context.plan.micro_rows == 4
    from khaosz.data.batches.dataset import TokenDataset
    from khaosz.data.shards.manifest import PreparedData

    windows = TokenDataset.open(PreparedData.open(context.config.data), 32).windows
    assert context.progress.step == math.ceil(windows / 8)


def test_non_finite_gradient_changes_nothing(recipe: Recipe) -> None:
    context = run(recipe(max_steps=2), console=QUIET)
    batches = ragged_batches()

    class Broken(Ragged):
        def loss(self, model: Transformer, batch: Batch, compute: Compute) -> torch.Tensor:
            return super().loss(model, batch, compute) * float("nan")

    trainer = Trainer(context, Broken(batches), Compute())
    before = {name: p.clone() for name, p in context.model.named_parameters()}
    states = {k: v.clone() for k, v in context.named_optimizer_tensors().items()}
    trainer.step(0)
    assert context.progress.skipped == 1
    assert all(torch.equal(before[n], p) for n, p in context.model.named_parameters())
    assert all(torch.equal(states[k], v) for k, v in context.named_optimizer_tensors().items())
    with pytest.raises(TrainingError, match="not finite 10 times"):
        for _ in range(9):
            trainer.step(0)


def test_refuses_an_output_directory_with_a_run(recipe: Recipe) -> None:
    run(recipe(max_steps=1), console=QUIET)
    with pytest.raises(CheckpointError, match="already contains a run"):
        run(recipe(max_steps=1), console=QUIET)


def test_sft_starts_from_a_model_with_fresh_optimizer_and_schedule(
    recipe: Recipe, chats_file: Path, tmp_path: Path
) -> None:
    pt = run(recipe(max_steps=4), console=QUIET)
    config = recipe(
        stage="sft", data=chats_file, out=tmp_path / "sft", init_from=pt.config.out / "last",
        size=None, model={}, window=None, batch_tokens=None, max_steps=3,
    )  # fmt: skip
    sft = run(config, console=QUIET)
    assert sft.progress.step == 3
    assert sft.config.window == pt.model.config.max_position_embeddings
    assert sft.tokenizer.fingerprint == pt.tokenizer.fingerprint
    rows = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and math.isfinite(rows[-1]["loss"])
    # Only responses and their end tokens are trained on.
    batch = next(iter(Trainer(sft, _strategy(sft), Compute()).strategy.micro_batches(0)))
    assert 0 < batch.tokens < (batch.doc_ids >= 0).sum()


def _strategy(context: TrainContext):  # type: ignore[no-untyped-def]
    from khaosz.data.batches.dataset import TokenDataset
    from khaosz.data.shards.manifest import PreparedData
    from khaosz.trainer.strategy import build_strategy

    window = context.config.window
    assert window is not None
    prepared = PreparedData.open(context.config.out / "data")
    dataset = TokenDataset.open(prepared, window)
    return build_strategy(context.config, dataset, 2, 2, context.parallel)


def test_gradient_checkpointing_changes_no_weight(recipe: Recipe, tmp_path: Path) -> None:
    plain = run(recipe(max_steps=3), console=QUIET)
    saved = run(recipe(max_steps=3, gradient_checkpointing=True, out=tmp_path / "b"), console=QUIET)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, dict(saved.model.named_parameters())[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "sgdr"])
def test_optimizers_and_schedules_train(recipe: Recipe, optimizer: str, schedule: str) -> None:
    config = recipe(optimizer=optimizer, schedule={"name": schedule}, max_steps=12)
    context = run(config, console=QUIET)
    rows = [json.loads(x) for x in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert context.progress.skipped == 0


def test_norm_weights_move_under_fp32_masters(recipe: Recipe) -> None:
    """Pure-bf16 training leaves every norm weight at 1.0 for hundreds of steps."""
    context = run(recipe(dtype="bf16", max_steps=6), console=QUIET)
    assert (context.model.norm.weight != 1.0).any()
    assert all(p.dtype == torch.float32 for p in context.model.parameters())


def test_early_stop(recipe: Recipe) -> None:
    config = recipe(lr=1e-12, embedding_lr=1e-12, early_stop=2, eval_every=1, max_steps=50)
    context = run(config, console=QUIET)
    assert context.stopping is not None and context.progress.step < 10


def test_bad_input(recipe: Recipe, tmp_path: Path, chats_file: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(KhaoszError, match="no text"):
        run(recipe(data=empty, out=tmp_path / "a"), console=QUIET)
    with pytest.raises(DataError, match="pt data"):
        run(recipe(stage="sft", out=tmp_path / "b"), console=QUIET)
    with pytest.raises(TokenizerError, match="vocab_size 20 is too small"):
        run(recipe(data=chats_file, vocab_size=20, out=tmp_path / "c"), console=QUIET)
    with pytest.raises(DeviceError, match="not available here"):
        run(recipe(parallel={"device": "npu"}, out=tmp_path / "d"), console=QUIET)
    with pytest.raises(ConfigError, match="unknown key"):
        run(recipe(model={"hidden_sise": 64}, out=tmp_path / "e"), console=QUIET)
