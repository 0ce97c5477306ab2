"""Sampling as a pure function of logits.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from khaosz.errors import GenerationError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Raises `GenerationError` for a value out of range.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. `min_p` keeps
    tokens at least that share as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
    `repetition_penalty` is CTRL's (Keskar et al. 2019, arXiv:1909.05858) over prompt and output.
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = [
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("stop", all(self.stop), "strings that are not empty"),
        ]
        for name, fine, expected in rules:
            if not fine:  # a NaN compares false and lands here too
                raise GenerationError(f"{name} must be {expected} (got {getattr(self, name)!r})")


def filtered_logits(logits: Tensor, params: SamplingParams, seen: Tensor) -> Tensor:
    """Logits (V,) in fp32 after penalty, temperature, top-k, top-p and min-p, in that order;
    what is filtered out is -inf. Equal up to a constant, which no softmax sees. `seen` holds the
    token ids of prompt and output so far."""
    logits = logits.float()
    if params.repetition_penalty != 1.0 and len(seen):
        known = seen.unique()
        values = logits[known]
        penalty = params.repetition_penalty
        values = torch.where(values > 0, values / penalty, values * penalty)
        logits = logits.index_put((known,), values)
    if params.temperature == 0:
        return logits
    # Against the largest first: a temperature close to 0 must not overflow to inf - inf.
    logits = (logits - logits.max()) / max(params.temperature, 1e-6)
    if 0 < params.top_k < len(logits):
        least = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Cut what comes after the mass is reached; the likeliest token always stays.
        beyond = probabilities.cumsum(-1) - probabilities >= params.top_p
        beyond[0] = False
        logits = logits.index_put((order[beyond],), torch.tensor(-torch.inf, device=logits.device))
    if params.min_p > 0.0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
    return logits


def sample(
    logits: Tensor, params: SamplingParams, seen: Tensor, generator: torch.Generator | None = None
) -> int:
    """One token id from logits (V,). Greedy at temperature 0 (the lowest id among equals).

    Raises `GenerationError` for logits that are not finite: the weights are broken.
    """
    if not bool(logits.isfinite().all()):
        raise GenerationError(
            "the model's output is not finite",
            hint="its weights are broken, or overflow this dtype",
        )
    logits = filtered_logits(logits, params, seen)
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = logits.softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
