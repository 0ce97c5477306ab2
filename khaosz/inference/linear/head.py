"""Cross-entropy through a head that stays in the format of a file.

Shapes: N tokens, D hidden width, V vocabulary, R rows of the head at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from khaosz.model.frozen import StoredMatrix

_LOGITS = 1 << 23  # of all tokens and R rows: 32 MB in fp32


def stored_nats(
    hidden: Tensor,
    head: StoredMatrix,
    targets: Tensor,
    cap: float | None = None,
    *,
    gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """-log softmax(h W^T)[y] (N,) in fp32, and with `gradient` that of its sum by h, fp32 (N, D).

    Rows of W are dequantised R at a time and once: as in attention (Milakov & Gimelshein 2018,
    arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), sums over V are kept relative to the
    largest logit so far. `hidden` (N, D) is in the compute type; `cap` as in `capped`.
    """
    count, width = hidden.shape
    vocabulary = head.shape[0]
    step = min(vocabulary, max(256, _LOGITS // max(count, width)))
    top = hidden.new_full((count, 1), -torch.inf, dtype=torch.float32)
    total, chosen = torch.zeros_like(top), torch.zeros_like(top)
    mean = hidden.new_zeros(count, width, dtype=torch.float32) if gradient else None
    for start in range(0, vocabulary, step):
        weight = head.dense(hidden.dtype, start, start + step)
        logits = (hidden @ weight.t()).float()  # (N, R)
        slope = None
        if cap is not None:
            logits = torch.tanh(logits / cap)
            slope = 1 - logits.square()
            logits *= cap
        here = (targets >= start) & (targets < start + len(weight))
        column = (targets - start).clamp(0, len(weight) - 1)[:, None]
        chosen = torch.where(here[:, None], logits.gather(1, column), chosen)
        before, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        rescale = (before - top).exp()
        exponentials = logits.sub_(top).exp_()
        total = total * rescale + exponentials.sum(1, keepdim=True)
        if mean is not None:
            exponentials = exponentials if slope is None else exponentials * slope
            mean.mul_(rescale).add_((exponentials.to(hidden.dtype) @ weight).float())
    nats = (total.log() + top - chosen).squeeze(1)
    if mean is None:
        return nats, None
    right = head.rows(targets)
    if cap is not None:
        right = right * (1 - (chosen / cap).square())
    return nats, mean.div_(total).sub_(right)
