"""GGUF at its edges: any metadata, any bytes, odd settings, numbers that a format cannot hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_tokenizers import BYTES, FOREIGN, GPT2, LLAMA3, foreign, split
from fuzz_models import SHAPE, valid_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tokenizers import normalizers, pre_tokenizers

from khaosz.config import RopeScaling
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.errors import ModelError, one_line, quoted
from khaosz.interop.gguf.blocks import dequantize, quantize
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
from khaosz.interop.gguf.tokenizer import tokenizer_from_metadata, tokenizer_to_metadata
from khaosz.interop.huggingface import save_model
from khaosz.interop.huggingface_config import config_to_hf
from khaosz.interop.modelfile import write_modelfile
from khaosz.interop.models import convert, load_model, open_tokenizer
from khaosz.model import Transformer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the quick brown fox 你好，世界。"] * 20), 300)


def model(**changes: Any) -> Transformer:
    return tiny_model(**{**SHAPE, "vocab_size": 300, **changes})


# --------------------------------------------------------------------------------------- container

SINGLES = st.floats(width=32, allow_nan=False)
VALUES = (
    st.booleans()
    | st.integers(0, 2**32 - 1)
    | SINGLES
    | st.text()
    | st.lists(st.text(), max_size=5)
)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.tuples(st.sampled_from(list(TENSOR_TYPES)), st.integers(1, 3), st.integers(1, 2)),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=20), VALUES, max_size=6), TENSORS, st.randoms())
def test_written_file_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[str, int, int]],
    random: Any,
) -> None:
    metadata.pop("general.alignment", None)
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    written, raws = [], {}
    for name, (kind, rows, blocks) in tensors.items():
        _, block, size = TENSOR_TYPES[kind]
        raw = np.frombuffer(random.randbytes(rows * blocks * size), np.uint8).reshape(rows, -1)
        raws[name] = raw
        # In two pieces, as a writer of one slice at a time gives them.
        pieces = [raw[:1], raw[1:]]
        written.append(TensorToWrite(name, kind, (rows, blocks * block), lambda p=pieces: p))
    write_gguf(path, metadata, written)
    file = GgufFile.open(path)
    assert file.metadata == metadata and list(file.tensors) == list(tensors)
    for name, raw in raws.items():
        np.testing.assert_array_equal(file.raw(name), raw)
        assert file.tensors[name].offset % 32 == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([0, 4, 8, 24]))
def test_random_bytes_are_rejected_or_read(noise: bytes, keep: int) -> None:
    """After the first bytes of a good head, so that some of it gets past the first checks."""
    try:
        GgufFile(memoryview(valid_gguf()[:keep] + noise), "noise")
    except ModelError as error:
        assert str(error).startswith("noise: ")


def test_file_truncated_anywhere_is_rejected() -> None:
    whole = valid_gguf()
    for end in [*range(2500), *range(2500, len(whole) - 32, 97), len(whole) - 32]:
        with pytest.raises(ModelError):
            GgufFile(memoryview(whole[:end]), "cut")


def head(pairs: bytes, tensors: bytes = b"", *, n: tuple[int, int], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n[1], n[0]) + pairs + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    extents = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + extents + struct.pack("<IQ", kind, offset)


ONE = pair("a", 4, struct.pack("<I", 1))
HUGE = 2**64 - 1
REFUSED: dict[str, tuple[bytes, str]] = {
    "too many tensors": (head(bytes(32 * 100_001), n=(0, 100_001)), "100,001 tensors .* too many"),
    "a key twice": (head(ONE * 2, n=(2, 0)), "key 'a' comes twice"),
    "a tensor twice": (
        head(b"", entry("t", (1,), 0, 0) * 2 + bytes(64), n=(0, 2)),
        "tensor 't' comes twice",
    ),
    "an endless text": (
        head(pair("a", 8, struct.pack("<Q", HUGE)), n=(1, 0)),
        "the text of 'a' needs 18,446,744,073,709,551,615 bytes",
    ),
    "endless numbers": (
        head(pair("a", 9, struct.pack("<IQ", 12, HUGE)), n=(1, 0)),
        "cut short: 'a' needs",
    ),
    "endless texts": (
        head(pair("a", 9, struct.pack("<IQ", 8, HUGE)), n=(1, 0)),
        "claims 18,446,744,073,709,551,615 texts",
    ),
    "a text that runs out": (
        head(pair("a", 9, struct.pack("<IQQ", 8, 1, 9)), n=(1, 0)),
        "cut short: a text of 'a'",
    ),
    "arrays of arrays": (
        head(pair("a", 9, struct.pack("<IQ", 9, 1) + bytes(20)), n=(1, 0)),
        "array of unsupported type 9",
    ),
    "an unknown kind": (head(pair("a", 13, bytes(8)), n=(1, 0)), "unknown type 13"),
    "not UTF-8": (head(pair("a", 8, struct.pack("<Q", 1) + b"\xff"), n=(1, 0)), "not UTF-8"),
    "a long key": (head(struct.pack("<Q", 65_536) + bytes(65_540), n=(1, 0)), "longer than 65,535"),
    "an alignment of 12": (
        head(pair("general.alignment", 4, struct.pack("<I", 12)), n=(1, 0)),
        "general.alignment 12 is not",
    ),
    "an alignment of text": (
        head(pair("general.alignment", 8, text("no")), n=(1, 0)),
        "general.alignment 'no' is not",
    ),
    "no dimension": (head(b"", entry("t", (), 0, 0) + bytes(64), n=(0, 1)), "has 0 dimensions"),
    "nine dimensions": (head(b"", entry("t", (1,) * 9, 0, 0), n=(0, 1)), "has 9 dimensions"),
    "no element": (
        head(b"", entry("t", (0, 5), 0, 0) + bytes(64), n=(0, 1)),
        r"has shape \(5, 0\)",
    ),
    "half a block": (
        head(b"", entry("t", (33,), 8, 0) + bytes(64), n=(0, 1)),
        "not whole blocks of 32",
    ),
    # 2^32 * 2^32 elements: 64-bit arithmetic would say none at all.
    "a size that wraps": (
        head(b"", entry("t", (2**32, 2**32), 0, 0) + bytes(64), n=(0, 1)),
        "outside the file",
    ),
    "an offset that wraps": (
        head(b"", entry("t", (8,), 0, 2**64 - 32) + bytes(64), n=(0, 1)),
        "outside the file",
    ),
    "an offset between": (
        head(b"", entry("t", (1,), 0, 4) + bytes(96), n=(0, 1)),
        "off its alignment",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_head_that_differs_from_tied_embedding_is_rejected(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        GgufFile(memoryview(content), "x")


def test_version_2_and_other_alignments_are_read() -> None:
    numbers = np.arange(8, dtype="<f4")
    pairs = pair("general.alignment", 4, struct.pack("<I", 64))
    content = head(pairs, entry("t", (4, 2), 0, 64), n=(1, 1), version=2)
    content += bytes(-len(content) % 64 + 64) + numbers.tobytes()
    file = GgufFile(memoryview(content), "x")
    assert file.tensors["t"].shape == (2, 4)
    np.testing.assert_array_equal(dequantize(file.raw("t"), "F32"), numbers.reshape(2, 4))


def test_raw_rows_are_views_of_the_file() -> None:
    whole = np.frombuffer(valid_gguf(), np.uint8)
    raw = GgufFile(memoryview(whole), "x").raw("token_embd.weight")
    assert np.shares_memory(raw, whole) and not raw.flags.writeable


def test_names_from_files_are_quoted_on_one_short_line() -> None:
    evil = "\x1b[2J\n" + "x" * 60_000
    with pytest.raises(ModelError) as caught:
        GgufFile(memoryview(head(pair(evil, 99, bytes(4)), n=(1, 0))), "x")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    assert quoted("a'b") == '"a\'b"' and quoted(np.zeros((3, 2))).isprintable()
    assert one_line("a\tb\x00") == "a\\tb\\x00" and len(one_line("y" * 10_000)) < 500


# ------------------------------------------------------------------------------------------ blocks


def test_rounding_matches_c() -> None:
    """Halves away from zero, and the largest number below a half down."""
    row = np.zeros((1, 32), dtype=np.float32)
    row[0, :6] = [127, 0.5, -0.5, 2.5, np.nextafter(np.float32(0.5), np.float32(0)), -126.5]
    codes = quantize(row, "Q8_0")[0, 2:].view(np.int8)
    assert codes[:6].tolist() == [127, 1, -1, 3, 0, -127]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-9])
def test_weights_below_smallest_scale_become_zero(kind: str, search: bool, size: float) -> None:
    weights = np.linspace(-size, size, 64, dtype=np.float32)[None]
    back = dequantize(quantize(weights, kind, search=search), kind)
    # The smallest fp16 scale is 6e-8; half of it, 128 codes wide, is the most that can be lost.
    assert np.isfinite(back).all() and np.abs(back - weights).max() <= 128 * 3e-8


@pytest.mark.parametrize(
    ("kind", "value"),
    [("F16", 7e4), ("Q8_0", 7e4), ("Q4_1", float("nan")), ("F32", float("inf")), ("BF16", 3.4e38)],
)
def test_weights_out_of_range_of_type_are_rejected(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, value: float
) -> None:
    broken = model()
    with torch.no_grad():
        broken.layers[0].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(ModelError, match=r"'layers\.0\.mlp\.up_proj\.weight' has a weight of"):
        save_gguf(broken, tokenizer, tmp_path / "a.gguf", kind)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ models


def changed(tmp_path: Path, tokenizer: Tokenizer, extra: dict[str, Any]) -> GgufModel:
    """A model whose metadata has been changed."""
    save_gguf(model(), tokenizer, tmp_path / "a.gguf", "F32")
    file = GgufFile.open(tmp_path / "a.gguf")
    tensors = [
        TensorToWrite(name, t.type, t.shape, lambda name=name: [file.raw(name)])
        for name, t in file.tensors.items()
    ]
    write_gguf(tmp_path / "b.gguf", {**file.metadata, **extra}, tensors)
    return GgufModel.open(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        # Sizes of which a table of frequencies would take all memory.
        ({"llama.attention.key_length": 2**31}, r"value_length = 16 is not supported"),
        ({"llama.attention.head_count": 2**31}, r"value_length = 16|not \("),
        ({"llama.attention.value_length": 8}, r"value_length = 8 is not supported"),
        ({"llama.attention.sliding_window": 16}, "sliding windows"),
        (
            {"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 4.0},
            r"scaling.factor = 4 contradicts llama.rope.scale_linear = 2",
        ),
        ({"llama.rope.scaling.type": "linear"}, r"scaling.factor' is missing"),
        ({"llama.rope.scaling.yarn_attn_factor": 2.0}, r"yarn_attn_factor = 2 is not supported"),
        ({"llama.vocab_size": 7}, r"vocab_size = 7 contradicts the 300 rows"),
        ({"llama.rope.scaling.attn_factor": 0.5}, r"attn_factor = 0.5 is not supported"),
        ({"llama.block_count": True}, "block_count = True is not a whole number"),
        ({"llama.context_length": np.array([1, 2], dtype=np.int32)}, "is not a whole number"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 32,
                "llama.rope.freq_base": 1.0,
            },
            "rotary settings cannot be computed",
        ),
    ],
    ids=str,
)
def test_unsupported_settings_are_rejected_by_name(
    tmp_path: Path, tokenizer: Tokenizer, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        changed(tmp_path, tokenizer, extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.rope.scale_linear": 2.0},  # the older name
        {"llama.rope.scaling.factor": 2.0},  # linear where no type is given, as in llama.cpp
        {"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 2.0},
    ],
    ids=str,
)
def test_linear_scaling_by_every_name(
    tmp_path: Path, tokenizer: Tokenizer, extra: dict[str, Any]
) -> None:
    scaling = changed(tmp_path, tokenizer, extra).config.rope_scaling
    assert scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_sliding_window_as_long_as_context_is_ignored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    opened = changed(tmp_path, tokenizer, {"llama.attention.sliding_window": 64})
    assert opened.config.max_position_embeddings == 64


def test_llama3_scaling_round_trip(tmp_path: Path, tokenizer: Tokenizer) -> None:
    scaling = RopeScaling(
        rope_type="llama3",
        factor=3.0,
        low_freq_factor=1.5,
        high_freq_factor=5.0,
        original_max_position_embeddings=77,
    )
    before = model(rope_scaling=scaling)
    save_gguf(before, tokenizer, tmp_path / "a.gguf", "F32")
    assert load_gguf(tmp_path / "a.gguf").config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"vocab_size": 2**62}, "vocab_size"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"layer_types": 5}, "layer_types"),
        ({"rms_norm_eps": [[]]}, "rms_norm_eps"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope scaling requires"),
    ],
    ids=str,
)
def test_hostile_configs_are_rejected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_model(model(), tmp_path)
    values = {**config_to_hf(model().config), **changes}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_unparsable_json_is_rejected(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model(tmp_path)


# -------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", FOREIGN)
@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40) | st.text("a 1½²b٣'s\n\t"))
def test_foreign_tokenizers_round_trip(name: str, sample: str) -> None:
    before = FOREIGN[name]()
    metadata = tokenizer_to_metadata(before, before.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == name
    after = tokenizer_from_metadata(metadata, "x")
    if name != "qwen2":  # whose NFC llama.cpp leaves out, as its converter does
        assert after.encode(sample) == before.encode(sample)
    assert after.decode(after.encode(sample)) == sample
    assert after.special_ids == before.special_ids


@pytest.mark.parametrize(
    "make",
    [
        lambda: foreign(pre_tokenizers.Whitespace()),
        lambda: foreign(pre_tokenizers.Sequence([split(r"\d+"), BYTES])),
        lambda: foreign(GPT2, normalizers.Lowercase()),
        lambda: foreign(pre_tokenizers.Sequence([split(LLAMA3), BYTES])),  # with merges
        lambda: foreign(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ],
)
def test_tokenizers_unknown_to_llama_cpp_are_rejected(make: Any) -> None:
    tokenizer = make()
    with pytest.raises(ModelError, match="no name in llama"):
        tokenizer_to_metadata(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("token_id", [-1, 300])
def test_token_ids_outside_vocabulary_are_rejected(tokenizer: Tokenizer, token_id: int) -> None:
    metadata = tokenizer_to_metadata(tokenizer, 300)
    metadata["tokenizer.ggml.bos_token_id"] = token_id
    with pytest.raises(ModelError, match=f"bos_token_id {token_id} is not in the vocabulary"):
        tokenizer_from_metadata(metadata, "x")


def test_modelfile_has_system_prompt_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Ollama gives it twice, in .System and among .Messages."""
    chatml = foreign(GPT2)
    chatml.config["chat_template"] = "{{ '<|im_start|>' }}"
    for source in (tokenizer, chatml):
        path = write_modelfile(tmp_path / "x.gguf", source, 64)
        assert path is not None
        written = path.read_text(encoding="utf-8")
        assert written.count("{{ .System }}") == 1
        assert 'eq .Role "user"' in written or 'ne .Role "system"' in written
    assert 'PARAMETER stop "<|im_end|>"' in written
    chatml.config["chat_template"] = "{{ 'another' }}"
    assert write_modelfile(tmp_path / "sub" / "x.gguf", chatml, 64) is None


def test_tokenizer_survives_conversion_through_gguf(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(model(), tmp_path / "a", eos_ids=[tokenizer.eos_id])
    tokenizer.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.gguf")
    convert(tmp_path / "b.gguf", tmp_path / "c")
    again = open_tokenizer(tmp_path / "c")
    assert again.chat_template == tokenizer.chat_template
    assert again.special_ids == tokenizer.special_ids
