"""Strategies: what differs between stages. Each returns the micro-batches of a step and the sum of
its loss; the loop divides by the global count and steps, and is the same for every stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from khaosz.config import TrainConfig
from khaosz.data.batches.batch import Batch
from khaosz.data.batches.dataset import TokenDataset
from khaosz.data.batches.sampler import draws_for
from khaosz.data.batches.sequences import (
    SequenceBatch,
    TokenSequence,
    group_into_batches,
    pack_sequences,
)
from khaosz.model import RewardModel, Transformer
from khaosz.model.mixture import balance_loss, recorded_routing
from khaosz.parallel import ParallelContext
from khaosz.trainer.loss import ChunkLoss, chunk_loss, cross_entropy_sum


@dataclass
class Compute:
    """The compute type and loss kernel of a forward pass, fixed by calibration."""

    dtype: torch.dtype = torch.float32
    loss_chunk: int = 1024
    inner: ChunkLoss = chunk_loss


def hidden_states(model: Transformer, batch: Batch, compute: Compute) -> Tensor:
    """Hidden states (B, T, D) of a batch in the compute type."""
    device = batch.ids.device.type
    with torch.autocast(device, compute.dtype, enabled=compute.dtype != torch.float32):
        return model(batch.ids, batch.positions, batch.doc_ids)


@dataclass
class Strategy(ABC):
    """One stage of training."""

    metric_sums: dict[str, Tensor] = field(default_factory=dict, init=False)
    """Sums that `loss` adds to, detached, over the units of `count`; the loop empties it."""
    step_metrics: dict[str, float] = field(default_factory=dict, init=False)
    """Metrics of this step's data, the same on all ranks (a rollout's mean reward)."""
    progress_metrics: tuple[str, ...] = field(default=(), init=False)
    """The metrics that the progress line shows."""
    critic: RewardModel | None = field(default=None, init=False)
    """A second trained model, or None."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """Examples of an epoch, in the unit of a step's rows."""

    @abstractmethod
    def micro_batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of optimizer step `step`: a pure function of the step, and in
        reinforcement learning of the weights."""

    @abstractmethod
    def count(self, batch: Any) -> int:
        """Tokens (or pairs) that the loss of a micro-batch is summed over."""

    @abstractmethod
    def loss(self, model: Any, batch: Any, compute: Compute) -> Tensor:
        """The loss sum of a micro-batch: fp32 scalar, not divided by anything."""

    def add_metrics(self, **sums: Tensor) -> None:
        """Add to `metric_sums`. A NaN is kept, so that it shows in the log."""
        for name, value in sums.items():
            value = value.detach().float()
            self.metric_sums[name] = (
                self.metric_sums[name] + value if name in self.metric_sums else value
            )


@dataclass
class BatchLayout:
    """How the sequences of an optimizer step are packed into micro-batches.

    per_step    examples per optimizer step, all ranks together
    window      tokens of a row
    micro_rows  rows of a micro-batch, at most
    seed        of the order in which examples are drawn
    one_shape   every micro-batch has `micro_rows` whole rows, for a compiled model
    """

    per_step: int
    window: int
    micro_rows: int
    pad_id: int
    seed: int
    one_shape: bool = False

    def pack(
        self, sequences: Sequence[TokenSequence], groups: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[list[int], SequenceBatch]]:
        """Micro-batches, each with the numbers of its sequences. Those of a group share one."""
        if groups is None:
            groups = [[i] for i in range(len(sequences))]
        lengths = [len(sequence.ids) for sequence in sequences]
        rows = self.micro_rows if self.one_shape else None
        for members in group_into_batches(groups, lengths, self.window, self.micro_rows):
            picked = [sequences[i] for i in members]
            yield members, pack_sequences(picked, self.window, self.pad_id, rows=rows)


@dataclass
class PTStrategy(Strategy):
    """Pretraining: L_PT = -sum_t log P(x_t | x_<t) over every token of packed documents."""

    dataset: TokenDataset
    rows: int  # windows per optimizer step, all ranks together
    micro_rows: int  # windows per forward pass
    parallel: ParallelContext

    def micro_batches(self, step: int) -> list[Batch]:
        draws = draws_for(step, self.rows, self.parallel.rank, self.parallel.world)
        starts = range(0, len(draws), self.micro_rows)
        return [self.dataset.batch(draws[start : start + self.micro_rows]) for start in starts]

    @property
    def examples(self) -> int:
        return self.dataset.windows

    def count(self, batch: Batch) -> int:
        return batch.tokens

    def loss(self, model: Transformer, batch: Batch, compute: Compute) -> Tensor:
        return cross_entropy_sum(
            model.head_input(hidden_states(model, batch, compute)),
            model.stored_head or model.output_weight,
            batch.labels,
            chunk=compute.loss_chunk,
            dtype=compute.dtype,
            inner=compute.inner,
            cap=model.config.final_logit_softcapping,
        )


@dataclass
class SFTStrategy(PTStrategy):
    """Supervised fine-tuning: L_SFT = -sum_{t in response} log P(s_t | s_<t).

    The same sum as in pretraining, over other data: whole conversations, packed, with labels only
    on assistant tokens and the token that ends the turn.
    """


def build_strategy(
    config: TrainConfig, dataset: TokenDataset, rows: int, micro: int, parallel: ParallelContext
) -> PTStrategy:
    kind = PTStrategy if config.stage == "pt" else SFTStrategy
    return kind(dataset, rows, micro, parallel)


class LossModule(nn.Module):
    """Model, critic and loss as one module, so that every forward pass with gradients runs inside
    the wrapper that all-reduces them."""

    def __init__(self, model: Transformer, strategy: Strategy, compute: Compute) -> None:
        super().__init__()
        self.model, self.strategy, self.compute = model, strategy, compute
        self.critic = strategy.critic  # registered, so that its gradients are reduced too

    def forward(self, batch: Batch) -> Tensor:
        """The strategy's loss sum; of a mixture of experts with its load-balancing loss, weighted
        so that the mean over a step is that of its micro-batches."""
        config, strategy = self.model.config, self.strategy
        if config.num_experts is None or not config.router_aux_loss_coef:
            return strategy.loss(self.model, batch, self.compute)
        with recorded_routing(self.model) as logits:
            loss = strategy.loss(self.model, batch, self.compute)
        if not logits:  # no gradients, or no layer with experts
            return loss
        written = (batch.doc_ids >= 0).flatten()  # the rest is padding
        balance = balance_loss(logits, config.num_experts_per_tok or 0, written)
        balance = balance * strategy.count(batch)
        strategy.add_metrics(router_aux_loss=balance)
        return loss + config.router_aux_loss_coef * balance
