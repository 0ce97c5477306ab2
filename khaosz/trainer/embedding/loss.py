"""InfoNCE (van den Oord et al. 2018, arXiv:1807.03748), and the ranks that retrieval is judged by.

Shapes: Q queries, P distinct passages, D width. Vectors are of length 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    queries: Tensor,
    passages: Tensor,
    positive: Tensor,
    answers: Tensor,
    temperature: float,
    *,
    symmetric: bool = False,
) -> Tensor:
    """Loss of each query (Q,): every passage of the batch that does not answer it is a negative.

        L_i = -log( exp(q_i . p_i / t) / sum_j exp(q_i . p_j / t) ),   j over p_i and the negatives

    queries (Q, D), passages (P, D), positive (Q,) int64: p_i. answers (Q, P) bool: passages that
    answer the query in any record; all but p_i are left out of the sum, since they would be false
    negatives. `symmetric`: the mean of that and of the same from p_i to the queries, those that
    p_i answers left out (CLIP, Radford et al. 2021, arXiv:2103.00020).
    """
    scores = queries @ passages.t() / temperature
    rows = torch.arange(len(scores), device=scores.device)
    own = scores[rows, positive]
    chosen = F.one_hot(positive, len(passages)).bool()
    # Selected, not multiplied: a NaN that is masked stays out.
    loss = scores.masked_fill(answers & ~chosen, -torch.inf).logsumexp(1) - own
    if not symmetric:
        return loss
    back, answered = scores[:, positive].t(), answers[:, positive].t()  # (Q, Q): p_i with q_j
    others = answered & (rows[:, None] != rows)
    return (loss + back.masked_fill(others, -torch.inf).logsumexp(1) - own) / 2


def ranks(queries: Tensor, passages: Tensor, positive: Tensor, answers: Tensor) -> Tensor:
    """Where each query (Q,) finds its passage, from 1: int64. Other passages that answer it are
    left out. One that scores the same stands before it, so that vectors which are all alike are
    no success."""
    scores = queries @ passages.t()
    own = scores.gather(1, positive[:, None])
    others = ~answers & (scores >= own)
    return 1 + others.scatter(1, positive[:, None], False).sum(1)
