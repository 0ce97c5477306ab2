"""Whole models of each quantised GGUF type: logits, and the memory that is planned for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_blocks import random_blocks
from tiny_models import random_model, tokenizer

from khaosz.inference.linear import native
from khaosz.inference.linear.load import Products
from khaosz.inference.runner import Chunk, Runner, storage_of
from khaosz.interop.gguf.blocks import is_affine
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf

torch.set_num_threads(1)
KINDS = [kind for kind in TENSOR_TYPES if is_affine(kind)]
# Of the steps of a code: all weights are about 0.05, so that no layer outweighs the others.
SCALES = {"Q2_K": 2e-3, "Q3_K": 6e-4, "Q6_K": 3e-5, "Q8_K": 6e-4, "IQ4_XS": 2e-5, "Q4_K": 1e-4}
SCALES |= {"Q5_K": 6e-5, "Q8_0": 6e-4, "IQ4_NL": 6e-4, "MXFP4": 2.0**-7}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "a.gguf"
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "qk_norm": True}
    save_gguf(random_model(320, **sizes), tokenizer(), path, "F32")
    return path


def written(plain: Path, path: Path, kind: str) -> Path:
    """The model with random matrices of a type, all but the embedding."""
    file, tensors = GgufFile.open(plain), []
    for seed, (name, tensor) in enumerate(file.tensors.items()):
        kept = tensor.type, file.raw(name)
        if len(tensor.shape) > 1 and not name.startswith("token_embd"):
            kept = kind, random_blocks(kind, *tensor.shape, seed, SCALES.get(kind, 5e-3))
        tensors.append(TensorToWrite(name, kept[0], tensor.shape, lambda raw=kept[1]: [raw]))
    metadata = {k: bool(v) if v is True or v is False else v for k, v in file.metadata.items()}
    write_gguf(path, metadata, tensors)
    return path


@pytest.mark.parametrize("switch", ["1", "0"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_type(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, switch: str
) -> None:
    monkeypatch.setenv("KHAOSZ_NATIVE", switch)
    path = written(plain, tmp_path / "b.gguf", kind)
    runner = Runner.open(path)
    exact = Runner.from_module(load_gguf(path))
    ids = list(range(20, 60))
    result, expected = (r.run([Chunk(ids, r.new_cache(), 40)])[0] for r in (runner, exact))
    # 16 bits of every input in the compiled kernel, bf16 activations without.
    bound = 1e-3 if native.library() is not None else 0.05
    assert (result - expected).norm() < bound * expected.norm()
    weights = runner.weights()
    assert isinstance(weights.linear, Products)
    source = GgufModel.open(path)
    vectors = sum(4 * shape[0] for shape in source.shapes.values() if len(shape) == 1)
    own = weights.linear.nbytes + weights.head.nbytes + vectors
    assert sum(storage_of(source, "cpu", None).weights(source.config)) == own
