"""Sampling as a pure function of logits, counts, seed, position and token ids.

Shapes: V vocabulary, S surviving candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from khaosz.errors import GenerationError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP = 1024  # characters of a stop string: all are searched at every token
MAX_BIASES = 1024
_LIKELY = 1024  # candidates a filter looks at first, before it sorts the whole vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Raises `GenerationError` for a value out of range.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `typical_p` 1 switch those filters off.
    `min_p` keeps tokens at least that share as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082); `typical_p` the mass closest to the entropy (Meister et al. 2022,
    arXiv:2202.00666). `repetition_penalty` is CTRL's (Keskar et al. 2019, arXiv:1909.05858) over
    prompt and output; `presence_penalty` and `frequency_penalty` are OpenAI's, over the output.
    `logit_bias` adds to single tokens. `n` choices share one prompt. `logprobs` asks for that many
    alternatives beside each token's own log-probability. `thinking_budget` bounds the tokens of the
    model's thoughts; then they are closed, and the answer follows. `seed` (64 bits) fixes the
    answer; without one each request has another. `json_schema` (a JSON text), `regex` or `lark` (a
    grammar in llguidance's syntax) constrains the output.
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    lark: str | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        biases = self.logit_bias.values()
        rules = [
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            (
                "logit_bias",
                len(self.logit_bias) <= MAX_BIASES and all(-100 <= b <= 100 for b in biases),
                f"at most {MAX_BIASES} values between -100 and 100",
            ),
            (
                "seed",
                self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 2**64),
                "a whole number between 0 and 2**64 - 1",
            ),
            ("n", 1 <= self.n <= MAX_CHOICES, f"between 1 and {MAX_CHOICES}"),
            (
                "stop",
                len(self.stop) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP for s in self.stop),
                f"at most {MAX_STOPS} strings of 1 to {MAX_STOP} characters",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"between 0 and {MAX_LOGPROBS}",
            ),
            (
                "thinking_budget",
                self.thinking_budget is None or self.thinking_budget >= 0,
                ">= 0",
            ),
            (
                "regex",
                sum(form is not None for form in (self.json_schema, self.regex, self.lark)) <= 1,
                "omitted when another constraint is given",
            ),
        ]
        for name, fine, expected in rules:
            if not fine:  # a NaN compares false and lands here too
                got = getattr(self, name)
                raise GenerationError(f"must be {expected} (got {got!r})", param=name)

    @property
    def form(self) -> tuple[str, str] | None:
        """The constraint on the output: its kind and its text."""
        forms = {"json_schema": self.json_schema, "regex": self.regex, "lark": self.lark}
        return next(((name, text) for name, text in forms.items() if text is not None), None)


class TokenCounts:
    """Token counts of a sequence for penalties, updated token by token at a constant cost."""

    def __init__(self, vocab_size: int, prompt: Sequence[int]) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool)  # in prompt or output
        self.output = torch.zeros(vocab_size)  # times in the output
        self.seen[torch.tensor(prompt, dtype=torch.long)] = True

    def add(self, token: int) -> None:
        self.seen[token] = True
        self.output[token] += 1


def needs_counts(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def adjusted_logits(logits: Tensor, params: SamplingParams, counts: TokenCounts | None) -> Tensor:
    """Logits (V,) in fp32 after bias and penalties; the input is not modified."""
    logits = logits.float()
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        values = torch.tensor(list(params.logit_bias.values()), device=logits.device)
        logits = logits.index_add(0, ids, values.float())
    if counts is None:
        return logits
    if params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(counts.seen.to(logits.device), lowered, logits)
    if params.presence_penalty or params.frequency_penalty:
        output = counts.output.to(logits.device)
        lower = params.frequency_penalty * output + params.presence_penalty * (output > 0)
        logits = logits - lower
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """What top-k, top-p, min-p and typical-p, in that order, keep of adjusted logits (V,) at a
    temperature above 0: logits (S,), equal up to a constant, and their ids (S,), None for all."""
    # Minus the largest first: a temperature close to 0 must not overflow to inf - inf.
    logits = (logits - logits.max()) / max(params.temperature, 1e-6)
    ids: Tensor | None = None
    if 0 < params.top_k < len(logits):
        least = logits.topk(params.top_k).values[-1]
        ids = (logits >= least).nonzero().squeeze(1)  # ties at the threshold all stay
        logits = logits[ids]
    if params.top_p < 1.0:
        ordered, order = _likeliest(logits, params.top_p)
        mass = (ordered - logits.logsumexp(0)).exp()
        # Cut what comes after the mass is reached; the likeliest token always stays.
        keep = mass.cumsum(-1) - mass < params.top_p
        keep[0] = True
        order = order[keep]
        logits, ids = logits[order], order if ids is None else ids[order]
    if params.min_p > 0.0:
        index = (logits >= logits.max() + float(np.log(params.min_p))).nonzero().squeeze(1)
        logits, ids = logits[index], index if ids is None else ids[index]
    if params.typical_p < 1.0:
        log_probabilities = logits.log_softmax(0)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).nan_to_num().sum()
        order = (-log_probabilities - entropy).abs().argsort(stable=True)
        mass = probabilities[order]
        keep = mass.cumsum(-1) - mass < params.typical_p
        keep[0] = True
        order = order[keep]
        logits, ids = logits[order], order if ids is None else ids[order]
    return logits, ids


def _likeliest(logits: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Logits, largest first, and their indices: as many as hold `mass`, or all of them."""
    if len(logits) > _LIKELY:
        values, places = logits.topk(_LIKELY)
        # The threshold itself must be inside, with a margin for rounding.
        if float((values - logits.logsumexp(0)).exp().sum()) > mass + 1e-3:
            return values, places
    return logits.sort(descending=True, stable=True)


def filtered_logits(
    logits: Tensor, params: SamplingParams, counts: TokenCounts | None = None
) -> Tensor:
    """The whole (V,) distribution that `sample` draws from, as logits; -inf is filtered out. At
    temperature 0 the adjusted logits, whose largest is taken."""
    logits = adjusted_logits(logits, params, counts)
    if params.temperature == 0:
        return logits
    left, ids = candidates(logits, params)
    if ids is None:
        return left
    return torch.full_like(logits, -torch.inf).index_put((ids,), left)


def sample(
    logits: Tensor,
    params: SamplingParams,
    counts: TokenCounts | None,
    noise: GumbelNoise,
    position: int,
) -> int:
    """One token id from logits (V,), the next one of a sequence of `position` tokens: that with the
    largest sum of its logit and its Gumbel noise, which has exactly the probability of the softmax
    (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). A rounding difference in the logits
    changes the token only where the two largest sums are as close as the difference. Inversion of
    the cumulative distribution would move every token after the ones that differ.

    Greedy at temperature 0 (the lowest id among equals). Raises `GenerationError` for logits that
    are not finite: the weights are broken.
    """
    # The extremes suffice: NaN spreads to both, and -inf is what a grammar forbids.
    low, high = logits.aminmax()
    if not (bool(high.isfinite()) and not bool(low.isnan()) and float(low) < float("inf")):
        raise GenerationError(
            "the model's output is not finite",
            hint="its weights are broken, or overflow this dtype",
        )
    logits = adjusted_logits(logits, params, counts)
    if params.temperature == 0:
        return int(logits.argmax())
    left, ids = candidates(logits, params)
    numbers = np.arange(len(left)) if ids is None else ids.cpu().numpy()
    place = int((left.double() + noise.at(position, numbers).to(left.device)).argmax())
    return place if ids is None else int(ids[place])


_GAMMA = 0x9E3779B97F4A7C15


class GumbelNoise:
    """Standard Gumbel numbers that depend on (seed, choice, position, token id) alone, so batching,
    caches, filters, speculation and restarts can't shift them. Only integer arithmetic precedes the
    logarithms, so all platforms agree.

    A counter-based generator (Salmon et al. 2011): SplitMix64 (Steele, Lea and Flood 2014), whose
    n-th output is a hash of its key and n, with a key for each position.
    """

    def __init__(self, seed: int | None, choice: int) -> None:
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        self._key = _hashed(np.array([seed], np.uint64), choice)

    def at(self, position: int, ids: np.ndarray) -> Tensor:
        """fp64 (S,) for token ids (S,), as candidates for `position`."""
        bits = _hashed(_hashed(self._key, position), ids)
        # 52 bits and a half: exact in fp64, never 0 or 1. From -3.6 to 36.7.
        uniform = torch.from_numpy(((bits >> np.uint64(12)) + 0.5) * 2.0**-52)
        return uniform.log_().neg_().log_().neg_()


def _hashed(key: np.ndarray, counter: int | np.ndarray) -> np.ndarray:
    """uint64: output `counter` of SplitMix64 with the state `key` (1,)."""
    x = np.atleast_1d(np.asarray(counter, np.uint64)) + np.uint64(1)
    x *= np.uint64(_GAMMA)
    x += key
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
