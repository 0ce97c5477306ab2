"""Mutated model files: only a `ModelError` may come out, in bounded time and memory.

    python tests/interop/fuzz_models.py 1000000

GGUF is parsed by us from a buffer; every tensor of a file that passes is read. Safetensors headers
are parsed by their library; what we add is the check of names, types and shapes.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from khaosz.errors import KhaoszError, ModelError
from khaosz.interop.gguf_blocks import dequantize
from khaosz.interop.gguf_file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf_model import GgufModel
from khaosz.interop.gguf_tokenizer import tokenizer_from_metadata

_NASTY = (0, 1, 7, 31, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**40)


@cache
def valid_gguf() -> bytes:
    """A small file with every kind of metadata and several types of tensor."""
    rng = np.random.default_rng(0)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.feed_forward_length": 32,
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], dtype=np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }
    raws = {
        "small.weight": ("F32", (2, 4), rng.integers(0, 256, 32, dtype=np.uint8)),
        "token_embd.weight": ("Q8_0", (4, 32), rng.integers(0, 256, 4 * 34, dtype=np.uint8)),
        "blk.0.ffn_up.weight": ("Q4_0", (32, 32), rng.integers(0, 256, 32 * 18, dtype=np.uint8)),
        "blk.0.big": ("Q6_K", (1, 256), rng.integers(0, 256, 210, dtype=np.uint8)),
    }
    tensors = [TensorToWrite(n, k, s, lambda r=r: [r]) for n, (k, s, r) in raws.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid.gguf"
        write_gguf(path, metadata, tensors)
        return path.read_bytes()


def mutated(seed: int) -> bool:
    """Break the valid file somewhere and read it; whether it still was a file."""
    rng = random.Random(seed)
    data = bytearray(valid_gguf())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) - 8)
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 8] = struct.pack("<Q", rng.choice(_NASTY))
            case 2:
                data[at : at + 4] = struct.pack("<I", rng.choice(_NASTY) & 0xFFFFFFFF)
            case 3:
                del data[at : at + rng.randint(1, 64)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
        if len(data) < 16:
            return False
    try:
        file = GgufFile(memoryview(bytes(data)), "mutated")
    except ModelError:
        return False
    with np.errstate(all="ignore"):  # random bits are NaN, too
        for name, tensor in file.tensors.items():
            dequantize(file.raw(name), tensor.type)
    for read in (lambda: GgufModel(file), lambda: tokenizer_from_metadata(file.metadata, "x")):
        try:
            read()
        except KhaoszError:
            continue
    return True


if __name__ == "__main__":
    count = int(sys.argv[1])
    begun, slowest, readable = time.perf_counter(), 0.0, 0
    for seed in range(count):
        started = time.perf_counter()
        readable += mutated(seed)
        slowest = max(slowest, time.perf_counter() - started)
    seconds = time.perf_counter() - begun
    print(f"{count:,} files, {readable:,} readable, {seconds:.0f} s, slowest {slowest:.3f} s")
