"""Log-probabilities of given tokens, without all logits in memory.

Shapes: N tokens, D hidden width, V vocabulary.

The loss of a pair or of a rollout depends on all of its log-probabilities, so gradients can't be
computed in the forward pass as in `trainer.loss`: the backward pass computes each chunk's logits
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from khaosz.data.batches.batch import IGNORE, Batch
from khaosz.model import Transformer, capped
from khaosz.trainer.loss import CHUNK_LOGITS, missing_rows
from khaosz.trainer.strategy import Compute, hidden_states


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        temperature: float,
        entropy: bool,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        table = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(labels), dtype=wide)
        entropies, totals = torch.zeros_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = capped((hidden[part] @ table.t()).to(wide), cap) / temperature
            total = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, labels[part, None])[:, 0] - total
            totals[part] = total
            if entropy:
                shares = (logits - total[:, None]).exp_()
                entropies[part] = total - (shares * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, totals, entropies)
        ctx.chunk, ctx.temperature, ctx.cap = chunk, temperature, cap
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, totals, entropies = ctx.saved_tensors
        by_logprob, by_entropy = grads
        table = weight.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(labels), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = capped((hidden[part] @ table.t()).to(totals.dtype), ctx.cap)
            logprobs = logits / ctx.temperature - totals[part, None]  # (C, V)
            shares = logprobs.exp()
            gradient = torch.zeros_like(shares)
            if by_logprob is not None:
                gradient -= shares * by_logprob[part, None]
                rows = torch.arange(len(shares), device=shares.device)
                gradient[rows, labels[part]] += by_logprob[part]
            if by_entropy is not None:
                gradient -= shares * (logprobs + entropies[part, None]) * by_entropy[part, None]
            if ctx.cap is not None:
                gradient = gradient * (1 - (logits / ctx.cap).square())
            gradient = (gradient / ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = gradient @ table
            grad_weight += (gradient.t() @ hidden[part]).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int = 1024,
    temperature: float = 1.0,
    entropy: bool = False,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log P(label) and entropy of each position: two (N,) tensors, fp32 or wider.

    hidden (N, D), weight (V, D), labels (N,), none of them ignored. `temperature` divides the
    logits, for policies that are sampled at a temperature other than 1. Without `entropy`, which
    costs a softmax, the second is zeros. `cap`: of the model's logits.
    """
    chunk = min(chunk, max(1, CHUNK_LOGITS // weight.shape[0]))
    count = len(labels)
    missing = missing_rows(count, chunk)
    hidden, labels = pad(hidden, (0, 0, 0, missing)), pad(labels, (0, missing))
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropies = _TokenLogprobs.apply(
            hidden, weight, labels, chunk, temperature, entropy, cap
        )
    return logprobs[:count], entropies[:count]


def batch_logprobs(
    model: Transformer,
    batch: Batch,
    compute: Compute,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log P and entropy (N,) of the scored tokens of a batch, in row-major order."""
    hidden = model.head_input(hidden_states(model, batch, compute))
    scored = batch.labels != IGNORE
    return token_logprobs(
        hidden[scored].to(compute.dtype),
        model.output_weight,
        batch.labels[scored],
        chunk=compute.loss_chunk,
        temperature=temperature,
        entropy=entropy,
        cap=model.config.final_logit_softcapping,
    )
