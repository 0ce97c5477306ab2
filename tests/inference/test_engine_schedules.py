"""Any schedule of requests: everyone is answered as if alone, and nothing is left behind."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT, random_model, tokenizer

from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.inference.request import Output
from khaosz.inference.runner import Chunk, Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.model.kv_cache import SequenceCache

torch.set_num_threads(1)

MODEL = random_model(tokenizer().vocab_size)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=7, logprobs=1)
PROMPTS = [
    [20, 21, 22, 23, 24, 25, 26, 27, 28, 29],
    [20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33],  # shares nine tokens with the first
    [60, 61, 60, 61, 60, 61, 60],
    [7],
    list(range(40, 80)),
]
KINDS = [
    GREEDY,
    SAMPLED,
    replace(SAMPLED, n=3, seed=1),
    replace(SAMPLED, stop=("e", "th", "春"), frequency_penalty=0.5),
    replace(GREEDY, repetition_penalty=1.3, max_tokens=70),
]
Told = tuple[list[int], list[tuple[int, float]], str, str | None]


def runner() -> Runner:
    return Runner.from_module(MODEL, deterministic=True)


def summary(outputs: list[Output], request_id: int, choice: int) -> Told:
    mine = [o for o in outputs if (o.request_id, o.choice) == (request_id, choice)]
    assert [o.finish_reason is None for o in mine] == [True] * (len(mine) - 1) + [False], mine
    tokens = [token for o in mine for token in o.token_ids]
    assert mine[-1].generated == len(tokens), "usage"
    return (
        tokens,
        [(p.token, p.value) for o in mine for p in o.logprobs],
        "".join(o.text for o in mine),
        mine[-1].finish_reason,
    )


@cache
def alone(prompt: int, kind: int) -> list[Told]:
    by = Engine(runner(), tokenizer(), prefix_bytes=0)
    request_id, outputs = by.add(PROMPTS[prompt], KINDS[kind]), []
    while by.unfinished:
        by.step()
        outputs += by.take()
    return [summary(outputs, request_id, choice) for choice in range(KINDS[kind].n)]


def live_caches() -> int:
    """Without a collection: what waits for one is held too long already."""
    return sum(type(thing) is SequenceCache for thing in gc.get_objects())


arrivals = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, len(KINDS) - 1),
    st.booleans(),  # prompt lookup
    st.integers(0, 15),  # steps before the next one comes
    st.none() | st.integers(0, 5),  # which of the requests so far is then cancelled
)


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.lists(arrivals, min_size=1, max_size=6),
    step_tokens=st.sampled_from([1, 7, 512]),
    max_batch=st.sampled_from([1, 3, 8]),
    prefix_bytes=st.sampled_from([0, 60_000, 1 << 20]),
)
def test_random_schedules(
    schedule: list[Any], step_tokens: int, max_batch: int, prefix_bytes: int
) -> None:
    before = live_caches()
    by = Engine(
        runner(),
        tokenizer(),
        step_tokens=step_tokens,
        max_batch=max_batch,
        prefix_bytes=prefix_bytes,
        cache_bytes=300_000,
    )
    outputs: list[Output] = []
    invoked: list[tuple[int, int, int]] = []
    cancelled: set[int] = set()

    def step() -> None:
        by.step()
        outputs.extend(by.take())
        assert sum(s.cache.nbytes for s in by._running) <= by.cache_bytes
        assert len(by._running) <= max(max_batch, *(s.request.params.n for s in by._running), 0)
        assert by.prefixes.nbytes <= prefix_bytes

    for prompt, kind, lookup, steps, cancel in schedule:
        invoked.append((by.add(PROMPTS[prompt], KINDS[kind], prompt_lookup=lookup), prompt, kind))
        for _ in range(steps):
            step()
        if cancel is not None and cancel < len(invoked):
            by.cancel(invoked[cancel][0])
            cancelled.add(invoked[cancel][0])
            outputs.extend(by.take())
    while by.unfinished:
        step()
    for request_id, prompt, kind in invoked:
        for choice, expected in enumerate(alone(prompt, kind)):
            output = summary(outputs, request_id, choice)
            if output[3] == "cancelled":
                assert request_id in cancelled
                assert output[0] == expected[0][: len(output[0])]
            else:
                assert output == expected
    assert live_caches() - before == len(by.prefixes._entries)


def test_cancelling_a_prompt_ends_every_choice() -> None:
    for steps in (0, 1, 8):  # waiting, in the prompt, answering
        by = Engine(runner(), tokenizer(), step_tokens=7)
        request_id = by.add(PROMPTS[4], KINDS[2])
        for _ in range(steps):
            by.step()
        by.cancel(request_id)
        ended = [o.choice for o in by.take() if o.finish_reason == "cancelled"]
        assert sorted(ended) == [0, 1, 2] and not by.unfinished


def test_decoding_is_scheduled_before_prompts() -> None:
    by = Engine(runner(), tokenizer(), step_tokens=4)
    first = by.add([7], GREEDY)
    by.step()
    by.take()
    by.add(PROMPTS[4], GREEDY)
    for _ in range(8):  # the prompt of forty tokens takes longer than that
        by.step()
        assert [o.request_id for o in by.take()] == [first]


def test_short_prompts_share_a_step() -> None:
    by = Engine(runner(), tokenizer())
    ids = [by.add(prompt, GREEDY) for prompt in PROMPTS[:3]]
    by.step()
    assert [o.request_id for o in by.take()] == ids


def test_choices_count_for_batch_before_they_fork() -> None:
    by = Engine(runner(), tokenizer(), max_batch=4)
    for _ in range(3):
        by.add(PROMPTS[0], KINDS[2])
    by.step()
    assert [s.choice for s in by._running] == [0, 1, 2]


def test_unread_stream_computes_nothing() -> None:
    generator = Generator(runner(), tokenizer())
    pieces = generator.stream(PROMPTS[0], GREEDY)
    assert not generator.engine.unfinished
    del pieces
    left = generator.stream(PROMPTS[0], GREEDY)
    next(left)
    assert generator.engine.unfinished
    left.close()
    assert not generator.engine.unfinished and not generator.engine.take()


def test_repeated_prompt_is_cached_once() -> None:
    by = Engine(runner(), tokenizer())
    ((whole, *_),) = alone(4, 0)
    for most in (12, 12, 2, 12):  # an answer cut short is the beginning of what is there
        by.add(PROMPTS[4], replace(GREEDY, max_tokens=most))
        while by.unfinished:
            by.step()
        (stored,) = by.prefixes._entries.values()
        assert len(stored.ids) == len(PROMPTS[4]) + len(whole) - 1


def test_rejected_draft_leaves_cache_unchanged() -> None:
    """The next step must not see keys and values of tokens that were not chosen."""
    by = Engine(runner(), tokenizer(), prompt_lookup=True)
    # Few tokens to choose from: pairs come again, and what follows them is often another one.
    bias = {token: 12.0 for token in (60, 61, 62)}
    by.add(PROMPTS[2], replace(SAMPLED, max_tokens=24, logit_bias=bias))
    drafted = 0
    while by.unfinished:
        by.step()
        for sequence in by._running:
            assert sequence.prompt_lookup is not None
            drafted = max(
                drafted, sequence.prompt_lookup._drafted - sequence.prompt_lookup._accepted
            )
            assert sequence.cache.length == len(sequence.ids) - 1
            fresh = by.runner.new_cache()
            by.runner.run([Chunk(sequence.ids[:-1], fresh, 0)])
            length = fresh.length
            for computed, saved in zip(fresh._stores, sequence.cache._stores, strict=True):
                assert torch.equal(computed[:, :length], saved[:, :length])
    assert drafted, "no draft was wrong"


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_two_continuations_of_one_conversation(params: SamplingParams) -> None:
    """The first takes the kept cache over; the second must not write into the same one."""
    by = Engine(runner(), tokenizer())
    request_id = by.add(PROMPTS[4], params)
    outputs = []
    while by.unfinished:
        by.step()
        outputs += by.take()
    turn = [*PROMPTS[4], *summary(outputs, request_id, 0)[0]]
    ways = [[*turn, 5, 20, 21], [*turn, 5, 30, 31, 32]]
    expected = []
    for way in ways:
        fresh = Engine(runner(), tokenizer())
        fresh.add(way, params)
        while fresh.unfinished:
            fresh.step()
        expected.append(summary(fresh.take(), 0, 0))
    ids = [by.add(way, params) for way in ways]
    outputs = []
    while by.unfinished:
        by.step()
        outputs += by.take()
    assert [summary(outputs, i, 0) for i in ids] == expected
    assert all(o.cached_tokens >= len(PROMPTS[4]) for o in outputs), "both were hits"


class Flat(Runner):
    """Every token is as likely as any other."""

    def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        return [torch.zeros_like(rows) for rows in super().run(chunks)]


def test_continued_answer_draws_the_same_tokens() -> None:
    """Noise belongs to positions: what a seed draws after half of its answer is the other half."""
    by = Engine(Flat.from_module(MODEL), tokenizer())
    by.end_ids = set()
    whole = by.add(PROMPTS[1], replace(SAMPLED, max_tokens=12))
    while by.unfinished:
        by.step()
    tokens = summary(by.take(), whole, 0)[0]
    rest = by.add([*PROMPTS[1], *tokens[:5]], replace(SAMPLED, max_tokens=7))
    while by.unfinished:
        by.step()
    assert summary(by.take(), rest, 0)[0] == tokens[5:]


class Bounded(Runner):
    def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        for chunk in chunks:
            assert chunk.cache.length + len(chunk.ids) < CONTEXT
        assert sum(len(chunk.ids) for chunk in chunks) <= 64
        return super().run(chunks)


def test_drafts_stay_within_context_and_budget() -> None:
    by = Engine(Bounded.from_module(MODEL), tokenizer(), prompt_lookup=True, step_tokens=64)
    by.end_ids = set()
    # One token again and again: every draft comes true, up to the very end.
    params = replace(GREEDY, max_tokens=1000, logit_bias={60: 100.0})
    ids = [by.add(prompt, params) for prompt in PROMPTS]
    outputs = []
    while by.unfinished:
        by.step()
        outputs += by.take()
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        tokens, _, _, reason = summary(outputs, request_id, 0)
        assert len(prompt) + len(tokens) == CONTEXT and reason == "length"


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batched_embeddings_match_single_embeddings(pooling: Any) -> None:
    generator = Generator(runner(), tokenizer())
    generator.engine.step_tokens = 40  # several passes of several texts
    texts = ["the fox", "春眠不觉晓", "x", "lazy dog " * 8, "处处", "the quick brown fox"] * 2
    together = generator.embed(texts, pooling)
    for text, vector in zip(texts, together, strict=True):
        assert (generator.embed([text], pooling)[0] == vector).all()
    assert together.dtype == "float32" and together.shape == (12, 32)
