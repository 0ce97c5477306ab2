"""Continuous batching: add requests, step, take outputs.

Every step is one forward pass for all sequences: one token (or a draft) of each that is decoding,
and as much of the waiting prompts as fits the step's budget. Requests join and leave between steps.
The output of a sequence does not depend on its neighbours: bitwise with a deterministic runner,
within the kernels' rounding otherwise.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from itertools import count
from time import perf_counter

from torch import Tensor

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import GenerationError, KhaoszError
from khaosz.inference.adapter import Adapter
from khaosz.inference.grammar import Matcher, matcher_for
from khaosz.inference.prefix_cache import PrefixCache
from khaosz.inference.request import Output, Request, Sequence
from khaosz.inference.runner import Chunk, Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.memory.inference import pass_buffers, positions_in, sequence_bytes
from khaosz.memory.machine import memory_limits
from khaosz.model.kv_cache import SequenceCache

_log = logging.getLogger("khaosz.inference")
# Of running sequences together, and of cached prefixes, where the free memory is not known.
_CACHE_BYTES, _PREFIX_BYTES = 2 << 30, 512 << 20
# A new request waits for the pass that runs: one that reads prompts should take no longer, where
# another sequence is running, and where none is. Fewer tokens would read the weights too often.
_SHARED_SECONDS, _ALONE_SECONDS = 0.5, 2.0
_FEWEST_TOKENS = 64


class Engine:
    """Not thread-safe: one thread steps, others pass requests to it."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 32,
        step_tokens: int = 512,
        cache_bytes: int | None = None,
        prefix_bytes: int | None = None,
        context: int | None = None,
        prompt_lookup: bool = False,
        lookup: bool = False,
    ) -> None:
        """`step_tokens` bounds a pass, so that a long prompt is taken in parts between tokens of
        answers; a slow machine takes fewer, down to 64. `cache_bytes` bounds the keys and values of
        running sequences, by default what the machine has free when a request comes;
        `prefix_bytes` those of cached prefixes, by default one sequence that fills the context, at
        most half of that memory; `context` bounds the tokens of prompt and answer below the
        model's own; `prompt_lookup` (old name: `lookup`) drafts tokens from the prompt: the same
        output, often sooner."""
        if tokenizer.vocab_size > runner.config.vocab_size:
            raise GenerationError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only"
                f" {runner.config.vocab_size}",
                hint="use the tokenizer the model was trained with",
            )
        assert step_tokens >= 1 and max_batch >= 1, (step_tokens, max_batch)
        self.runner, self.tokenizer = runner, tokenizer
        own = runner.config.max_position_embeddings
        self.context = own if context is None else min(context, own)
        self.end_ids = set(tokenizer.end_ids)
        self.max_batch, self.step_tokens = max_batch, step_tokens
        self.cache_bytes, self.prompt_lookup = cache_bytes, prompt_lookup or lookup
        self._follows_memory = cache_bytes is None and prefix_bytes is None
        self.prefixes = PrefixCache(_PREFIX_BYTES if prefix_bytes is None else prefix_bytes)
        self._waiting: deque[Request] = deque()
        self._running: list[Sequence] = []
        self._outputs: deque[Output] = deque()
        self._ids = count()
        self._seconds = 0.0  # for each token of a pass that reads prompts

    # ------------------------------------------------------------ requests: add, cancel, step, take

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        prompt_lookup: bool | None = None,
        adapter: Adapter | None = None,
        matcher: Matcher | None = None,
    ) -> int:
        """Queue a request and return its id. `adapter` adds its weights to the model's; `matcher`
        is `matcher_for` of these parameters, where it exists already (a large grammar takes a
        while). Raises `GenerationError` as `check` does, and for a grammar that can't be used."""
        self.check(prompt, params)
        if matcher is None:
            matcher = matcher_for(params, self.tokenizer)
        drafts = self.prompt_lookup if prompt_lookup is None else prompt_lookup
        request = Request(
            next(self._ids), list(prompt), params, drafts and matcher is None, matcher, adapter
        )
        self._waiting.append(request)
        return request.id

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises `GenerationError` for a prompt that is empty, has ids outside the vocabulary,
        fills the context or could never fit the cache. A prompt is never truncated."""
        if not len(prompt):
            raise GenerationError("the prompt is empty")
        if len(prompt) >= self.context:
            longer = self.context < self.runner.config.max_position_embeddings
            raise GenerationError(
                self.too_long(len(prompt)),
                hint="shorten the prompt" + (", or allow a longer context" if longer else ""),
            )
        last = self.tokenizer.vocab_size - 1
        if not all(0 <= token <= last for token in prompt):
            raise GenerationError(f"has token ids outside 0 to {last}", param="prompt")
        if not all(0 <= token <= last for token in params.logit_bias):
            raise GenerationError(f"has token ids outside 0 to {last}", param="logit_bias")
        need, room = params.n * self._need(len(prompt), params), self._cache_room()
        if room is not None and need > room:
            fitting = positions_in(self.runner.config, self.runner.cache_dtype, room // params.n)
            raise GenerationError(
                f"{len(prompt)} tokens and {params.n} x {params.max_tokens} of answer need"
                f" {need >> 20} MB of cache, only {room >> 20} are available",
                hint=f"request fewer tokens: {fitting:,} of prompt and answer together fit",
            )

    def too_long(self, length: int) -> str:
        """What is wrong with a prompt of so many tokens."""
        own = self.runner.config.max_position_embeddings
        context = f"the model's context is {self.context}"
        if self.context < own:
            context = f"the context is {self.context} of the model's {own:,}"
        return f"the prompt has {length} tokens, {context}"

    def cancel(self, request_id: int) -> None:
        """Stop a request at once, also in the middle of its prompt; unknown or finished ones are
        ignored."""
        for request in [r for r in self._waiting if r.id == request_id]:
            self._waiting.remove(request)
            self._cancelled(request, range(request.params.n))
        for sequence in [s for s in self._running if s.request.id == request_id]:
            self._cancelled(sequence.request, range(1, sequence.choices))
            rest, _ = sequence.text.finish()
            self._leave(sequence, sequence.output(rest, reason="cancelled"))

    def _cancelled(self, request: Request, choices: range) -> None:
        """Last outputs of choices that never started."""
        self._outputs.extend(
            Output(request.id, choice, "", (), 0, len(request.prompt), 0, (), "cancelled")
            for choice in choices
        )

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> None:
        """At most one forward pass for all running sequences."""
        self._admit()
        planned = list(self._plan())
        if not planned:
            return
        started = perf_counter()
        logits = self.runner.run([chunk for _, chunk in planned])
        tokens = sum(len(chunk.ids) for _, chunk in planned)
        if tokens >= _FEWEST_TOKENS:
            each = (perf_counter() - started) / tokens
            self._seconds = (self._seconds + each) / 2 if self._seconds else each
        for (sequence, chunk), rows in zip(planned, logits, strict=True):
            if chunk.want:
                self._answer(sequence, rows)

    def take(self, request_id: int | None = None) -> list[Output]:
        """Outputs since the last call, oldest first; of one request, or of all."""
        mine = [o for o in self._outputs if request_id in (None, o.request_id)]
        self._outputs = deque(o for o in self._outputs if request_id not in (None, o.request_id))
        return mine

    def weights_changed(self) -> None:
        """Clear cached prefixes, which belong to the old weights. No sequence may be running."""
        assert not self.unfinished, "weights changed under running sequences"
        self.prefixes.clear()

    # ------------------------------------------------------------------------------------ schedule

    def _need(self, prompt: int, params: SamplingParams) -> int:
        """Bytes of cache that one choice may take, with the room it reserves ahead."""
        positions = min(prompt + params.max_tokens, self.context)
        runner = self.runner
        return sequence_bytes(runner.config, runner.cache_dtype, positions, self.context)

    def _cache_room(self) -> int | None:
        """Bytes that the caches of running sequences may take together: what they and the prefixes
        have, and what is free beside the buffers of a pass. None where that is not known."""
        if self.cache_bytes is not None:
            return self.cache_bytes
        runner = self.runner
        limits = memory_limits(runner.device)
        if not limits:
            return None
        spare = pass_buffers(runner.config, runner.dtype, self.step_tokens, self.context)
        held = self.prefixes.nbytes + sum(each.cache.nbytes for each in list(self._running))
        return held + max(0, min(limit.free for limit in limits) - spare)

    def _admit(self) -> None:
        """Start requests in order, while batch and cache have room for all their choices."""
        choices = sum(s.choices for s in self._running)
        reserved = sum(
            s.choices * self._need(len(s.request.prompt), s.request.params) for s in self._running
        )
        room = self._cache_room() if self._waiting else None
        most = _CACHE_BYTES if room is None else room
        while self._waiting:
            request = self._waiting[0]
            choices += request.params.n
            reserved += request.params.n * self._need(len(request.prompt), request.params)
            if self._running and (choices > self.max_batch or reserved > most):
                return
            self._waiting.popleft()
            adapter = request.adapter
            running = ((s.ids, s.cache) for s in self._running if s.request.adapter is adapter)
            prefix = self.prefixes.take(request.prompt, running, adapter)
            cache = prefix or self.runner.new_cache(self.context)
            if room is not None and self._follows_memory:
                self.prefixes.shrink(max(0, room - reserved))
            cache.reserve(len(request.prompt))  # known: growing chunk by chunk would copy it
            self._running.append(self._start(request, 0, cache))

    def _start(self, request: Request, choice: int, cache: SequenceCache) -> Sequence:
        return Sequence.start(request, choice, cache, self.tokenizer, self.context)

    def _budget(self) -> int:
        """Tokens of a pass: `step_tokens`, or the power of two that the measured rate allows."""
        seconds = _SHARED_SECONDS if len(self._running) > 1 else _ALONE_SECONDS
        if self._seconds * self.step_tokens <= seconds:
            return self.step_tokens
        allowed = max(_FEWEST_TOKENS, int(seconds / self._seconds))
        return min(self.step_tokens, 1 << (allowed.bit_length() - 1))

    def _plan(self) -> Iterator[tuple[Sequence, Chunk]]:
        """Decoding first, so that a long prompt delays no answer; then prompts, oldest first, but
        short ones before long ones in up to half of a pass."""
        budget = self._budget()
        for sequence in self._running:
            if sequence.generated:
                # More than one is pending where a recurrent state went back further.
                ids = sequence.ids[sequence.cache.length :]
                room = min(sequence.limit - sequence.generated - 1, budget - len(ids))
                if sequence.prompt_lookup is not None and room > 0:
                    sequence.draft = sequence.prompt_lookup.propose()[:room]
                want = 1 + len(sequence.draft)
                ids += sequence.draft
                budget -= len(ids)
                yield sequence, Chunk(ids, sequence.cache, want, sequence.request.adapter)
        prompts = [sequence for sequence in self._running if not sequence.generated]
        short, room = set(), budget // 2
        for sequence in prompts:
            if sequence.pending <= room:
                room -= sequence.pending
                short.add(id(sequence))
        for sequence in sorted(prompts, key=lambda each: id(each) not in short):
            if budget <= 0:
                return
            first = sequence.cache.length
            ids = sequence.ids[first : first + budget]
            budget -= len(ids)
            done = first + len(ids) == len(sequence.ids)
            adapter = sequence.request.adapter
            yield sequence, Chunk(ids, sequence.cache, int(done), adapter)

    # -------------------------------------------------------------------------------------- answer

    def _answer(self, sequence: Sequence, rows: Tensor) -> None:
        # Rows beyond the tokenizer's vocabulary are padding.
        rows = rows[:, : self.tokenizer.vocab_size]
        choices = [sequence]
        if not sequence.generated and sequence.choice == 0:
            for choice in range(1, sequence.request.params.n):
                cache = sequence.cache.fork(sequence.cache.length)
                other = self._start(sequence.request, choice, cache)
                other.cached_tokens = sequence.cached_tokens
                choices.append(other)
                self._running.append(other)
        for each in choices:
            try:
                output = each.advance(rows, self.end_ids)
            except GenerationError as error:
                output = each.output(reason="error", error=error)
            except Exception:  # whatever it is, the other answers continue
                _log.exception("an answer failed")
                failed = KhaoszError("the answer failed", hint="see the log")
                output = each.output(reason="error", error=failed)
            if output.finish_reason is not None:
                self._leave(each, output)
            elif output.text or output.token_ids:
                self._outputs.append(output)

    def _leave(self, sequence: Sequence, output: Output) -> None:
        self._running.remove(sequence)
        self._outputs.append(output)
        if output.finish_reason != "error" and sequence.choice == 0:
            if self._follows_memory and (room := self._cache_room()) is not None:
                runner = self.runner
                whole = sequence_bytes(
                    runner.config, runner.cache_dtype, self.context, self.context
                )
                self.prefixes.max_bytes = min(max(_PREFIX_BYTES, whole), room // 2)
            self.prefixes.put(sequence.ids, sequence.cache, sequence.request.adapter)
