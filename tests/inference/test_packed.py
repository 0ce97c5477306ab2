"""Quantised matrices and whole quantised models against their dequantised selves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_blocks import random_blocks
from tiny_models import random_model, tokenizer

from khaosz.inference.engine import Engine
from khaosz.inference.linear import packed
from khaosz.inference.linear.packed import pack, packable
from khaosz.inference.runner import Chunk, Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.gguf.blocks import affine, quantize
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf

torch.set_num_threads(1)


def raw_rows(kind: str, rows: int, columns: int) -> np.ndarray:
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        rng = np.random.default_rng(0)
        return quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    return random_blocks(kind, rows, columns)


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
)
@pytest.mark.parametrize("quick", [True, False])
def test_product_matches_dequantised_weights(
    kind: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:  # the way of a processor whose layout we don't know
        monkeypatch.setattr(packed, "_layout_is_known", lambda: False)
    raws = [raw_rows(kind, 320, 512), raw_rows(kind, 64, 512)]
    matrix = pack(raws, kind)
    dense = torch.from_numpy(np.concatenate([affine(raw, kind).dense() for raw in raws]))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    result, expected = matrix(x).float(), x.float() @ dense.t()
    # Scales, zeros and the output are bf16: 2**-9 each of terms that partly cancel.
    assert (result - expected).abs().max() < 2**-7 * expected.abs().max()
    assert matrix.nbytes < dense.nbytes / (3 if affine(raws[0], kind).bits > 4 else 6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_long_prompt_uses_int8_products(kind: str) -> None:
    raws = [raw_rows(kind, 576, 1024)]
    matrix = pack(raws, kind)
    dense = torch.from_numpy(affine(raws[0], kind).dense())
    x = torch.randn(200, 1024, generator=torch.Generator().manual_seed(1))
    x[7] = 0.0
    x[:, 3] *= 100  # an outlier, as real models have them
    x = x.bfloat16()
    result, expected = matrix(x).float(), x.float() @ dense.t()
    near = torch.cat([matrix(part).float() for part in x.split(100)])
    assert not torch.equal(result, near), "it took the other way"
    # The stated error, measured over the whole product.
    assert (result - expected).norm() < 2**-6 * expected.norm()
    assert (near - expected).norm() < 2**-8 * expected.norm()
    assert not result[7].any()


def test_matrices_of_unsupported_shape_are_not_packed() -> None:
    assert packable(128, 64, 32, 4)
    assert not packable(100, 64, 32, 4)
    assert not packable(128, 64, 16, 6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_model_is_close_to_dequantised_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    monkeypatch.setenv("KHAOSZ_NATIVE", "0")
    model = random_model(
        320,
        hidden_size=128,
        intermediate_size=192,
        head_dim=32,
        tie_word_embeddings=tied,
        qkv_bias=True,
        qk_norm=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.3)
    save_gguf(model, tokenizer(), tmp_path / "a.gguf", kind)
    runner = Runner.open(tmp_path / "a.gguf")
    exact = Runner.from_module(load_gguf(tmp_path / "a.gguf"))
    plain = Runner.open(tmp_path / "a.gguf", dtype=torch.float32)
    ids = list(range(20, 60))
    a, b, c = (r.run([Chunk(ids, r.new_cache(), 40)])[0] for r in (runner, exact, plain))
    # bf16 activations through two layers: a few times 2**-8.
    assert (a - b).abs().max() < 0.03 * b.abs().max()
    torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-4)  # fp32, in another order


@pytest.mark.parametrize("native", ["1", "0"])
def test_quantised_model_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    monkeypatch.setenv("KHAOSZ_NATIVE", native)
    model = random_model(320, hidden_size=128, intermediate_size=192, head_dim=32)
    save_gguf(model, tokenizer(), tmp_path / "a.gguf", "Q4_0")
    source = GgufModel.open(tmp_path / "a.gguf")
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1)

    def answers(step_tokens: int, together: bool, lookup: bool) -> list[object]:
        runner = Runner.from_gguf(source, deterministic=True)
        engine = Engine(runner, source.tokenizer(), step_tokens=step_tokens, prompt_lookup=lookup)
        summary: dict[int, list[object]] = {}
        for prompt in ([5, 6, 7, 5, 6], list(range(30, 70))):
            summary[engine.add(prompt, params)] = []
            while engine.unfinished and not together:
                engine.step()
        while engine.unfinished:
            engine.step()
        for output in engine.take():
            summary[output.request_id] += [output.token_ids, output.logprobs]
        # How tokens are grouped in outputs is not the question.
        return [
            [t for part in parts for t in part]  # type: ignore[attr-defined]
            for parts in (summary[0][::2], summary[0][1::2], summary[1][::2], summary[1][1::2])
        ]

    alone = answers(512, together=False, lookup=False)
    assert answers(7, together=True, lookup=False) == alone
    assert answers(512, together=True, lookup=True) == alone
