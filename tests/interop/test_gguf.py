"""GGUF: the container, block formats against scalar decoders, models and tokenizers both ways."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_models import mutated, read_directory, read_gguf, valid_directory, valid_gguf
from tiny_models import tiny_model

from khaosz.config import RopeScaling
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import ModelError
from khaosz.interop.gguf.blocks import affine, dequantize, is_affine, quantize
from khaosz.interop.gguf.config import architecture_of
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
from khaosz.interop.huggingface import config_from_hf, model_type
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


def half(raw: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", raw, at)[0])


def decode_block(kind: str, raw: bytes) -> list[float]:
    """One block, weight by weight, from the format's description."""
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        minimum, five = kind[3] == "1", kind[1] == "5"
        d, m = half(raw, 0), half(raw, 2) if minimum else 0.0
        high = int.from_bytes(raw[4 if minimum else 2 :][:4], "little") if five else 0
        data, out = raw[-16:], []
        for i in range(32):
            code = data[i] & 15 if i < 16 else data[i - 16] >> 4
            code |= ((high >> i) & 1) << 4
            out.append(code * d + m if minimum else (code - (16 if five else 8)) * d)
        return out
    if kind == "Q8_0":
        return [q * half(raw, 0) for q in struct.unpack_from("<32b", raw, 2)]
    if kind in ("Q4_K", "Q5_K"):
        d, dmin, packed, out = half(raw, 0), half(raw, 2), raw[4:16], []
        for group in range(8):
            if group < 4:
                scale, low = packed[group] & 63, packed[group + 4] & 63
            else:
                scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
                low = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
            for i in range(32):
                byte = raw[-128 + group // 2 * 32 + i]
                code = byte >> 4 if group % 2 else byte & 15
                if kind == "Q5_K":
                    code |= ((raw[16 + i] >> group) & 1) << 4
                out.append(d * scale * code - dmin * low)
        return out
    assert kind == "Q6_K"
    low, high, scales, d = raw[:128], raw[128:192], raw[192:208], half(raw, 208)
    out = []
    for i in range(256):
        part, rest = divmod(i, 128)
        quarter, j = divmod(rest, 32)
        byte = low[part * 64 + (quarter % 2) * 32 + j]
        code = byte >> 4 if quarter >= 2 else byte & 15
        code |= ((high[part * 32 + j] >> (2 * quarter)) & 3) << 4
        scale = struct.unpack_from("<b", scales, i // 16)[0]
        out.append(d * scale * (code - 32))
    return out


@pytest.mark.parametrize("kind", [k for k in TENSOR_TYPES if is_affine(k)])
def test_blocks_are_decoded_per_format(kind: str) -> None:
    rng = np.random.default_rng(1)
    _, block, size = TENSOR_TYPES[kind]
    raw = rng.integers(0, 256, (6, 2 * size), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for at in halves.get(kind, [0]):
        values = rng.normal(size=12).astype("<f2").view(np.uint8).reshape(6, 2, 2)
        raw.reshape(6, 2, size)[:, :, at : at + 2] = values
    result = dequantize(raw, kind)
    expected = [
        [v for b in range(2) for v in decode_block(kind, bytes(row[b * size : (b + 1) * size]))]
        for row in raw
    ]
    # Every product fits fp32's 24 bits; the one difference of two rounds once.
    np.testing.assert_allclose(result, np.array(expected), rtol=1e-6, atol=1e-5)
    groups = affine(raw, kind)
    assert groups.codes.max() < 2**groups.bits and groups.codes.shape == (6, 2 * block)


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
    good[at : at + 4] = struct.pack("<I", 23)
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_v\.weight' is of unsupported type IQ4_XS"):
        GgufFile(memoryview(bytes(good)), "x")


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
