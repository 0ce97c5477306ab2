"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464), as Qwen3.5 has it.

Each value head remembers pairs of keys and values in a matrix S, and at every position

    S = a S;   S = S + k (b (v - S^T k))^T;   o = S^T q

forgets by the decay 0 < a < 1, replaces what the key k returned by the value v, with the strength
0 < b < 1, and reads with the query q. Shapes: ... leading dimensions, B rows, T positions, C
channels of the convolution, G key heads, V value heads (those of one key head follow each other),
K key width, U value width, L positions of a chunk.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.part import Attend, Linear, RMSNorm, Rotations
from khaosz.model.recurrent import CausalConvolution, Recurrent, State

_CHUNK = 64  # positions whose updates are solved for together
_UNIT_EPS = 1e-6  # beside the square of a key's or query's length


class GatedDeltaNet(Recurrent):
    """Queries, keys and values pass a short convolution; the output is normalised and gated."""

    QKV_GATE, DECAY, OUT = ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"), ("out_proj",)
    PRODUCTS: ClassVar = (QKV_GATE, DECAY, OUT)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.state_shapes = layer, config.state_shapes(layer)
        (_, channels), (self.heads, self.key_width, self.value_width) = self.state_shapes
        values, width = self.heads * self.value_width, config.hidden_size
        self.keys = (channels - values) // 2
        self.in_proj_qkv = nn.Linear(width, channels, bias=False)
        self.in_proj_z = nn.Linear(width, values, bias=False)
        self.in_proj_b = nn.Linear(width, self.heads, bias=False)
        self.in_proj_a = nn.Linear(width, self.heads, bias=False)
        self.conv1d = CausalConvolution(channels, self.state_shapes[0][0] + 1)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.norm = RMSNorm(self.value_width, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear) -> Tensor:
        qkv, gate = linear(self, self.QKV_GATE, x)
        strength, decay = linear(self, self.DECAY, x)
        # The logarithm of a: -exp(A_log) softplus(...), as Mamba has it.
        log_decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias)
        read = attend(self, qkv, log_decay, strength.float().sigmoid())  # (..., V, U), fp32
        gate = F.silu(gate.float()).view(read.shape)
        return linear(self, self.OUT, (self.norm.forward(read) * gate).flatten(-2))[0]

    def scan(
        self, inputs: tuple[Tensor, ...], state: State, documents: Tensor | None = None
    ) -> tuple[Tensor, State]:
        qkv, log_decay, strength = inputs
        past, memory = state
        with torch.autocast(qkv.device.type, enabled=False):
            mixed, past = self.conv1d.forward(qkv.float(), past, documents)
            mixed = F.silu(mixed)
            values = mixed[..., 2 * self.keys :].unflatten(-1, (self.heads, -1))
            # Unit vectors: queries and keys side by side, (B, T, 2, G, K).
            unit = mixed[..., : 2 * self.keys].unflatten(-1, (2, -1, self.key_width))
            unit = F.rms_norm(unit, (self.key_width,), None, _UNIT_EPS / self.key_width)
            unit = unit * self.key_width**-0.5
            groups = self.heads // unit.shape[-2]
            if groups > 1:
                unit = unit.repeat_interleave(groups, dim=-2)
            queries, keys = unit[:, :, 0] * self.key_width**-0.5, unit[:, :, 1]
            if qkv.shape[1] == 1 and not torch.is_grad_enabled():
                step = Inputs(queries, keys, values, log_decay, strength)
                read = delta_step(step, memory)
            else:
                each = (x.transpose(1, 2) for x in (queries, keys, values, log_decay, strength))
                read, memory = delta_rule(Inputs(*each), memory, documents)
                read = read.transpose(1, 2)
        return read, (past, memory)

    def initialise(self, generator: torch.Generator) -> None:
        self.conv1d.initialise(generator)
        self.dt_bias.fill_(1.0)
        # Decays spread over the heads, as in transformers.
        self.A_log.uniform_(0.01, 16.0, generator=generator).log_()


class Inputs(NamedTuple):
    """Of the recurrence at each position: queries, keys (..., K), values (..., U), ln a and b."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    log_decay: Tensor
    strength: Tensor


def delta_step(inputs: Inputs, memory: Tensor) -> Tensor:
    """What `delta_rule` reads at one position (B, 1, V, ...); `memory` (B, V, K, U) is written in
    place. Both products with S come before the update, and are one: S^T q after it is
    a S^T q + (k q) b (v - a S^T k)."""
    flat = memory.view(-1, *memory.shape[-2:])  # (B V, K, U)
    decay, strength = inputs.log_decay.exp().view(-1, 1, 1), inputs.strength.reshape(-1, 1, 1)
    both = torch.stack((inputs.keys, inputs.queries), dim=-2).view(len(flat), 2, -1)
    read = torch.bmm(both, flat) * decay  # (B V, 2, U)
    change = (inputs.values.reshape(len(flat), 1, -1) - read[:, :1]) * strength
    overlap = (both[:, :1] * both[:, 1:]).sum(-1, keepdim=True)
    flat.mul_(decay).baddbmm_(both[:, :1].mT, change)
    return (read[:, 1:] + overlap * change).view(inputs.values.shape)


def delta_rule(
    inputs: Inputs, memory: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What queries of inputs (B, V, T, ...) read, (B, V, T, U), and S (B, V, K, U) after them.

    The updates of a chunk depend on each other: its changes b (v - S^T k) are the solution of one
    triangular system, in which entry (i, j) is b k_i k_j times the decay between the two (Yang et
    al. 2024, arXiv:2406.06484, with decay). Only S passes from chunk to chunk. A position of
    another document has no part in a chunk's products, nor in S.
    """
    queries, keys, values, log_decay, strength = inputs
    length = queries.shape[2]
    size = min(length, _CHUNK)
    missing = -length % size
    if missing:  # zeros change nothing
        queries, keys, values = (F.pad(x, (0, 0, 0, missing)) for x in (queries, keys, values))
        log_decay, strength = (F.pad(x, (0, missing)) for x in (log_decay, strength))
    queries, keys, values = (x.unflatten(2, (-1, size)) for x in (queries, keys, values))
    log_decay = log_decay.unflatten(2, (-1, size))
    total = log_decay.cumsum(-1)  # (B, V, chunks, L): since the beginning of the chunk
    strength = strength.unflatten(2, (-1, size))[..., None]
    seen = torch.ones(size, size, dtype=torch.bool, device=queries.device).tril()
    continues = ends = None
    if documents is not None:
        number = torch.cat((documents, documents[:, -1:].expand(-1, missing)), dim=1)
        number = number.unflatten(1, (-1, size))[:, None]
        seen = seen & (number[..., None] == number[..., None, :])
        before = torch.cat((number[:, :, :1, :1], number[:, :, :-1, -1:]), dim=2)
        continues, ends = number == before, number == number[..., -1:]
        # Since that of the document, where it is later: another's decays would leave rounding.
        total = (seen.float() @ log_decay[..., None])[..., 0]
    since_start, until_end = total.exp(), total[..., -1:] - total
    if continues is not None and ends is not None:
        since_start = since_start * continues
        until_end = until_end.masked_fill(~ends, -torch.inf)  # before it could overflow
    until_end = until_end.exp()
    whole = since_start[..., -1]
    between = (total[..., None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    scaled = strength * keys
    system = (scaled @ keys.mT) * between  # its diagonal is taken as one
    right = torch.cat((strength * values, scaled * since_start[..., None]), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    changes, forgotten = solved.split_with_sizes((values.shape[-1], keys.shape[-1]), dim=-1)
    inner = (queries @ keys.mT) * between
    queries, keys = queries * since_start[..., None], keys * until_end[..., None]
    read = []
    for chunk in range(total.shape[2]):
        change = changes[:, :, chunk] - forgotten[:, :, chunk] @ memory
        read.append(queries[:, :, chunk] @ memory + inner[:, :, chunk] @ change)
        memory = memory * whole[:, :, chunk, None, None] + keys[:, :, chunk].mT @ change
    return torch.cat(read, dim=2)[:, :, :length], memory
