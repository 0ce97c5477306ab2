"""What generating needs, in numbers worked out by hand and beside the engine's own tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from khaosz.config import ModelConfig, preset
from khaosz.errors import ConfigError, GenerationError, NotEnoughMemoryError
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator, fitted, plan_inference
from khaosz.inference.runner import Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.gguf.model import save_gguf
from khaosz.interop.huggingface import ModelDirectory, save_model
from khaosz.interop.models import open_model
from khaosz.memory.inference import (
    InferencePlan,
    Storage,
    positions_in,
    quantised,
    sequence_bytes,
)
from khaosz.memory.machine import Limit, memory_limits
from khaosz.memory.parts import BASE, MAPPED, Memory, check_memory
from khaosz.model import parameter_shapes
from tests.tiny_models import random_model, tokenizer

GREEDY = SamplingParams(4, 0.0)
MB = 1 << 20
# As large as Qwen3-0.6B's attention: 28 layers of 8 key/value heads of 128.
LONG = ModelConfig(
    vocab_size=3_200,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
)


def limit(megabytes: float) -> tuple[Limit, ...]:
    return (Limit("a test", int(megabytes * MB)),)


def plan(context: int = 40_960) -> InferencePlan:
    return InferencePlan(LONG, Storage(torch.float32), context, torch.float32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, by = tmp_path_factory.mktemp("memory") / "model", tokenizer()
    save_model(random_model(by.vocab_size), path, bos_id=by.bos_id, eos_ids=[by.eos_id])
    by.save(path)
    return path


def test_keys_and_values() -> None:
    # 2 tensors, 28 layers, 8 heads, 128 numbers, 4 bytes a position; 16 blocks of room ahead.
    assert sequence_bytes(LONG, torch.float32, 40_960) == 229_376 * (40_960 + 1_024)
    assert sequence_bytes(LONG, torch.bfloat16, 64) == 229_376 // 2 * 128
    room = sequence_bytes(LONG, torch.float32, 6_400)
    assert positions_in(LONG, torch.float32, room) == 6_400
    assert positions_in(LONG, torch.float32, room - 1) == 6_336


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_directory(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    save_model(random_model(320, tie_word_embeddings=tied), tmp_path)
    source = ModelDirectory(tmp_path)
    planned = plan_inference(source, dtype=dtype).storage.weights(source.config)
    assert planned == (held_by(Runner.open(tmp_path, dtype=dtype)), 0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_of_a_gguf_file(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    save_gguf(random_model(320, **shape), tokenizer(), tmp_path / "a.gguf", kind)
    source = open_model(tmp_path / "a.gguf")
    own, mapped = plan_inference(source, dtype=dtype).storage.weights(source.config)
    assert own + mapped == held_by(Runner.open(tmp_path / "a.gguf", dtype=dtype))
    assert bool(mapped) == (dtype is None and kind != "F16" and own < mapped)


def held_by(runner: Runner) -> int:
    """Bytes of the tensors that a runner's weights consist of, each counted once."""
    weights, seen = runner.weights(), {}
    vectors = [p for block in weights.blocks for p in block.parameters() if not p.is_meta]
    dense = [product.matrix for layer in weights.linear.layers for product in layer.values()]
    tables = weights.embed.args if hasattr(weights.embed, "args") else ()
    for tensor in (*vectors, *weights.norm.parameters(), *tables):
        seen[tensor.data_ptr()] = tensor.nbytes
    for matrix in (*dense, weights.head):
        key = matrix.weight.data_ptr() if hasattr(matrix, "weight") else id(matrix)
        seen[key] = matrix.nbytes
    return sum(seen.values())


def test_the_context_that_fits() -> None:
    whole = plan().memory(0).total
    assert plan().fitting(0, limit(whole / MB)) == plan()
    half = plan().fitting(0, limit(whole / MB / 2))
    assert half is not None and half.context % 64 == 0
    assert half.memory(0).total <= whole // 2 < plan(half.context + 64).memory(0).total
    assert plan().fitting(0, limit(10)) is None
    assert plan().fitting(0, ()) == plan()  # no limit is known


def test_a_default_context_becomes_shorter_and_an_explicit_one_is_refused() -> None:
    shorter = fitted(plan(), 0, limit(1_000), "m", explicit=False)
    assert 256 <= shorter.context < 40_960
    with pytest.raises(NotEnoughMemoryError) as caught:
        fitted(plan(), 300 * MB, limit(1_000), "m", explicit=True)
    message, hint = str(caught.value), caught.value.hint
    assert "m with 40,960 tokens of context needs about 9." in message
    assert "1.3 GB are available (a test): KV cache 9.1 GB" in message and "300 MB" in message
    assert hint is not None and f"--context {shorter.context} (" in hint
    assert "Q4_0" in hint and "--no-memory-check" in hint


@pytest.mark.parametrize(
    ("size", "stored", "context", "gigabytes", "device", "expected"),
    [
        # What fits as it is needs a shorter context only; else the best quantised form of the model
        # that keeps the context, and the next one if that does not; else the largest preset.
        ("base", "", 2_048, 0.53, "cpu", [r"--context \d+", "a Q8_0 file .* with 2,048 tokens"]),
        ("13b", "", 8_192, 20.0, "cpu", ["a Q8_0 file .*--to Q8_0.* with 8,192 tokens"]),
        (
            "13b",
            "",
            8_192,
            15.0,
            "cpu",
            [r"a Q8_0 file .* with [1-7],\d+ tokens", "a Q4_0 file .* with 8,192 tokens"],
        ),
        ("13b", "Q8_0", 8_192, 12.0, "cpu", [r"a Q4_0 file .* with 8,192 tokens"]),
        ("13b", "Q4_0", 8_192, 6.0, "cpu", ["a model of 7,114M parameters in a Q4_0 file"]),
        ("13b", "", 8_192, 3.0, "cpu", ["a model of 1,107M parameters in a Q4_0 file .* 4,096"]),
        ("13b", "", 8_192, 9.0, "cuda", ["a model of 1,107M parameters with 4,096 tokens"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_would(
    size: str, stored: str, context: int, gigabytes: float, device: str, expected: list[str]
) -> None:
    shape = preset(size).model
    storage = quantised(shape, stored, native=True) if stored else Storage(torch.float32)
    large = InferencePlan(shape, storage, context, torch.float32)
    most = limit(1_024 * gigabytes)
    with pytest.raises(NotEnoughMemoryError, match=r"are available \(a test\): ") as caught:
        fitted(large, 0, most, "m", explicit=True, device=device)
    hint = str(caught.value.hint).removeprefix("would fit: ").partition(";")[0]
    proposals = re.split(r"(?<=B\)), ", hint)
    assert len(proposals) == len(expected), hint
    for proposal, pattern in zip(proposals, expected, strict=True):
        assert re.match(pattern, proposal), proposal
    for _, memory in large.smaller(0, most, True if device == "cpu" else None):
        assert memory.exceeded(most) is None


def test_the_least_is_named_where_nothing_fits() -> None:
    large = InferencePlan(preset("13b").model, Storage(torch.float32), 8_192, torch.float32)
    with pytest.raises(NotEnoughMemoryError) as caught:
        fitted(large, 0, limit(5), "m", explicit=False)
    assert "not even a model of 9M parameters in a Q4_0 file with 256 tokens (" in str(
        caught.value.hint
    )


def test_quantised_weights_are_those_of_the_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    for kind in ("Q8_0", "Q4_0"):
        save_gguf(random_model(320, **sizes), tokenizer(), tmp_path / f"{kind}.gguf", kind)
        source = open_model(tmp_path / f"{kind}.gguf")
        planned = quantised(source.config, kind, native=True).kinds
        for name, shape in parameter_shapes(source.config).items():
            if len(shape) == 2:
                assert planned[name] == (source.kind(name), source.nbytes(name)), name


def test_only_mapped_pages_are_left_out_of_a_limit_on_data() -> None:
    memory = Memory({BASE: 5, MAPPED: 100, "weights": 10})
    assert memory.exceeded([Limit("data", 50, mapped=False)]) is None
    assert memory.exceeded([Limit("all", 109)]) == Limit("all", 109)
    assert memory.exceeded([Limit("all", 110)]) is None


def test_a_refusal_names_what_would_fit() -> None:
    changes = [
        ("less", Memory({"weights": 40 * MB})),
        ("more", Memory({"weights": 60 * MB})),
    ]
    with pytest.raises(
        NotEnoughMemoryError, match=r"training needs about 70 MB .* weights 70 MB$"
    ) as caught:
        check_memory(Memory({"weights": 70 * MB}), limit(50), "training", changes, override="x=y")
    assert caught.value.hint == "would fit: less (40 MB); x=y skips this check"
    check_memory(Memory({"weights": 70 * MB}), (), "training", override="x=y")
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_memory(Memory({"weights": 70 * MB}), limit(9), "training", changes, override="x=y")
    assert str(caught.value.hint).startswith("not even less (40 MB) would fit: free memory")


def test_context_of_a_generator(directory: Path) -> None:
    generator = Generator.from_directory(directory, context=64)
    assert generator.context == 64 and generator.memory is not None
    assert "with 64 of 96 tokens of context" in str(generator.memory_line)
    assert generator.generate("the", GREEDY).tokens
    with pytest.raises(GenerationError, match="context is 64"):
        generator.generate([5] * 64, GREEDY)
    for context in (0, 97):
        with pytest.raises(ConfigError, match=f"a context of {context} tokens"):
            Generator.from_directory(directory, context=context)


def test_an_engine_follows_the_free_memory() -> None:
    """40,960 tokens take 9 GB here: what a fixed bound of 2 GB refused."""
    if min((limit.free for limit in memory_limits()), default=0) < 4 << 30:
        pytest.skip("less than 4 GB are free")
    by = tokenizer()
    engine = Engine(Runner(LONG, weights=lambda: pytest.fail("not computed")), by)  # type: ignore[arg-type]
    engine.check([5] * 12_000, SamplingParams(256))
    assert engine._cache_room() is not None
    bounded = Engine(engine.runner, by, cache_bytes=sequence_bytes(LONG, torch.float32, 9_024))
    bounded.check([5] * 9_000, SamplingParams(24))
    with pytest.raises(GenerationError, match="of cache") as caught:
        bounded.check([5] * 12_000, SamplingParams(256))
    assert caught.value.hint == "request fewer tokens: 9,024 of prompt and answer together fit"
