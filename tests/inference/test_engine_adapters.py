"""LoRA adapters of single requests: each sequence against the model that its adapter is folded
into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, tokenizer

from khaosz.config import LoRAConfig, ModelConfig
from khaosz.inference.adapter import Adapter
from khaosz.inference.engine import Engine
from khaosz.inference.grammar import matcher_for
from khaosz.inference.request import Output
from khaosz.inference.runner import Chunk, Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.adapter import load_adapter, save_adapter
from khaosz.interop.gguf.model import save_gguf
from khaosz.model.lora import add_lora, merge_lora, named_adapters

IDS = [5, 40, 17, 200, 33, 9, 250, 61, 14, 90]
# fp32 sums of at most 48 products in another order.
NEAR: dict[str, float] = {"rtol": 2e-5, "atol": 2e-5}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def adapter_at(directory: Path, seed: int, **changes: Any) -> Path:
    config = LoRAConfig(rank=3, alpha=8.0, **changes)
    model = random_model(tokenizer().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, config, generator)
    with torch.no_grad():
        for layer in named_adapters(model).values():
            layer.lora_B.normal_(0, 0.3, generator=generator)
    save_adapter(model, directory, "base")
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All matrices, and two of them with rsLoRA's scale."""
    root = tmp_path_factory.mktemp("adapters")
    some = ("k_proj", "up_proj")
    return [
        adapter_at(root / "all", 1),
        adapter_at(root / "some", 2, target_modules=some, rslora=True),
    ]


def merged(directory: Path) -> Runner:
    model = random_model(tokenizer().vocab_size)
    load_adapter(model, directory)
    merge_lora(model)
    return Runner.from_module(model)


def plain() -> Runner:
    return Runner.from_module(random_model(tokenizer().vocab_size))


def loaded(directory: Path, config: ModelConfig, **more: Any) -> Adapter:
    return Adapter(config, directory, **more)


def test_one_pass_serves_different_adapters_and_none(adapters: list[Path]) -> None:
    runner = plain()
    first, second = (loaded(path, runner.config) for path in adapters)
    users = [first, None, second, second, None, first]
    chunks = [
        Chunk(IDS[: 3 + i], runner.new_cache(), 3, adapter) for i, adapter in enumerate(users)
    ]
    references = {id(first): merged(adapters[0]), id(second): merged(adapters[1])}
    for chunk, result in zip(chunks, runner.run(chunks), strict=True):
        by = references.get(id(chunk.adapter), plain())
        [expected] = by.run([Chunk(chunk.ids, by.new_cache(), 3)])
        torch.testing.assert_close(result, expected, **NEAR)
    assert first.nbytes > second.nbytes > 0


def test_tiles_keep_their_adapter(adapters: list[Path]) -> None:
    model = random_model(tokenizer().vocab_size)
    runner = Runner.from_module(model, deterministic=True)
    adapter = loaded(adapters[0], runner.config)
    ids = IDS * 2  # more than one tile
    [result] = runner.run([Chunk(ids, runner.new_cache(), 4, adapter)])
    by = merged(adapters[0])
    [expected] = by.run([Chunk(ids, by.new_cache(), 4)])
    torch.testing.assert_close(result, expected, **NEAR)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_adapter_rows_match_gguf_row_order(adapters: list[Path], tmp_path: Path, kind: str) -> None:
    """GGUF orders the rows of queries and keys otherwise; an adapter knows the model's own."""
    wide: dict[str, Any] = {"qk_norm": False, "head_dim": 32, "hidden_size": 64}
    wide |= {"intermediate_size": 96}
    base = random_model(tokenizer().vocab_size, **wide)
    generator = torch.Generator().manual_seed(3)
    tuned = random_model(tokenizer().vocab_size, **wide)
    add_lora(tuned, LoRAConfig(rank=3), generator)
    with torch.no_grad():
        for layer in named_adapters(tuned).values():
            layer.lora_B.normal_(0, 0.3, generator=generator)
    save_adapter(tuned, tmp_path / "adapter", "base")
    save_gguf(base, tokenizer(), tmp_path / "base.gguf", kind)
    runner = Runner.open(tmp_path / "base.gguf", dtype=torch.float32)
    adapter = loaded(tmp_path / "adapter", runner.config)
    [result] = runner.run([Chunk(IDS, runner.new_cache(), 4, adapter)])
    if kind == "F32":
        merge_lora(tuned)
        by = Runner.from_module(tuned)
        [expected] = by.run([Chunk(IDS, by.new_cache(), 4)])
        # Twice as wide as the others, and logits of up to 20.
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-4)
    else:  # the base is rounded to eight bits, so only that the update arrives
        [without] = runner.run([Chunk(IDS, runner.new_cache(), 4)])
        assert not torch.allclose(result, without, atol=0.1)


def texts(outputs: list[Output]) -> dict[int, str]:
    said: dict[int, str] = {}
    for output in outputs:
        said[output.request_id] = said.get(output.request_id, "") + output.text
    return said


def finish(engine: Engine) -> dict[int, str]:
    outputs = []
    while engine.unfinished:
        engine.step()
        outputs += engine.take()
    return texts(outputs)


def test_adapters_match_merged_models(adapters: list[Path]) -> None:
    engine = Engine(plain(), tokenizer())
    chosen = [None, *(loaded(path, engine.runner.config) for path in adapters)]
    ids = [engine.add(IDS, GREEDY, adapter=adapter) for adapter in chosen]
    result = finish(engine)
    runners = [plain(), *(merged(path) for path in adapters)]
    for request, runner in zip(ids, runners, strict=True):
        alone = Engine(runner, tokenizer())
        alone.add(IDS, GREEDY)
        assert result[request] == finish(alone)[0]
    assert len(set(result.values())) == 3


def test_prefix_cache_separates_adapters(adapters: list[Path]) -> None:
    """The same prompt again, after and beside another adapter's: never its keys and values."""
    engine = Engine(plain(), tokenizer())
    adapter = loaded(adapters[0], engine.runner.config)
    prompt = IDS + IDS[::-1]
    expected = {}
    for which in (None, adapter):
        fresh = Engine(engine.runner, tokenizer(), prefix_bytes=0)
        fresh.add(prompt, GREEDY, adapter=which)
        expected[which] = finish(fresh)[0]
    assert expected[None] != expected[adapter]
    for which in (None, adapter, None, adapter):
        request = engine.add(prompt, GREEDY, adapter=which)
        assert finish(engine)[request] == expected[which]
    engine = Engine(engine.runner, tokenizer(), prefix_bytes=0)
    engine.add(prompt, GREEDY, adapter=adapter)
    engine.step()
    beside = engine.add(prompt, GREEDY)  # while the other runs
    assert finish(engine)[beside] == expected[None]


def test_matcher_can_be_prepared_in_advance() -> None:
    params = SamplingParams(max_tokens=12, regex="(ab|cd)q", seed=1)
    engine = Engine(plain(), tokenizer())
    request = engine.add(IDS, params, matcher=matcher_for(params, tokenizer()))
    assert finish(engine)[request] in ("abq", "cdq")


def test_grammar_constrains_output() -> None:
    lark = 'start: "<" word "," word ">"\nword: /[abq]{1,3}/'
    engine = Engine(plain(), tokenizer())
    request = engine.add(IDS, SamplingParams(max_tokens=40, lark=lark, seed=2))
    first, second = finish(engine)[request].removeprefix("<").removesuffix(">").split(",")
    assert {*first, *second} <= set("abq") and 1 <= len(first) <= 3 and 1 <= len(second) <= 3
