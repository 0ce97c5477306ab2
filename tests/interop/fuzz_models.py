"""Mutated model files: only a `KhaoszError` may come out, in bounded time and memory.

    python tests/interop/fuzz_models.py 1000000

Half are GGUF, parsed from a buffer by us: of a file that passes, every tensor is decoded, and its
model and tokenizer are built. The others are Hugging Face directories with a mutated safetensors
file, whose header is parsed by that library, or a mutated config.json.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from khaosz.config import ModelConfig
from khaosz.errors import KhaoszError, ModelError
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.interop.gguf.blocks import dequantize
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import WEIGHTS, load_model, save_model
from khaosz.model import Transformer, parameter_shapes

SHAPE: dict[str, Any] = {
    "vocab_size": 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# Numbers at the edges of what counts, lengths and offsets are kept in, and one of few terabytes.
_EDGES = (0, 1, 7, 31, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1, 2**42)
_WORDS = (b"llama", b"F32", b"F16", b"F4", b"F8_E5M2", b"I8", b"C64", b"BOOL", b"U64", b"BF16")
_WORDS += (b"null", b"-1", b"1e999", b"true", b"[]", b"{}", b'""', b"\xff", b"99999999999999999999")


@cache
def valid_gguf() -> bytes:
    """A whole small model: every kind of metadata, several types of tensor, a tokenizer."""
    rng = np.random.default_rng(0)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.feed_forward_length": 32,
        "llama.context_length": 64,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], dtype=np.int32),
        "tokenizer.ggml.scores": np.zeros(4, dtype=np.float32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    kinds = {"embed_tokens": "Q8_0", "q_proj": "Q4_0", "k_proj": "Q5_1", "up_proj": "Q4_1"}
    tensors, shapes = [], parameter_shapes(ModelConfig(**SHAPE))
    places = ARCHITECTURES["llama"].layout.stored(shapes)
    for name, shape in shapes.items():
        kind = "F32" if len(shape) == 1 else kinds.get(name.split(".")[-2], "F16")
        _, block, size = TENSOR_TYPES[kind]
        raw = rng.integers(0, 256, int(np.prod(shape)) // block * size, dtype=np.uint8)
        tensors.append(TensorToWrite(places[name].name, kind, shape, lambda r=raw: [r]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid.gguf"
        write_gguf(path, metadata, tensors)
        return path.read_bytes()


@cache
def valid_directory() -> dict[str, bytes]:
    """config.json and weights of a Hugging Face directory."""
    model = Transformer(ModelConfig(**SHAPE))
    model.initialise(torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        return {name: (Path(folder) / name).read_bytes() for name in ("config.json", WEIGHTS)}


def mutate(valid: bytes, head: int, rng: random.Random) -> bytes:
    """`valid` broken in up to four places, most of them in its first `head` bytes."""
    data = bytearray(valid)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(len(data), head if rng.random() < 0.9 else len(data))))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 8] = struct.pack("<Q", rng.choice(_EDGES))
            case 2:
                data[at : at + 4] = struct.pack("<I", rng.choice(_EDGES) & 0xFFFFFFFF)
            case 3:
                del data[at : at + rng.randint(1, 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 5:
                data[at:at] = rng.choice(_WORDS)
            case _:
                data[at : at + 1] = bytes([rng.randrange(64)])  # kinds and small counts
        if not data:
            return b""
    return bytes(data)


def read_gguf(data: bytes) -> bool:
    """Read all that is in it; whether it was a whole model."""
    try:
        file = GgufFile(memoryview(data), "mutated")
    except ModelError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return False
    for name, tensor in file.tensors.items():
        dequantize(file.raw(name), tensor.type)
    try:
        model = GgufModel(file)
        for name in model.shapes:
            model.float32(name)
        model.tokenizer().encode("a b")
    except KhaoszError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return False
    return True


def read_directory(folder: Path, contents: dict[str, bytes]) -> bool:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    try:
        load_model(folder)
    except KhaoszError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return False
    return True


def mutated(seed: int, folder: Path) -> bool:
    """Break a valid file somewhere and read it; whether it still was a model."""
    rng = random.Random(seed)
    if seed % 2:
        return read_gguf(mutate(valid_gguf(), 2200, rng))
    contents = dict(valid_directory())
    name = "config.json" if seed % 8 == 0 else WEIGHTS
    contents[name] = mutate(contents[name], 1200, rng)
    return read_directory(folder, contents)


def main(count: int) -> None:
    if sys.platform == "linux":
        import resource  # an allocation that a file asks for in vain is a MemoryError

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 29)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("error")
    start, slowest, readable = time.perf_counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        # The first model of each kind imports what it needs: that is not its file's time.
        assert read_gguf(valid_gguf()) and read_directory(Path(folder), valid_directory())
        for seed in range(count):
            started = time.process_time()  # a pause of the whole process is not a slow file
            try:
                readable += mutated(seed, Path(folder))
            except BaseException:
                print(f"seed {seed}", file=sys.stderr)
                raise
            slowest = max(slowest, time.process_time() - started)
            if seed % 50_000 == 49_999:
                print(f"{seed + 1:,} files, slowest {slowest:.3f} s", file=sys.stderr)
    seconds = time.perf_counter() - start
    report = {"files": count, "readable": readable, "seconds": seconds, "slowest": slowest}
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
