"""What the engine works on: requests, running sequences and outputs."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from torch import Tensor

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import KhaoszError
from khaosz.inference.adapter import Adapter
from khaosz.inference.grammar import Matcher
from khaosz.inference.prompt_lookup import PromptLookup
from khaosz.inference.sampling import (
    GumbelNoise,
    SamplingParams,
    TokenCounts,
    needs_counts,
    sample,
)
from khaosz.inference.text_stream import TextStream
from khaosz.inference.thoughts import ThoughtLimit
from khaosz.model.kv_cache import SequenceCache


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of a token by the model itself, before any sampling parameter, and
    of the likeliest alternatives."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What became final since the previous output of this choice. The last one has a
    `finish_reason`: "stop", "length", "cancelled" or "error"; `stop`: the stop string that was
    met."""

    request_id: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    generated: int  # tokens so far, the one that ends the turn included
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in a cache
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    error: KhaoszError | None = None
    stop: str | None = None


@dataclass
class Request:
    id: int
    prompt: list[int]
    params: SamplingParams
    prompt_lookup: bool
    matcher: Matcher | None = None
    adapter: Adapter | None = None


@dataclass
class Sequence:
    """One choice of one request. `ids` are prompt and output; the cache is behind them by what
    is still to be computed."""

    request: Request
    choice: int
    cache: SequenceCache
    ids: list[int]
    text: TextStream
    noise: GumbelNoise
    counts: TokenCounts | None
    matcher: Matcher | None
    prompt_lookup: PromptLookup | None
    limit: int  # tokens it may generate
    thoughts: ThoughtLimit | None = None
    cached_tokens: int = 0
    generated: int = 0
    draft: list[int] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        request: Request,
        choice: int,
        cache: SequenceCache,
        tokenizer: Tokenizer,
        context: int,
    ) -> Sequence:
        params = request.params
        counts = None
        if needs_counts(params):
            counts = TokenCounts(tokenizer.vocab_size, request.prompt)
        thoughts = None
        if params.thinking_budget is not None and request.matcher is None:
            thoughts = ThoughtLimit(tokenizer, params.thinking_budget, request.prompt)
        return cls(
            request=request,
            choice=choice,
            cache=cache,
            ids=list(request.prompt),
            text=TextStream(tokenizer, params.stop, after=request.prompt),
            noise=GumbelNoise(params.seed, choice),
            counts=counts,
            matcher=None if request.matcher is None else request.matcher.copy(),
            prompt_lookup=PromptLookup(request.prompt) if request.prompt_lookup else None,
            limit=min(params.max_tokens, context - len(request.prompt)),
            thoughts=thoughts,
            cached_tokens=cache.length,
        )

    @property
    def choices(self) -> int:
        """The first stands for all choices of its request until the prompt they share is done."""
        return self.request.params.n if self.choice == self.generated == 0 else 1

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not cached yet."""
        return len(self.ids) - self.cache.length

    def advance(self, logits: Tensor, ends: Ids[int] | set[int]) -> Output:
        """Choose tokens from logits (1 + draft, V): one, and one more for every accepted draft
        token. The cache drops rejected drafts."""
        chosen: list[int] = []
        logprobs: list[Logprob] = []
        text, reason = "", None
        accepted = 0
        for row, following in zip(logits, [*self.draft, None], strict=True):
            token = self._choose(row)
            if self.request.params.logprobs is not None:
                logprobs.append(logprob(row, token, self.request.params.logprobs))
            chosen.append(token)
            piece, reason = self._push(token, ends)
            text += piece
            if reason is not None or token != following:
                break
            accepted += 1
        if self.draft and self.prompt_lookup is not None:
            self.prompt_lookup.judge(len(self.draft), accepted)
        self.draft = []
        # All drafts have keys and values by now; drop those of rejected tokens.
        self.cache.truncate(min(self.cache.length, len(self.ids) - 1))
        if self.prompt_lookup is not None:
            self.prompt_lookup.extend(chosen)
        return self.output(text, chosen, logprobs, reason)

    def _choose(self, logits: Tensor) -> int:
        if self.thoughts is not None and (forced := self.thoughts.forced()) is not None:
            self.thoughts.add(forced)
            return forced
        if self.matcher is not None:
            logits = self.matcher.mask(logits)
        # By position in the whole sequence: an answer continued with its seed has the same noise.
        token = sample(logits, self.request.params, self.counts, self.noise, len(self.ids))
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.thoughts is not None:
            self.thoughts.add(token)
        return token

    def _push(self, token: int, ends: Ids[int] | set[int]) -> tuple[str, str | None]:
        self.ids.append(token)
        self.generated += 1
        if self.counts is not None:
            self.counts.add(token)
        if token in ends:
            text, _ = self.text.finish()
            return text, "stop"
        text, stopped = self.text.push(token)
        if stopped:
            return text, "stop"
        if self.generated >= self.limit:
            rest, stopped = self.text.finish()
            return text + rest, "stop" if stopped else "length"
        return text, None

    def output(
        self,
        text: str = "",
        chosen: Ids[int] = (),
        logprobs: Ids[Logprob] = (),
        reason: str | None = None,
        error: KhaoszError | None = None,
    ) -> Output:
        return Output(
            request_id=self.request.id,
            choice=self.choice,
            text=text,
            token_ids=tuple(chosen),
            generated=self.generated,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            logprobs=tuple(logprobs),
            finish_reason=reason,
            error=error,
            stop=self.text.stop,
        )


def logprob(logits: Tensor, token: int, top: int) -> Logprob:
    """Of logits (V,) as the model gave them."""
    values = logits.log_softmax(0)
    best = values.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Logprob(token, float(values[token]), tuple(pairs))
