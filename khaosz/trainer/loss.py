"""Cross-entropy without all logits in memory.

Shapes: N tokens, D hidden width, V vocabulary, C tokens in a chunk.

A 64k vocabulary at 4,096 tokens is 1 GiB of fp32 logits, and autograd keeps two more copies. Here
a chunk's logits live only while its loss and its gradients are computed, both in the forward pass
(Liger kernel, Hsu et al. 2024, arXiv:2410.10989; Wijmans et al. 2024, arXiv:2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from khaosz.data.batches.batch import IGNORE, SHAPE_STEP
from khaosz.inference.linear.head import stored_nats
from khaosz.model import capped
from khaosz.model.frozen import StoredMatrix

# Logits of a chunk at most, for any vocabulary: 32 MB in fp32, of which a few copies live.
CHUNK_LOGITS = 1 << 23

ChunkLoss = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Loss sum (fp32 scalar) and its gradient by the logits (C, V) of one chunk.

    -log softmax(h W^T)[y], whose gradient is softmax(h W^T) - onehot(y).
    A row labelled `IGNORE` (padding, so that a compiled chunk has one shape) has no effect. `cap`:
    of logits, as in `capped`.
    """
    logits = capped((hidden @ weight.t()).float(), cap)  # (C, V)
    scored = labels != IGNORE
    top = logits.amax(-1, keepdim=True)
    exponentials = (logits - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    chosen = logits.gather(-1, labels.clamp_min(0)[:, None])
    loss = torch.where(scored[:, None], total.log() + top - chosen, 0.0).sum()
    vocabulary = torch.arange(weight.shape[0], device=weight.device)
    gradient = exponentials / total - (vocabulary == labels[:, None]).float()
    if cap is not None:
        gradient = gradient * (1 - (logits / cap).square())
    return loss, torch.where(scored[:, None], gradient, 0.0).to(hidden.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        inner: ChunkLoss,
        cap: float | None,
    ) -> Tensor:
        # The whole function runs outside autocast; hidden's dtype is the compute type.
        compute_weight = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_hidden, by_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if by_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if by_weight else None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            part_loss, gradient = inner(hidden[part], compute_weight, labels[part], cap)
            loss += part_loss
            if grad_hidden is not None:
                torch.mm(gradient, compute_weight, out=grad_hidden[part])
            if grad_weight is not None:
                if gradient.dtype == torch.float32:
                    grad_weight.addmm_(gradient.t(), hidden[part])
                else:
                    grad_weight += gradient.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads
        # In place: nothing else holds them, and the weight's is as large as the embedding.
        hidden = grad_hidden.mul_(scale) if ctx.needs_input_grad[0] else None
        weight = grad_weight.mul_(scale).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return hidden, weight, None, None, None, None


def missing_rows(count: int, chunk: int) -> int:
    """Rows of padding that make the last chunk a multiple of `SHAPE_STEP`, or whole."""
    last = count % chunk
    return min(-last % SHAPE_STEP, -last % chunk)


class _StoredCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: StoredMatrix, labels: Tensor, cap: float | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        nats, gradient = stored_nats(hidden, head, labels, cap, gradient=wanted)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return nats.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]).to(ctx.dtype), None, None, None


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor | StoredMatrix,
    labels: Tensor,
    *,
    chunk: int = 1024,
    dtype: torch.dtype = torch.float32,
    inner: ChunkLoss = chunk_loss,
    cap: float | None = None,
) -> Tensor:
    """Sum over scored positions of -log P(label): fp32 scalar.

    At most `chunk` tokens' logits exist together, fewer with a large vocabulary. hidden (..., D),
    weight (V, D), labels (...) with `IGNORE` where nothing is scored. Those positions are left out
    before the matrix product: selected, not multiplied, so that neither a NaN there nor their cost
    has an effect. Without scored positions the sum and its gradients are 0. The last chunk is
    padded with ignored rows to a multiple of `SHAPE_STEP`; for a compiled `inner` to a whole chunk,
    because every new shape would be compiled again. `cap`: of the model's logits. A `weight` in the
    format of a file is not trained.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    scored = targets != IGNORE
    if not bool(scored.all()):
        rows = scored.nonzero().squeeze(1)
        flat, targets = flat.index_select(0, rows), targets.index_select(0, rows)
    if not isinstance(weight, Tensor):
        with torch.autocast(hidden.device.type, enabled=False):
            return _StoredCrossEntropy.apply(flat.to(dtype), weight, targets, cap)
    chunk = min(chunk, max(1, CHUNK_LOGITS // weight.shape[0]))
    missing = missing_rows(len(targets), chunk) if inner is chunk_loss else -len(targets) % chunk
    if missing:
        flat = torch.cat((flat, flat.new_zeros(missing, flat.shape[1])))
        targets = torch.cat((targets, targets.new_full((missing,), IGNORE)))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(flat.to(dtype), weight, targets, chunk, inner, cap)
