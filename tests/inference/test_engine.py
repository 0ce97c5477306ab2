"""The engine in the deterministic path: whatever is batched, cached, cut in chunks or drafted, the
same tokens with the same log-probabilities, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT, random_model, tokenizer

from khaosz.errors import GenerationError
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.inference.prompt_lookup import PromptLookup
from khaosz.inference.request import Output
from khaosz.inference.runner import Chunk, Runner
from khaosz.inference.sampling import SamplingParams, sample
from khaosz.inference.text_stream import TextStream, first_stop
from khaosz.interop.huggingface import save_model
from khaosz.interop.models import load_model

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, seed=5, logprobs=2, top_p=0.95)
MODEL = random_model(tokenizer().vocab_size)
PROMPTS = [
    list(range(20, 37)),
    [3, 1, 4, 1, 5, 9, 2, 6],
    [*range(40, 80), 7],
    [60, 61, 60, 61, 60, 61, 60],
]


def engine(**settings: Any) -> Engine:
    return Engine(Runner.from_module(MODEL, deterministic=True), tokenizer(), **settings)


def finish(by: Engine) -> list[Output]:
    outputs = by.take()
    while by.unfinished:
        by.step()
        outputs += by.take()
    return outputs


def summary(outputs: Sequence[Output], request_id: int = 0, choice: int = 0) -> tuple[Any, ...]:
    """Everything that a request received: ids, log-probabilities, text, reason."""
    mine = [o for o in outputs if (o.request_id, o.choice) == (request_id, choice)]
    assert [o.finish_reason is None for o in mine] == [True] * (len(mine) - 1) + [False]
    return (
        [token for o in mine for token in o.token_ids],
        [(p.token, p.value, p.top) for o in mine for p in o.logprobs],
        "".join(o.text for o in mine),
        mine[-1].finish_reason,
    )


def alone(prompt: list[int], params: SamplingParams, **settings: Any) -> tuple[Any, ...]:
    by = engine(**settings)
    request_id = by.add(prompt, params)
    return summary(finish(by), request_id)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cached_decoding_matches_uncached(prompt: list[int]) -> None:
    """The slow truth: the whole sequence through a fresh cache for every token."""
    runner = Runner.from_module(MODEL, deterministic=True)
    ids, values = list(prompt), []
    for _ in range(GREEDY.max_tokens):
        logits = runner.run([Chunk(ids, runner.new_cache(), 1)])[0][0]
        token = int(logits.argmax())
        values.append(float(logits.log_softmax(0)[token]))
        ids.append(token)
        if token in engine().end_ids:
            break
    tokens, logprobs, _, _ = alone(prompt, GREEDY)
    assert tokens == ids[len(prompt) :]
    assert [value for _, value, _ in logprobs] == values


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("step_tokens", [1, 7, 512])
def test_batched_requests_match_single_requests(params: SamplingParams, step_tokens: int) -> None:
    expected = [alone(prompt, params) for prompt in PROMPTS]
    by = engine(step_tokens=step_tokens)
    ids = [by.add(prompt, params) for prompt in PROMPTS]
    outputs = finish(by)
    assert [summary(outputs, i) for i in ids] == expected


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_late_requests_do_not_affect_others(params: SamplingParams) -> None:
    expected = [alone(prompt, params) for prompt in PROMPTS]
    by, ids, outputs = engine(max_batch=2), [], []
    for prompt in PROMPTS:
        ids.append(by.add(prompt, params))
        for _ in range(3):
            by.step()
        outputs += by.take()
    outputs += finish(by)
    assert [summary(outputs, i) for i in ids] == expected


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_prefix_hit_matches_miss(params: SamplingParams) -> None:
    """A second turn, the same question again, and another question to the same document."""
    by = engine()
    first = by.add(PROMPTS[2], params)
    tokens = summary(finish(by), first)[0]
    turn = [*PROMPTS[2], *tokens, 9, 9, 9]
    other = [*PROMPTS[2][:30], 11, 12]
    for prompt in (turn, PROMPTS[2], other, turn[:35]):
        request_id = by.add(prompt, params)
        outputs = finish(by)
        assert outputs[-1].cached_tokens >= 30, "it was a hit"
        assert outputs[-1].cached_tokens < len(prompt), "the last token's logits are needed"
        assert summary(outputs, request_id) == alone(prompt, params)


def test_running_sequences_share_their_prompt() -> None:
    by = engine()
    by.add(PROMPTS[2], GREEDY)
    by.step()
    second = by.add([*PROMPTS[2][:-1], 8, 8], GREEDY)
    outputs = finish(by)
    assert next(o for o in outputs if o.request_id == second).cached_tokens == 40
    assert summary(outputs, second) == alone([*PROMPTS[2][:-1], 8, 8], GREEDY)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.2)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_speculation_matches_plain_decoding(params: SamplingParams, prompt: list[int]) -> None:
    assert alone(prompt, params, prompt_lookup=True) == alone(prompt, params)


def test_speculation_takes_fewer_steps_where_the_text_repeats() -> None:
    """A model whose every token leads to the same next one: drafts come true."""
    steps = {}
    for lookup in (False, True):
        by = engine(prompt_lookup=lookup)
        by.end_ids = set()
        # Greedy output of a small random model soon runs in a circle, which lookup finds.
        by.add(PROMPTS[3], replace(GREEDY, max_tokens=60))
        steps[lookup] = 0
        while by.unfinished:
            by.step()
            steps[lookup] += 1
    assert steps[True] < steps[False], steps


@pytest.mark.parametrize("params", [replace(GREEDY, n=3), replace(SAMPLED, n=3)])
def test_choices_share_prompt_and_draw_independently(params: SamplingParams) -> None:
    by = engine()
    request_id = by.add(PROMPTS[0], params)
    outputs = finish(by)
    choices = [summary(outputs, request_id, c) for c in range(3)]
    assert choices[0] == alone(PROMPTS[0], replace(params, n=1))
    if params.temperature:
        assert len({tuple(tokens) for tokens, *_ in choices}) == 3
    else:
        assert choices[0] == choices[1] == choices[2]


def test_generator_streams_match_batches() -> None:
    generator = Generator(Runner.from_module(MODEL, deterministic=True), tokenizer())
    prompts = ["the fox", "春眠", "quick 晓 dog"]
    whole = generator.generate_batch(prompts, SAMPLED)
    for prompt, completion in zip(prompts, whole, strict=True):
        assert generator.generate(prompt, SAMPLED) == completion
        pieces = list(generator.stream(prompt, SAMPLED))
        assert "".join(piece.text for piece in pieces) == completion.text
        assert len(completion.logprobs) == completion.tokens


def test_short_prompt_does_not_wait_for_long_ones() -> None:
    """In up to half of a pass; the long ones share what it leaves."""
    by = engine(step_tokens=16)
    long = [by.add([5 + i] * 40, GREEDY) for i in range(4)]
    by.step()
    short = [by.add([20 + i] * 5, GREEDY) for i in range(2)]
    by.step()
    assert {output.request_id for output in by.take()} == {short[0]}
    by.step()
    assert {output.request_id for output in by.take()} == {*short}
    outputs = finish(by)
    for i, request_id in enumerate(long):
        assert summary(outputs, request_id) == alone([5 + i] * 40, GREEDY)


def test_slow_machine_takes_shorter_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new request waits for one pass, which is bounded in time."""
    clock, sizes = [0.0], []

    class Slow(Runner):
        def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
            sizes.append(sum(len(chunk.ids) for chunk in chunks))
            clock[0] += 0.004 * sizes[-1]
            return super().run(chunks)

    monkeypatch.setattr("khaosz.inference.engine.perf_counter", lambda: clock[0])
    model = random_model(tokenizer().vocab_size, max_position_embeddings=4096)
    by = Engine(Slow.from_module(model), tokenizer(), step_tokens=1024)
    by.add([7] * 2000, replace(GREEDY, max_tokens=1))
    by.step()
    by.step()
    assert sizes == [1024, 256]  # 2 s are 500 tokens
    short = by.add([9] * 30, replace(GREEDY, max_tokens=1))
    by.step()
    assert sizes[2:] == [64]  # 0.5 s are 125 tokens
    assert [output.request_id for output in by.take()] == [short]


# ---------------------------------------------------------------------------------- cancel, errors


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 12])
def test_cancelling_stops_at_once_without_affecting_others(steps: int) -> None:
    expected = alone(PROMPTS[1], GREEDY)
    by = engine(step_tokens=10)
    long, short = by.add(PROMPTS[2], GREEDY), by.add(PROMPTS[1], GREEDY)
    for _ in range(steps):  # in the queue, in the prompt, in the answer
        by.step()
    by.cancel(long)
    outputs = by.take()
    last = [o for o in outputs if o.request_id == long][-1]
    assert last.finish_reason == "cancelled"
    outputs += finish(by)
    assert outputs[-1].request_id == short
    assert summary(outputs, short) == expected
    by.cancel(long)
    by.cancel(12345)


def test_broken_request_does_not_affect_others() -> None:
    """Logits that are not finite end the sequence they belong to."""
    expected = alone(PROMPTS[1], GREEDY)
    poisoned = 77

    class Poisoned(Runner):
        def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
            rows = super().run(chunks)
            return [
                torch.full_like(logits, float("nan")) if poisoned in chunk.ids else logits
                for chunk, logits in zip(chunks, rows, strict=True)
            ]

    by = Engine(Poisoned.from_module(MODEL, deterministic=True), tokenizer())
    bad, good = by.add([5, 6, poisoned], GREEDY), by.add(PROMPTS[1], GREEDY)
    outputs = finish(by)
    (failed,) = [o for o in outputs if o.request_id == bad]
    assert failed.finish_reason == "error" and "not finite" in str(failed.error)
    assert summary(outputs, good) == expected


def test_unexpected_error_ends_only_its_sequence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = alone(PROMPTS[1], GREEDY)

    def surprising(logits: torch.Tensor, params: SamplingParams, *rest: Any) -> int:
        if params.seed == 13:
            raise ZeroDivisionError("nobody thought of it")
        return sample(logits, params, *rest)

    monkeypatch.setattr("khaosz.inference.request.sample", surprising)
    by = engine()
    bad, good = by.add(PROMPTS[0], replace(GREEDY, seed=13)), by.add(PROMPTS[1], GREEDY)
    outputs = finish(by)
    (failed,) = [o for o in outputs if o.request_id == bad]
    assert failed.finish_reason == "error" and str(failed.error) == "the answer failed"
    assert "nobody thought of it" in caplog.text
    assert summary(outputs, good) == expected and not by.unfinished


def test_out_of_range_requests_are_rejected_by_name() -> None:
    by = engine()
    with pytest.raises(GenerationError, match="prompt is empty"):
        by.add([], GREEDY)
    with pytest.raises(GenerationError, match=f"has {CONTEXT} tokens"):
        by.add([1] * CONTEXT, GREEDY)
    with pytest.raises(GenerationError, match="prompt has token ids outside"):
        by.add([10**6], GREEDY)
    with pytest.raises(GenerationError, match="logit_bias has token ids outside"):
        by.add([1], replace(GREEDY, logit_bias={10**6: 1.0}))
    with pytest.raises(GenerationError, match="of cache"):
        engine(cache_bytes=1000).add([1, 2, 3], GREEDY)
    assert not by.unfinished


def test_requests_wait_for_cache_budget() -> None:
    need = engine()._need(len(PROMPTS[0]), GREEDY)
    by = engine(cache_bytes=need + 1)
    ids = [by.add(PROMPTS[0], GREEDY) for _ in range(3)]
    most = 0
    outputs = []
    while by.unfinished:
        by.step()
        most = max(most, len(by._running))
        outputs += by.take()
    assert most == 1
    assert all(summary(outputs, i) == alone(PROMPTS[0], GREEDY) for i in ids)


def test_prefixes_stay_within_their_budget() -> None:
    by = engine(prefix_bytes=40_000)
    for start in range(10, 200, 10):
        by.add(list(range(start, start + 20)), GREEDY)
        finish(by)
        assert by.prefixes.nbytes <= 40_000
    assert by.prefixes.nbytes > 0
    by.weights_changed()
    assert by.prefixes.nbytes == 0


def test_live_model_matches_saved_and_loaded_model(tmp_path: Any) -> None:
    model = random_model(tokenizer().vocab_size, seed=3)
    live = Generator(model, tokenizer())
    for seed in (3, 4):  # the same prompt before and after an update
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * seed)
        save_model(model, tmp_path / str(seed))
        saved = Generator(load_model(tmp_path / str(seed)), tokenizer())
        assert live.generate(PROMPTS[0], GREEDY) == saved.generate(PROMPTS[0], GREEDY)


def test_fast_path_is_close_to_deterministic_path() -> None:
    fast, slow = Runner.from_module(MODEL), Runner.from_module(MODEL, deterministic=True)
    a = fast.run([Chunk(p, fast.new_cache(), len(p)) for p in PROMPTS])
    b = slow.run([Chunk(p, slow.new_cache(), len(p)) for p in PROMPTS])
    for one, other in zip(a, b, strict=True):
        # fp32 sums of 48 terms at most, in another order, through two layers.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_int8_cache_is_close_and_smaller() -> None:
    def runner(**settings: Any) -> Runner:
        weights = Runner.from_module(MODEL).weights
        return Runner(MODEL.config, weights, **settings)

    plain, small = runner(), runner(cache_dtype=torch.int8)
    outputs, caches = [], []
    for one in (plain, small):
        cache = one.new_cache()
        first = one.run([Chunk(PROMPTS[2], cache, 3)])[0]
        copy = cache.fork(30)
        again = one.run([Chunk(PROMPTS[2][30:], copy, 3)])[0]
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)  # a fork takes scales along
        outputs.append(first)
        caches.append(cache)
    # Half a step of 1/127 of the largest of a head, through attention and two layers.
    assert (outputs[0] - outputs[1]).abs().max() < 0.03 * outputs[0].abs().max()
    assert not torch.equal(*outputs)
    assert caches[1].nbytes * 2 < caches[0].nbytes  # heads of 8 only: a scale costs half as much
    by = Engine(runner(cache_dtype=torch.int8, deterministic=True), tokenizer())
    chunked = Engine(runner(cache_dtype=torch.int8, deterministic=True), tokenizer(), step_tokens=5)
    ids = [e.add(PROMPTS[2], GREEDY) for e in (by, chunked)]
    assert summary(finish(by), ids[0]) == summary(finish(chunked), ids[1])


# ------------------------------------------------------------------------------------------ pieces


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab中🙂\n", max_size=30),
    stops=st.lists(st.text(alphabet="ab中🙂", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_not_emitted(text: str, stops: list[str]) -> None:
    by = TextStream(tokenizer(), stops)
    output, stopped = "", False
    for token in tokenizer().encode(text):
        piece, stopped = by.push(token)
        output += piece
        if stopped:
            break
    if not stopped:
        piece, stopped = by.finish()
        output += piece
    # The stop string that is complete first counts; of several that one token completes, the one
    # that begins first.
    ids, expected = tokenizer().encode(text), text
    for end in range(1, len(ids) + 1):
        shown = tokenizer().decode(ids[:end]).rstrip("\ufffd")  # whole characters only
        at = first_stop(shown, stops)
        if at is not None:
            expected = shown[:at]
            break
    assert output == expected
    assert stopped == (first_stop(text, stops) is not None)


def test_prompt_lookup_proposes_continuations_and_pauses_when_rejected() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2])
    assert lookup.propose() == [3, 4, 5]
    lookup.extend([9])
    assert lookup.propose() == []
    lookup.extend([1, 2])
    for _ in range(10):
        lookup.judge(3, 0)
    assert lookup.propose() == []
    lookup.extend(range(100, 170))
    lookup.extend([1, 2])
    assert lookup.propose(), "tried again later"


def test_embeddings_are_pooled_and_normalised() -> None:
    generator = Generator(MODEL, tokenizer())
    texts = ["the fox", "春眠不觉晓"]
    for pooling in ("last", "mean"):
        vectors = generator.embed(texts, pooling)
        with torch.no_grad():
            for vector, text in zip(vectors, texts, strict=True):
                states = MODEL(torch.tensor([generator.prompt_ids(text)]))[0]
                pooled = states[-1] if pooling == "last" else states.mean(0)
                expected = torch.nn.functional.normalize(pooled, dim=0)
                torch.testing.assert_close(torch.tensor(vector), expected, rtol=1e-4, atol=1e-5)
    assert generator.embed([]).shape == (0, 32)
    with pytest.raises(GenerationError, match="pooling"):
        generator.embed(texts, "max")  # type: ignore[arg-type]
