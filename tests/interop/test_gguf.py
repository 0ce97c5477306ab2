"""GGUF: the container, block formats against scalar decoders, models and tokenizers both ways."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_models import mutated, read_directory, read_gguf, valid_directory, valid_gguf
from gguf_blocks import decode_block, random_blocks
from tiny_models import tiny_model

from khaosz.config import RopeScaling
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import ModelError
from khaosz.interop.gguf.blocks import affine, dequantize, is_affine, quantize
from khaosz.interop.gguf.config import architecture_of
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
from khaosz.interop.huggingface_config import config_from_hf, model_type
from khaosz.interop.models import convert, load_model, open_tokenizer
from khaosz.model import Transformer, parameter_shapes

torch.set_num_threads(1)

TEXT = "Hello, world! I'm 2024 years old.\n\n  你好，世界。  naïve 🙂 x==1;\t'quoted'"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the quick brown fox 你好，世界。"] * 20), 300)


def model(vocab_size: int = 300, **changes: Any) -> Transformer:
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": vocab_size}
    return tiny_model(**{**shape, **changes})


def logits(of: Transformer) -> torch.Tensor:
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        return of.logits(of(ids))


# ------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("kind", [k for k in TENSOR_TYPES if is_affine(k)])
def test_blocks_are_decoded_per_format(kind: str) -> None:
    _, block, size = TENSOR_TYPES[kind]
    raw = random_blocks(kind, 6, 2 * block)
    result = dequantize(raw, kind)
    expected = [
        [v for b in range(2) for v in decode_block(kind, bytes(row[b * size : (b + 1) * size]))]
        for row in raw
    ]
    # In float64. Ours rounds once, minima twice.
    np.testing.assert_allclose(result, np.array(expected), rtol=1e-6, atol=1e-5)
    groups = affine(raw, kind)
    assert groups.codes.max() < 2**groups.bits and groups.codes.shape == (6, 2 * block)
    group_of = np.arange(2 * block) // groups.group
    again = groups.codes * groups.scales[:, group_of] + groups.offsets[:, group_of]
    np.testing.assert_allclose(again, result, rtol=1e-5, atol=1e-3)  # code * scale cancels


# SHA-256 of what gguf-py 0.19 decodes these random bytes to, NaN and infinity replaced.
GGUF_PY = {
    "F32": "ab205ded840b0d4e",
    "F16": "d46ea87944f5078b",
    "Q4_0": "9804f8b1951ea501",
    "Q4_1": "66c69734e80a6e51",
    "Q5_0": "44ea5aa1acc0aa32",
    "Q5_1": "02cdf739677ce39e",
    "Q8_0": "9c6fffcfa5e4d440",
    "Q2_K": "4a521adc77fae206",
    "Q3_K": "2beb864529742b40",
    "Q4_K": "0bb712fc354fbdff",
    "Q5_K": "c7faf4470f25a978",
    "Q6_K": "da52287daaf4fa39",
    "IQ4_NL": "56e6e3e607aa3fda",
    "IQ4_XS": "e818315e6bef5241",
    "BF16": "932ad04f189f6388",
    "MXFP4": "b08f7f3c3e8d74b9",
}


def random_bytes(kind: str) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (40, 4 * TENSOR_TYPES[kind][2]), dtype="u1")


@pytest.mark.parametrize("kind", GGUF_PY)
def test_values_are_those_of_gguf_py_to_the_bit(kind: str) -> None:
    """Of any bytes: also where scales are negative, infinite or subnormal."""
    values = np.nan_to_num(dequantize(random_bytes(kind), kind))
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == GGUF_PY[kind]


@pytest.mark.parametrize("kind", GGUF_PY)
@np.errstate(all="ignore")
def test_values_are_those_of_the_installed_gguf_py(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = random_bytes(kind)
    assert TENSOR_TYPES[kind][0] == gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dequantize(raw, kind), expected)


@pytest.mark.parametrize(
    ("kind", "worst"),  # of the group's largest weight: half a step, and halves of 11 bits
    [
        ("F32", 0.0),
        ("F16", 2**-11),
        ("BF16", 2**-8),
        ("Q8_0", 0.6 / 127),
        ("Q4_0", 0.13),
        ("Q4_1", 0.1),
    ],
)
@pytest.mark.parametrize("search", [False, True])
def test_quantising_error_is_within_half_a_step(kind: str, worst: float, search: bool) -> None:
    weights = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    weights[3] = 0.0
    back = dequantize(quantize(weights, kind), kind)
    largest = np.abs(weights).reshape(8, 2, 32).max(axis=2)
    error = np.abs(back - weights).reshape(8, 2, 32).max(axis=2)
    assert (error <= worst * largest + 1e-7).all()
    if search:
        result = dequantize(quantize(weights, kind, search=True), kind)
        assert np.square(result - weights).sum() <= np.square(back - weights).sum()


# ------------------------------------------------------------------------------------------ models

FAMILIES: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True},
    {"qk_norm": True},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 4},
    {"rope_scaling": RopeScaling(rope_type="linear", factor=4.0)},
    {
        "rope_scaling": RopeScaling(
            rope_type="llama3", factor=8.0, original_max_position_embeddings=8192
        )
    },
    {
        "qk_norm": True,
        "rope_scaling": RopeScaling(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32
        ),
    },
]


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
def test_model_round_trip(tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    before = model(**changes)
    save_gguf(before, tokenizer, tmp_path / "a.gguf", "F32")
    after = load_gguf(tmp_path / "a.gguf")
    assert after.config.model_dump(exclude={"rope_scaling", "initializer_range"}) == (
        before.config.model_dump(exclude={"rope_scaling", "initializer_range"})
    )
    # Norm epsilon and theta pass through fp32, weights unchanged.
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-5, atol=1e-5)


def test_llama_rows_are_in_llama_cpp_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """convert_hf_to_gguf.py's permutation, written out."""
    before = model()
    save_gguf(before, tokenizer, tmp_path / "a.gguf", "F32")
    file = GgufFile.open(tmp_path / "a.gguf")
    stored = dequantize(file.raw("blk.0.attn_k.weight"), "F32")
    rows = before.layers[0].self_attn.k_proj.weight.detach().numpy()
    for head in range(2):
        for i in range(8):
            np.testing.assert_array_equal(stored[head * 16 + 2 * i], rows[head * 16 + i])
            np.testing.assert_array_equal(stored[head * 16 + 2 * i + 1], rows[head * 16 + 8 + i])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_rows_are_copied_bitwise(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    before = model()
    save_gguf(before, tokenizer, tmp_path / "a.gguf", kind)
    source = GgufModel.open(tmp_path / "a.gguf")
    for name, parameter in before.named_parameters():
        if parameter.dim() == 2:
            stored = source.kind(name)
            expected = quantize(parameter.detach().numpy(), stored)
            np.testing.assert_array_equal(source.raw(name), expected, err_msg=name)
    assert source.kind("embed_tokens.weight") == ("Q8_0" if kind.startswith("Q4") else kind)


def test_tokenizer_round_trip(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_gguf(model(512), tokenizer, tmp_path / "a.gguf")  # rows beyond the vocabulary
    metadata = GgufFile.open(tmp_path / "a.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert metadata["tokenizer.ggml.tokens"][511] == "[PAD511]"
    assert "generation %}" not in metadata["tokenizer.chat_template"]
    after = open_tokenizer(tmp_path / "a.gguf")
    chat = [{"role": "user", "content": "<|end|> 你好"}, {"role": "assistant", "content": "Yes."}]
    assert after.encode(TEXT) == tokenizer.encode(TEXT) and after.decode(after.encode(TEXT)) == TEXT
    assert encode_chat(after, chat)[0] == encode_chat(tokenizer, chat)[0]
    assert (after.bos_id, after.eos_id, after.end_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.end_id,
    )
    assert after.begins_with_bos and tokenizer.begins_with_bos


def test_conversion_round_trip(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_gguf(model(), tokenizer, tmp_path / "a.gguf", "F32")
    convert(tmp_path / "a.gguf", tmp_path / "directory")
    convert(tmp_path / "directory", tmp_path / "sub" / "b.gguf", kind="F32")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "sub" / "b.gguf")), logits(model()), rtol=1e-5, atol=1e-5
    )
    written = (tmp_path / "sub" / "Modelfile").read_text(encoding="utf-8")
    assert written.startswith("FROM ./b.gguf\n") and 'PARAMETER stop "<|end|>"' in written
    assert "{{ .Content }}<|end|>" in written and "num_ctx 128" in written
    with pytest.raises(ModelError, match="exists"):
        convert(tmp_path / "a.gguf", tmp_path / "directory")
    with pytest.raises(ModelError, match="have the same format"):
        convert(tmp_path / "a.gguf", tmp_path / "c.gguf")
    with pytest.raises(ModelError, match="cannot write tensors of type 'Q3'"):
        convert(tmp_path / "directory", tmp_path / "d.gguf", kind="Q3")
    assert not (tmp_path / "d.gguf").exists()


@pytest.mark.parametrize("changes", FAMILIES[:5], ids=str)
def test_parameter_shapes_match_module(changes: dict[str, Any]) -> None:
    built = model(**changes)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert parameter_shapes(built.config) == shapes


def test_mistral_is_llama_without_a_window() -> None:
    values: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "sliding_window": None,
    }
    assert model_type(config_from_hf(values)) == "llama"
    assert config_from_hf({**values, "sliding_window": 4096}).head_dim == 16
    windowed = config_from_hf({**values, "sliding_window": 1024})
    assert (model_type(windowed), windowed.window(0)) == ("mistral", 1024)
    with pytest.raises(ModelError, match="has no architecture for mistral models"):
        architecture_of(windowed)


# --------------------------------------------------------------------------------------- bad input


def rewritten(path: Path, name: str, **changes: Any) -> Path:
    """A copy of a file with changed metadata or tensors (None takes one away)."""
    file = GgufFile.open(path)
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) and value.dtype == bool else value
        for key, value in file.metadata.items()
    }
    tensors = {
        key: TensorToWrite(key, t.type, t.shape, lambda key=key: [file.raw(key)])
        for key, t in file.tensors.items()
    }
    for key, value in changes.pop("metadata", {}).items():
        metadata[key] = value
        if value is None:
            del metadata[key]
    for key, value in changes.pop("tensors", {}).items():
        tensors.pop(key, None)
        if value is not None:
            zeros = np.zeros(value, dtype=np.float32)
            tensors[key] = TensorToWrite(key, "F32", value, lambda z=zeros: [z.view(np.uint8)])
    out = path.with_name(name)
    write_gguf(out, metadata, list(tensors.values()))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.architecture": "mamba"}}, "architecture 'mamba'"),
        ({"metadata": {"llama.block_count": None}}, "'llama.block_count' is missing"),
        ({"metadata": {"llama.block_count": 10**6}}, "1000000 blocks"),
        (
            {"metadata": {"llama.embedding_length": "wide"}},
            "embedding_length = 'wide' is not a whole number",
        ),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope'"),
        (
            {"metadata": {"llama.rope.dimension_count": 8}},
            r"rope\.dimension_count = 8 is not supported",
        ),
        ({"metadata": {"llama.expert_count": 8}}, "mixtures of experts"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "'blk.1.ffn_up.weight' is missing"),
        ({"tensors": {"blk.1.ffn_up.weight": (96, 32)}}, r"is \(96, 32\), not \(96, 64\)"),
        ({"tensors": {"blk.7.extra": (2, 2)}}, "unexpected tensor 'blk.7.extra'"),
        ({"tensors": {"rope_freqs.weight": (8,)}}, "no known scaling"),
    ],
    ids=str,
)
def test_unsupported_models_are_rejected_by_name(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any], message: str
) -> None:
    save_gguf(model(), tokenizer, tmp_path / "a.gguf", "F32")
    with pytest.raises(ModelError, match=message):
        GgufModel.open(rewritten(tmp_path / "a.gguf", "b.gguf", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id 1000000"),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id is missing"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "'zz zz' is not made of tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens with 300 types"),
    ],
    ids=str,
)
def test_unsupported_tokenizers_are_rejected_by_name(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any], message: str
) -> None:
    save_gguf(model(), tokenizer, tmp_path / "a.gguf", "F32")
    path = rewritten(tmp_path / "a.gguf", "b.gguf", metadata=changes)
    with pytest.raises(ModelError, match=message):
        open_tokenizer(path)


def test_malformed_files_are_rejected(tmp_path: Path) -> None:
    good = valid_gguf()
    cases: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "empty"),
        "other": (b"PK\3\4" + good[4:], "not a GGUF file"),
        "version": (good[:4] + struct.pack("<I", 9) + good[8:], "version 9"),
        "big": (good[:4] + struct.pack(">I", 3) + good[8:], "big-endian"),
        "cut": (good[:-40], "lies outside the file"),
        "head": (good[:60], "cut short|cannot fit"),
        "counts": (good[:8] + struct.pack("<QQ", 2**63, 2**63) + good[24:], "cannot fit"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            GgufFile.open(path)
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile.open(tmp_path / "none.gguf")


def test_unknown_tensor_types_are_named(tmp_path: Path) -> None:
    good = bytearray(valid_gguf())
    at = good.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 16
    message = r"'blk\.0\.attn_v\.weight' is of unsupported type"
    for number, name, hint in (
        (21, "IQ3_S", "the nearest is Q3_K"),
        (99, "number 99", "supported"),
    ):
        good[at : at + 4] = struct.pack("<I", number)
        with pytest.raises(ModelError, match=f"{message} {name}") as error:
            GgufFile(memoryview(bytes(good)), "x")
        assert error.value.hint and error.value.hint.startswith(hint)


def test_unknown_architectures_name_the_nearest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_gguf(model(), tokenizer, tmp_path / "a.gguf", "F32")
    for name, nearest in (("gemma2", "gemma4"), ("llama4", "llama")):
        path = rewritten(tmp_path / "a.gguf", "b.gguf", metadata={"general.architecture": name})
        with pytest.raises(ModelError, match=f"architecture '{name}' is not supported") as error:
            GgufModel.open(path)
        assert error.value.hint and error.value.hint.startswith(f"the nearest is {nearest}; ")


def test_mutated_files_are_rejected_or_read_within_bounds(tmp_path: Path) -> None:
    """A few thousand here; `python tests/interop/fuzz_models.py 1000000` for the long run."""
    assert read_gguf(valid_gguf()) and read_directory(tmp_path, valid_directory())
    assert sum(mutated(seed, tmp_path) for seed in range(3000)) > 100, "some are harmless"


def test_full_disk_leaves_no_partial_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ModelError, match="No space left"):
        save_gguf(model(), tokenizer, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
