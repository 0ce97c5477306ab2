"""Strategies: what a stage means. Each gives the micro-batches of a step and the sum of its loss;
the loop divides by the global count, steps, and knows nothing else about the stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from khaosz.config import TrainConfig
from khaosz.data.batches.batch import Batch
from khaosz.data.batches.dataset import TokenDataset
from khaosz.data.batches.sampler import draws_for
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.loss import ChunkLoss, chunk_loss, cross_entropy_sum


@dataclass
class Compute:
    """How a forward pass computes: fixed by calibration, the same for every stage."""

    dtype: torch.dtype = torch.float32
    loss_chunk: int = 1024
    inner: ChunkLoss = chunk_loss


class Strategy(Protocol):
    """One stage of training."""

    stage: str
    tally: dict[str, Tensor]
    """Sums that `loss` has noted, detached, over what `count` counts; the loop empties it."""
    facts: dict[str, float]
    """Numbers about this step's data that all ranks share, for the log (a rollout's reward)."""
    shown: tuple[str, ...]
    """Which of them stand in the progress line."""
    companion: nn.Module | None
    """A second trained module (a critic), or None."""

    @property
    def examples(self) -> int:
        """How many of what a step's rows count make an epoch."""
        ...

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of optimizer step `step`: a pure function of the step, and in
        reinforcement learning of the weights."""
        ...

    def count(self, batch: Any) -> int:
        """Tokens (or pairs) the loss sum of a micro-batch is taken over."""
        ...

    def loss(self, model: Any, batch: Any, compute: Compute) -> Tensor:
        """The loss sum of a micro-batch: fp32 scalar, not divided by anything."""
        ...


@dataclass
class Notes:
    """What a strategy reports beside its loss; see `Strategy`."""

    tally: dict[str, Tensor] = field(default_factory=dict, init=False)
    facts: dict[str, float] = field(default_factory=dict, init=False)
    shown: tuple[str, ...] = field(default=(), init=False)
    companion: nn.Module | None = field(default=None, init=False)

    def note(self, **sums: Tensor) -> None:
        """Add to the tally; NaN where a NaN comes in, so that nothing hides."""
        for name, value in sums.items():
            value = value.detach().float()
            self.tally[name] = self.tally[name] + value if name in self.tally else value


@dataclass
class PTStrategy(Notes):
    """Pretraining: L_PT = -sum_t log P(x_t | x_<t) over every token of packed documents."""

    dataset: TokenDataset
    rows: int  # windows per optimizer step, all ranks together
    micro_rows: int  # windows per forward pass
    parallel: ParallelContext
    stage: str = "pt"

    def micro_batches(self, step: int) -> list[Batch]:
        draws = draws_for(step, self.rows, self.parallel.rank, self.parallel.world)
        return list(self._cut(draws))

    def _cut(self, draws: range) -> Iterator[Batch]:
        for start in range(0, len(draws), self.micro_rows):
            yield self.dataset.batch(draws[start : start + self.micro_rows])

    @property
    def examples(self) -> int:
        return self.dataset.windows

    def count(self, batch: Batch) -> int:
        return batch.tokens

    def loss(self, model: Transformer, batch: Batch, compute: Compute) -> Tensor:
        device = batch.ids.device.type
        with torch.autocast(device, compute.dtype, enabled=compute.dtype != torch.float32):
            hidden = model(batch.ids, batch.positions, batch.doc_ids)
        return cross_entropy_sum(
            hidden,
            model.output_weight,
            batch.labels,
            chunk=compute.loss_chunk,
            dtype=compute.dtype,
            inner=compute.inner,
        )


@dataclass
class SFTStrategy(PTStrategy):
    """Supervised fine-tuning: L_SFT = -sum_{t in response} log P(s_t | s_<t).

    The same sum as pretraining; what differs is the data: whole conversations, packed, with labels
    on assistant tokens and the token that ends the turn only.
    """

    stage: str = "sft"


def build_strategy(
    config: TrainConfig, dataset: TokenDataset, rows: int, micro: int, parallel: ParallelContext
) -> PTStrategy:
    match config.stage:
        case "pt":
            return PTStrategy(dataset, rows, micro, parallel)
        case "sft":
            return SFTStrategy(dataset, rows, micro, parallel)
        case stage:
            raise AssertionError(f"{stage} does not read token files")


class LossModule(nn.Module):
    """Model (and critic) and loss as one module, so that everything that makes gradients runs
    inside the wrapper that all-reduces them."""

    def __init__(self, model: Transformer, strategy: Strategy, compute: Compute) -> None:
        super().__init__()
        self.model, self.strategy, self.compute = model, strategy, compute
        self.companion = strategy.companion  # registered, so that its gradients are reduced too

    def forward(self, batch: Batch) -> Tensor:
        return self.strategy.loss(self.model, batch, self.compute)
