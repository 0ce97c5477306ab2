"""What is computed in which dtype: nothing is rounded to bf16 that a file stores with more bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import random_model, tokenizer

from khaosz.inference.linear.load import DenseMatrix, RefinedHead, SideBySide
from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.gguf.config import config_to_metadata
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import load_gguf, save_gguf
from khaosz.interop.gguf.tokenizer import tokenizer_to_metadata
from khaosz.interop.huggingface import save_model

torch.set_num_threads(1)

IDS = list(range(20, 60))
MODEL = random_model(320, hidden_size=128, intermediate_size=192, head_dim=32, qk_norm=False)
with torch.no_grad():  # calm enough for bf16 to be compared
    for parameter in MODEL.parameters():
        parameter.mul_(0.3 if parameter.dim() == 2 else 1.0)


def write(path: Path, kind: str, other: str = "F32", instead: tuple[str, ...] = ()) -> Path:
    """A file of `kind`, with `other` for the tensors whose names end with one of `instead`."""
    save_gguf(MODEL, tokenizer(), path, kind)
    if not instead:
        return path
    save_gguf(MODEL, tokenizer(), path.with_name("other.gguf"), other)
    files = GgufFile.open(path), GgufFile.open(path.with_name("other.gguf"))
    tensors = []
    for name in files[0].tensors:
        file = files[name.endswith(instead)]
        tensor = file.tensors[name]
        rows = partial(lambda raw: [raw], file.raw(name).copy())
        tensors.append(TensorToWrite(name, tensor.type, tensor.shape, rows))
    metadata = {
        **config_to_metadata(MODEL.config, kind),
        **tokenizer_to_metadata(tokenizer(), MODEL.config.vocab_size),
    }
    write_gguf(path.with_name("mixed.gguf"), metadata, tensors)
    return path.with_name("mixed.gguf")


def logits(runner: Runner) -> torch.Tensor:
    return runner.run([Chunk(IDS, runner.new_cache(), len(IDS))])[0]


def exact(path: Path) -> torch.Tensor:
    return logits(Runner.from_module(load_gguf(path)))


def kinds_of(runner: Runner) -> set[torch.dtype]:
    """Of the dense matrices."""
    weights = runner.weights()
    found = [product.matrix for layer in weights.linear.layers for product in layer.values()]  # type: ignore[attr-defined]
    parts: list[object] = [weights.head]
    for matrix in found:
        parts += matrix.parts if isinstance(matrix, SideBySide) else [matrix]
    return {part.weight.dtype for part in parts if isinstance(part, DenseMatrix)}


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_unquantised_file_is_computed_in_fp32(
    tmp_path: Path, kind: str, deterministic: bool
) -> None:
    path = write(tmp_path / "a.gguf", kind)
    runner = Runner.open(path, deterministic=deterministic)
    assert runner.dtype == runner.cache_dtype == torch.float32
    # fp32 sums in another order, as for the directory of the same weights.
    torch.testing.assert_close(logits(runner), exact(path), rtol=1e-4, atol=1e-4)


def test_unquantised_file_is_computed_in_bf16_when_asked(tmp_path: Path) -> None:
    runner = Runner.open(write(tmp_path / "a.gguf", "F16"), dtype=torch.bfloat16)
    assert runner.dtype == torch.bfloat16 and kinds_of(runner) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_directory_is_computed_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model(320, seed=4).to(dtype)
    save_model(model, tmp_path / "model")
    runner = Runner.open(tmp_path / "model")
    assert runner.dtype == torch.float32
    expected = logits(Runner.from_module(model.float()))
    torch.testing.assert_close(logits(runner), expected, rtol=1e-4, atol=1e-4)


def test_bf16_file_stays_in_bf16_with_exact_logits_of_likely_tokens(tmp_path: Path) -> None:
    """bf16 holds such weights exactly. Its products would give logits in steps of 1/64 and more,
    with ties between the best tokens."""
    path = write(tmp_path / "a.gguf", "BF16")
    runner = Runner.open(path)
    assert runner.dtype == torch.bfloat16
    head = runner.weights().head
    assert isinstance(head, RefinedHead) and kinds_of(runner) == {torch.bfloat16}
    best = logits(runner).topk(8).values
    assert (best != best.bfloat16().float()).any(1).all()
    # bf16 activations through two layers: a few times 2**-8.
    assert (logits(runner) - exact(path)).abs().max() < 0.03 * exact(path).abs().max()


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("other", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "instead", [("output.weight",), ("attn_q.weight", "ffn_down.weight", "output.weight")]
)
def test_unquantised_matrices_of_a_quantised_file_are_not_rounded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    native: str,
    other: str,
    instead: tuple[str, ...],
) -> None:
    monkeypatch.setenv("KHAOSZ_NATIVE", native)
    path = write(tmp_path / "a.gguf", "Q8_0", other, instead)
    runner = Runner.open(path)
    assert kinds_of(runner) == {torch.float32}
    expected, result = exact(path), logits(runner)
    if runner.dtype == torch.float32:  # the kernel: half a step of 1 / 32767 of the inputs
        assert (result - expected).abs().max() < 1e-3 * expected.abs().max()
    else:  # PyTorch's kernel takes bf16
        assert (result - expected).abs().max() < 0.03 * expected.abs().max()
