"""Generation: streamed and whole, with a cache and without, stop strings, bytes and limits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import CONTEXT, bytewise, chain_model, random_model, tokenizer

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import GenerationError, ModelError, TokenizerError
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Completion, Generator, Piece, generate
from khaosz.inference.runner import Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.huggingface import save_model
from khaosz.memory.parts import BASE
from khaosz.model import Transformer

torch.set_num_threads(1)


@cache
def babbler() -> Generator:
    """Random weights: anything may come, broken UTF-8 and special tokens too."""
    return Generator(random_model(tokenizer().vocab_size), tokenizer())


def parrot(chain: Sequence[int], by: Tokenizer) -> Generator:
    """A true `Transformer` that knows one thing: which token follows which along `chain`.

    Its blocks are the identity, its embedding tells tokens apart and its head maps each token of
    the chain to the next. The last one leads to the end token. No token may stand there twice.
    """
    assert len(set(chain)) == len(chain)
    return Generator(chain_model(by, [*chain, by.end_id]), by)


GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def with_stop(*stop: str, max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=stop)


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def endless_tokens(generator: Generator, ids: list[int], params: SamplingParams) -> list[int]:
    """Token ids up to the limit, as if no token ended a turn."""
    engine = Engine(generator.engine.runner, generator.tokenizer)
    engine.end_ids = set()
    engine.add(ids, params)
    tokens: list[int] = []
    while engine.unfinished:
        engine.step()
        tokens += [token for output in engine.take() for token in output.token_ids]
    return tokens


# --------------------------------------------------------------------------- stream, whole, cache


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stop", [(), ("e", "o")])
def test_joined_stream_matches_whole_answer(seed: int, stop: tuple[str, ...]) -> None:
    generator = babbler()
    ids = generator.prompt_ids("the fox 春眠")
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, stop=stop)
    pieces = list(generator.stream(ids, params))
    whole = generator.generate(ids, params)
    assert (joined(pieces), pieces[-1].tokens) == (whole.text, whole.tokens)
    assert pieces[-1].finish_reason == whole.finish_reason
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert not any(s in whole.text for s in stop)


def greedy_without_cache(generator: Generator, ids: list[int], count: int) -> list[int]:
    """The slow truth: the whole sequence again for every token."""
    model = generator.model
    assert isinstance(model, Transformer)
    sequence = list(ids)
    with torch.no_grad():
        for _ in range(count):
            hidden = model(torch.tensor([sequence]))[0, -1]
            logits = model.logits(hidden)[: generator.tokenizer.vocab_size]
            sequence.append(int(logits.argmax()))
    return sequence[len(ids) :]


@pytest.mark.parametrize("seed", range(3))
def test_cached_greedy_matches_uncached_greedy(seed: int) -> None:
    generator = Generator(random_model(tokenizer().vocab_size, seed), tokenizer())
    ids = generator.prompt_ids("quick 晓")
    slow = greedy_without_cache(generator, ids, 40)
    ends = [i for i, token in enumerate(slow) if token in generator.engine.end_ids]
    text = tokenizer().decode(slow[: ends[0]] if ends else slow)
    completion = generator.generate(ids, GREEDY)
    assert completion.text == text
    assert completion.tokens == (ends[0] + 1 if ends else 40)


def test_seed_makes_output_reproducible() -> None:
    generator, ids = babbler(), babbler().prompt_ids("the")

    def run(seed: int | None) -> str:
        params = SamplingParams(max_tokens=30, temperature=1.0, seed=seed)
        return generator.generate(ids, params).text

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)  # 30 draws over 320 tokens: they don't agree by chance


def test_old_name_of_prompt_lookup() -> None:
    model, by = random_model(tokenizer().vocab_size), tokenizer()
    for keywords in ({"prompt_lookup": True}, {"lookup": True}):
        assert Generator(model, by, **keywords).engine.prompt_lookup
        assert Engine(Runner.from_module(model), by, **keywords).prompt_lookup
    assert not Generator(model, by).engine.prompt_lookup


def test_stream_can_be_abandoned_and_restarted() -> None:
    generator, ids = babbler(), babbler().prompt_ids("the")
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    whole = generator.generate(ids, params)
    left = generator.stream(ids, params)
    next(left)
    assert generator.generate(ids, params) == whole


def test_repetition_penalty_covers_generated_tokens() -> None:
    chain = bytewise().encode("abc")
    generator = parrot(chain, bytewise())
    assert isinstance(generator.model, Transformer)
    with torch.no_grad():  # c leads back to b
        assert generator.model.lm_head is not None
        generator.model.lm_head.weight[:, chain[2]] = 0
        generator.model.lm_head.weight[chain[1], chain[2]] = 10.0
    plain = generator.generate(chain[:1], SamplingParams(temperature=0.0, max_tokens=8))
    assert plain.text == "bcbcbcbc"
    # b was generated, not prompted; after c, half of its 10 is less than z's 6.
    with torch.no_grad():
        generator.model.lm_head.weight[bytewise().encode("z")[0], chain] = 6.0
    again = generator.generate(
        chain[:1], SamplingParams(temperature=0.0, max_tokens=3, repetition_penalty=2.0)
    )
    assert again.text == "bcz"


# ------------------------------------------------------------------------------- ends and reasons


def test_end_token_ends_and_is_not_emitted() -> None:
    chain = bytewise().encode("Hi")
    completion = parrot(chain, bytewise()).generate(chain[:1], GREEDY)
    assert completion == Completion("i", 2, "stop")  # the end token is counted


def test_end_of_document_ends_generation() -> None:
    chain = [*bytewise().encode("Hi"), bytewise().eos_id]
    assert parrot(chain, bytewise()).generate(chain[:1], GREEDY) == Completion("i", 2, "stop")


def test_max_tokens_finishes_with_length() -> None:
    chain = bytewise().encode("abcdef")
    generator = parrot(chain, bytewise())
    params = SamplingParams(temperature=0.0, max_tokens=3)
    assert generator.generate(chain[:1], params) == Completion("bcd", 3, "length")
    # The last token that is allowed may be the one that ends the turn.
    params = SamplingParams(temperature=0.0, max_tokens=6)
    assert generator.generate(chain[:1], params) == Completion("bcdef", 6, "stop")


def test_context_finishes_with_length() -> None:
    generator = babbler()
    generator = Generator(generator.model, generator.tokenizer)
    generator.engine.end_ids = set()
    ids = generator.prompt_ids("the fox")
    params = SamplingParams(max_tokens=10_000, temperature=1.0, seed=0)
    completion = generator.generate(ids, params)
    assert (completion.tokens, completion.finish_reason) == (CONTEXT - len(ids), "length")
    last = generator.generate([ids[0]] * (CONTEXT - 1), params)
    assert (last.tokens, last.finish_reason) == (1, "length")


def test_unanswerable_prompts_are_rejected_at_once() -> None:
    generator = babbler()
    with pytest.raises(GenerationError, match="prompt is empty"):
        generator.stream([])
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(GenerationError, match=f"has {length} tokens") as caught:
            generator.stream([1] * length)
        assert caught.value.hint is not None
    for token in (-1, tokenizer().vocab_size):
        with pytest.raises(GenerationError, match="token ids outside 0 to"):
            generator.stream([1, token])


def test_empty_text_continues_from_begin_token() -> None:
    assert babbler().prompt_ids("") == [tokenizer().bos_id]
    assert babbler().generate(babbler().prompt_ids(""), GREEDY).tokens > 0


# ---------------------------------------------------------------------------------- stop strings


def test_stop_string_of_several_tokens_is_not_emitted() -> None:
    chain = bytewise().encode("abcdefgh")
    generator = parrot(chain, bytewise())
    pieces = list(generator.stream(chain[:1], with_stop("def")))
    assert joined(pieces) == "bc" and pieces[-1].finish_reason == "stop"
    assert pieces[-1].tokens == 5  # b c d e f
    assert not any(set(piece.text) & set("def") for piece in pieces)


def test_partial_stop_string_is_emitted_at_end() -> None:
    chain = bytewise().encode("abcdef")
    generator = parrot(chain, bytewise())
    pieces = list(generator.stream(chain[:1], with_stop("cdX", "efg")))
    assert joined(pieces) == "bcdef" and pieces[-1].finish_reason == "stop"
    pieces = list(generator.stream(chain[:1], with_stop("cdX", max_tokens=3)))
    assert joined(pieces) == "bcd" and pieces[-1].finish_reason == "length"
    # Held back while it may be a stop string, no longer.
    texts = [piece.text for piece in pieces]
    assert texts[0] == "b"


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("cd", "bcd"), "a"),  # both end at d: the one that begins first
        (("bcde", "c"), "ab"),
        (("e",), "abcd"),
        (("a",), ""),
        (("中",), "abcdef"),
    ],
)
def test_earliest_stop_string_wins(stops: tuple[str, ...], text: str) -> None:
    chain = bytewise().encode("0abcdef")
    generator = parrot(chain, bytewise())
    assert generator.generate(chain[:1], with_stop(*stops)).text == text


def test_stop_string_of_multi_token_characters() -> None:
    chain = bytewise().encode("0中🙂é1")
    generator = parrot(chain, bytewise())
    pieces = list(generator.stream(chain[:1], with_stop("🙂é")))
    assert joined(pieces) == "中" and pieces[-1].finish_reason == "stop"


def test_stop_string_within_one_token() -> None:
    by = tokenizer()
    ids = by.encode("quick")
    assert len(ids) < 5, "a merged token is wanted here"
    chain = [by.bos_id, *ids]
    generator = parrot(chain, by)
    assert generator.generate(chain[:1], with_stop("ic")).text == "qu"


# ------------------------------------------------------------------------------------------ bytes


def test_characters_of_several_tokens_are_not_split() -> None:
    text = "中🙂é"
    chain = [bytewise().bos_id, *bytewise().encode(text)]
    assert len(chain) == 1 + 9
    pieces = list(parrot(chain, bytewise()).stream(chain[:1], GREEDY))
    assert [piece.text for piece in pieces if piece.text] == list(text)
    assert [piece.tokens for piece in pieces if piece.text] == [3, 7, 9]


@pytest.mark.parametrize("seed", range(8))
def test_streamed_bytes_match_decoded_bytes(seed: int) -> None:
    """Random weights over a byte vocabulary give broken UTF-8: the same marks, streamed or not."""
    generator = Generator(random_model(bytewise().vocab_size, seed), bytewise())
    ids = generator.prompt_ids("q")
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed)
    tokens = endless_tokens(generator, ids, params)
    ends = [i for i, token in enumerate(tokens) if token in generator.engine.end_ids]
    expected = bytewise().decode(tokens[: ends[0]] if ends else tokens)
    pieces = list(generator.stream(ids, params))
    assert joined(pieces) == expected
    joined(pieces).encode()  # never a lone surrogate


# --------------------------------------------------------------------------- vocabulary, interface


def test_rows_beyond_the_tokenizer_are_never_sampled() -> None:
    size = bytewise().vocab_size
    model = random_model(size + 64)
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight[size:] = model.lm_head.weight[size:].sign() * 100.0
    tokens = endless_tokens(
        Generator(model, bytewise()), [1], SamplingParams(max_tokens=50, seed=0)
    )
    assert len(tokens) == 50 and max(tokens) < size


def test_tokenizer_larger_than_model_is_rejected() -> None:
    with pytest.raises(GenerationError, match=r"the tokenizer has 273 tokens, the model only 272"):
        Generator(random_model(272), bytewise())


def test_broken_weights_are_reported() -> None:
    model = random_model(bytewise().vocab_size)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerationError, match="not finite"):
        Generator(model, bytewise()).generate([1])


def test_generate_from_directory_text_and_messages(tmp_path: Path) -> None:
    model = random_model(tokenizer().vocab_size)
    save_model(model, tmp_path)
    tokenizer().save(tmp_path)
    saved = Generator(model, tokenizer())
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    by_text = generate(tmp_path, "the fox", params)
    assert by_text == saved.generate(saved.prompt_ids("the fox"), params)
    messages = [{"role": "user", "content": "the fox"}]
    by_messages = generate(str(tmp_path), messages, params)
    by = tokenizer()
    ids = [by.bos_id, by.special_ids["<|user|>"], *by.encode("the fox"), by.end_id]
    ids.append(by.special_ids["<|assistant|>"])
    assert by_messages == saved.generate(ids, params) == generate(saved, messages, params)


def test_directory_without_model_or_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        generate(tmp_path / "none", "x")
    save_model(random_model(300), tmp_path)
    with pytest.raises(TokenizerError):
        generate(tmp_path, "x")


def test_planned_memory_counts_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(random_model(tokenizer().vocab_size), tmp_path)
    tokenizer().save(tmp_path)
    opened = []
    monkeypatch.setattr(
        "khaosz.inference.generator.open_tokenizer",
        lambda path: opened.append(path) or tokenizer(),
    )
    monkeypatch.setattr("khaosz.inference.generator.resident_memory", lambda: len(opened))
    memory = Generator.from_directory(tmp_path).memory
    assert memory is not None and memory.parts[BASE] == 1
