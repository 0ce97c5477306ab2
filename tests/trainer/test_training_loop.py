"""The loop against the same steps in plain PyTorch, and what a checkpoint restores.

No data is prepared and no run is started, so that a defect shows within a second (the mutants of
`tests/mutants.toml` insert them one by one).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_MODEL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from khaosz.config import LoRAConfig, TrainConfig
from khaosz.data.batches.batch import IGNORE, Batch
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import RewardModel, Transformer
from khaosz.model.lora import add_lora
from khaosz.parallel import ParallelContext
from khaosz.trainer import trainer as trainer_module
from khaosz.trainer.calibration import _total_steps, apply_plan
from khaosz.trainer.checkpoint import restore, save_checkpoint, write_rollout
from khaosz.trainer.loss import cross_entropy_sum
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.schedule import lr_factor
from khaosz.trainer.strategy import Compute, Strategy
from khaosz.trainer.train_context import Plan, TrainContext
from khaosz.trainer.trainer import Trainer

CPU = ParallelContext(torch.device("cpu"))
STEPS = 6
MakeContext = Callable[..., TrainContext]


@pytest.fixture
def context(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> MakeContext:
    """`context(key=value)`: a run of six steps that is ready to go, made without any data."""

    def build(**changes: Any) -> TrainContext:
        values = {
            "stage": "pt", "data": "none", "out": tmp_path / "run", "size": "nano", "window": 16,
            "batch_tokens": 32, "max_steps": STEPS, "optimizer": "adamw", "lr": 0.5,
            "embedding_lr": 0.5, "weight_decay": 0.1, "model": TINY_MODEL,
            "schedule": {"name": "cosine", "warmup_steps": 2}, **changes,
        }  # fmt: skip
        config = TrainConfig.parse(values)
        plan = Plan(STEPS, "fp32", False, 1, rows=8, micro_rows=2, seconds_per_step=0.0)
        return TrainContext(config, model, tokenizer, CPU, plan, build_optimizers(model, config))

    return build


class Ragged(Strategy):
    """Micro-batches of 30, 2, 0 and 11 labels, other ones in every step."""

    examples = 1
    micro_rows = 2

    def micro_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        batches = []
        for scored in (30, 2, 0, 11):  # the third trains on nothing at all
            ids = torch.randint(0, 300, (2, 16), generator=generator)
            labels = torch.full((2, 16), IGNORE)
            labels.view(-1)[:scored] = torch.randint(0, 300, (scored,), generator=generator)
            positions = torch.arange(16).expand(2, 16)
            batches.append(Batch(ids, labels, positions, torch.zeros_like(ids)))
        return batches

    def count(self, batch: Batch) -> int:
        return batch.tokens

    def loss(self, model: Transformer, batch: Batch, compute: Compute) -> Tensor:
        hidden = model(batch.ids, batch.positions, batch.doc_ids)
        self.add_metrics(noted=(batch.labels != IGNORE).sum() * 3.0)
        return cross_entropy_sum(hidden, model.output_weight, batch.labels)


def test_steps_equal_plain_pytorch(context: MakeContext) -> None:
    """Four steps of gradient descent: the mean over all labels of a step, clipped once, with the
    rate of the step. Unlike Adam, it sees the size of a gradient and not its direction alone."""
    made = context(grad_clip=0.05)
    wide = copy.deepcopy(made.model).double()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.5)
    optimizer.param_groups[0]["base_lr"] = 0.5
    made.optimizers = [optimizer]
    strategy = Ragged()
    trainer = Trainer(made, strategy, Compute())
    theirs = torch.optim.SGD(wide.parameters(), lr=0.5)
    initial = copy.deepcopy(made.model.state_dict())
    factors = [1 / 3, 2 / 3, 1.0, 0.5 * (1 + 2**-0.5)]  # two steps of warm-up, a cosine over four
    for step, factor in enumerate(factors):
        batches = strategy.micro_batches(step)
        metrics = trainer.step(step)
        logits = wide.logits(wide(torch.cat([b.ids for b in batches]))).flatten(0, 1)
        labels = torch.cat([b.labels for b in batches]).flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        theirs.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(wide.parameters(), 0.05)
        assert norm > 0.5, "the clip must hold, in every micro-batch too"
        theirs.param_groups[0]["lr"] = 0.5 * factor
        theirs.step()
        assert metrics is not None and metrics["step"] == step + 1
        # fp32 against fp64 over 43 labels and two layers: a few units in the seventh digit.
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert metrics["lr"] == pytest.approx(0.5 * factor, rel=1e-12)
        assert metrics["noted"] == pytest.approx(3.0), "a mean over what the loss is taken over"
        assert metrics["tokens"] == 43 * (step + 1)
        assert all(p.grad is None for p in made.model.parameters())
    for name, parameter in made.model.named_parameters():
        moved, expected = (
            p.detach().double() - initial[name] for p in (parameter, wide.state_dict()[name])
        )
        # A step moves by 0.05 x 0.5 in all; an fp32 weight of size 1 rounds to 6e-8 in each.
        assert (moved - expected).norm() < 1e-3 * expected.norm() + 1e-6, name
    assert lr_factor(made.config.schedule, 3, STEPS) == pytest.approx(factors[3])


def test_mean_is_over_the_labels_of_all_ranks(
    context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over ranks is replaced: a second rank has as many labels and three times the loss."""
    alone = context(schedule={"name": "constant", "warmup_steps": 0})
    alone.optimizers = []
    plain = Trainer(alone, Ragged(), Compute()).step(0)
    calls: list[list[float]] = []

    def sum_over_ranks(values: list[float], parallel: ParallelContext) -> list[float]:
        calls.append(values)
        if len(calls) == 1:  # the loss's labels, all labels, and no request to stop
            return [2 * value for value in values]
        return [4 * values[0], *(2 * value for value in values[1:])]

    monkeypatch.setattr(trainer_module, "sum_over_ranks", sum_over_ranks)
    both = Trainer(alone, Ragged(), Compute()).step(0)
    assert plain is not None and both is not None
    # Twice as many labels halve a gradient; the loss is the mean of one and three.
    assert both["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-6)
    assert both["loss"] == pytest.approx(2 * plain["loss"], rel=1e-6)
    assert both["noted"] == pytest.approx(plain["noted"]) and both["tokens"] == 3 * 43


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"epochs": 1}, 3),  # 21 windows, eight a step: the last, incomplete step is one
        ({"epochs": 2}, 6),
        ({"epochs": 0.25}, 1),
        ({"epochs": 1, "max_steps": 2}, 2),
        ({"max_minutes": 1}, 30),
        ({"max_minutes": 0.01}, 1),
        ({"max_minutes": 0.01, "min_steps": 9}, 9),
        ({"max_minutes": 1, "min_steps": 9}, 30),
        ({"max_minutes": 0.01, "min_steps": 9, "epochs": 1}, 3),
    ],
    ids=str,
)
def test_steps_are_optimizer_steps(
    context: MakeContext, limits: dict[str, Any], steps: int
) -> None:
    """Not micro-batches, of which a step has four; the schedule runs over as many."""
    strategy = Ragged()
    strategy.examples = 21
    config = context(**{"max_steps": None, **limits}).config
    assert _total_steps(config, strategy, 8, 2.0) == steps


def test_every_group_follows_the_schedule_from_its_rate(context: MakeContext) -> None:
    made = context(optimizer="muon", lr=0.02, embedding_lr=0.3)
    trainer = Trainer(made, Ragged(), Compute())
    for step in range(3):
        trainer.step(step)
        factor = lr_factor(made.config.schedule, step, STEPS)
        rates = [group["lr"] for o in made.optimizers for group in o.param_groups]
        assert rates == pytest.approx([0.02 * factor, 0.3 * factor], rel=1e-12)


def test_adapters_learn_at_the_rate_that_is_logged(context: MakeContext) -> None:
    """Every step logs `lr`: with LoRA the adapters, too, are trained at this rate."""
    made = context(lr=0.02, embedding_lr=0.3, lora={"rank": 4})
    add_lora(made.model, LoRAConfig(rank=4), torch.Generator().manual_seed(0))
    made.optimizers = build_optimizers(made.model, made.config)
    trainer = Trainer(made, Ragged(), Compute())
    metrics = trainer.step(2)  # after the warm-up: the factor is 1
    assert metrics is not None
    rates = {group["lr"] for o in made.optimizers for group in o.param_groups if group["params"]}
    assert rates == {metrics["lr"]}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_the_matrices_of_the_blocks_decay(context: MakeContext, optimizer: str) -> None:
    """With gradients of zero only decay changes a weight."""
    made = context(optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    for parameter in made.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for part in made.optimizers:
        part.step()
    for name, parameter in made.model.named_parameters():
        inside = name.startswith("layers.") and parameter.ndim == 2
        expected = before[name] * (1 - 0.5 * 0.1) if inside else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0, msg=name)


class Broken(Ragged):
    """A NaN in the third step."""

    def loss(self, model: Transformer, batch: Batch, compute: Compute) -> Tensor:
        loss = super().loss(model, batch, compute)
        return loss * float("nan") if self.broken else loss

    broken = False


def test_nan_step_changes_no_state(context: MakeContext) -> None:
    made, strategy = context(), Broken()
    trainer = Trainer(made, strategy, Compute())
    trainer.step(0)
    held = {n: t.clone() for n, t in made.named_optimizer_tensors().items()}
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    strategy.broken = True
    trainer.step(1)
    strategy.broken = False
    assert made.progress.skipped == 1 and made.progress.step == 2
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert all(torch.equal(t, held[n]) for n, t in made.named_optimizer_tensors().items())
    trainer.step(2)  # the next step is not affected
    assert made.progress.skipped == 1
    assert all(p.isfinite().all() for p in made.model.parameters())


class Reads(TorchDispatchMode):
    """Counts the values that Python reads from tensors: on an accelerator each read waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Unread(Ragged):
    """A loss that reads no value of a tensor, so that only the reads of the loop are counted."""

    def loss(self, model: Transformer, batch: Batch, compute: Compute) -> Tensor:
        hidden = model(batch.ids, batch.positions, batch.doc_ids)
        logits = model.logits(hidden).flatten(0, 1)
        return F.cross_entropy(logits, batch.labels.flatten(), reduction="sum")


def test_accumulation_reads_nothing_back(context: MakeContext) -> None:
    """`.item()` on every micro-batch makes the accelerator wait for Python each time."""
    strategy = Unread()
    trainer = Trainer(context(), strategy, Compute())
    batches = strategy.micro_batches(0)
    count = float(sum(batch.tokens for batch in batches))
    with Reads() as reads:
        trainer._accumulate(batches, count)
    assert reads.count == 0


def test_master_weights_stay_fp32(context: MakeContext) -> None:
    """A rate of 1e-4 on norms of 1: bf16 has nothing between 1 and 1 - 2^-8."""
    made = context(lr=1e-4, embedding_lr=1e-4, dtype="bf16", schedule={"name": "constant"})
    made.plan = Plan(STEPS, "bf16", False, 1, rows=8, micro_rows=2, seconds_per_step=0.0)
    compute = apply_plan(made.plan, made.model, made.config)
    assert compute.dtype == torch.bfloat16
    trainer = Trainer(made, Ragged(), compute)
    for step in range(3):
        trainer.step(step)
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    assert all(t.dtype == torch.float32 for t in made.named_optimizer_tensors().values())
    # Adam's step is the rate: three of them, less what warm-up and changes of sign take.
    moved = (made.model.norm.weight - 1).abs()
    assert 5e-5 < float(moved.detach().mean()) < 3.1e-4


class Held:
    """Stands for the state of a rollout."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_tensors(self) -> dict[str, Tensor]:
        return {"value": torch.tensor(self.value)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.value = float(tensors["value"])


def test_checkpoint_restores_optimizer_random_state_critic_and_rollout(
    context: MakeContext,
) -> None:
    """Optimizer, random state, critic and rollout: without any of them a resumed run differs."""
    made = context()
    made.critic = RewardModel.from_transformer(made.model)
    made.optimizers += build_optimizers(made.critic, made.config)
    made.rollouts = Held(7.0)
    trainer = Trainer(made, Ragged(), Compute())
    trainer.step(0)
    for parameter in made.critic.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizers[1].step()
    torch.manual_seed(11)
    made.config.out.mkdir()
    write_rollout(made)
    directory = save_checkpoint(made)
    drawn = torch.rand(4)
    held = {n: t.clone() for n, t in made.named_optimizer_tensors().items()}
    critic = {n: p.detach().clone() for n, p in made.critic.named_parameters()}
    assert any(name.startswith("value.") for name in held)

    trainer.step(1)
    with torch.no_grad():
        for parameter in made.critic.parameters():
            parameter.add_(1.0)
    made.rollouts.value = 0.0
    torch.manual_seed(99)
    restore(made, directory)
    assert torch.equal(torch.rand(4), drawn)
    actual = made.named_optimizer_tensors()
    assert actual.keys() == held.keys()
    assert all(torch.equal(actual[n], t) for n, t in held.items())
    assert all(torch.equal(p, critic[n]) for n, p in made.critic.named_parameters())
    assert made.rollouts.value == 7.0
