"""Decode bandwidth by shape of the network, and by type of its weights.

    OMP_NUM_THREADS=1 python -m bench shapes --rounds 3

Bandwidth: the bytes of all matrices that a token passes through, times tokens per second. The
models have random weights and about equal bytes, so that only the work beside the matrices, or the
cost of reading a type, differs. The contenders of a table take turns within a round; medians are
printed, and the ratios to the first contender of the same rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.machine import as_markdown, describe
from khaosz.config import ModelConfig
from khaosz.inference.measure import weight_bytes
from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.families.family import stored_shape, tensors
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.interop.gguf.config import architecture_of, config_to_metadata
from khaosz.interop.gguf.file import TENSOR_TYPES, TensorToWrite, write_gguf
from khaosz.model import is_router, parameter_shapes

PROMPT, ANSWER = 64, 48
COMMON: dict[str, Any] = {"vocab_size": 65_536, "hidden_size": 1024, "intermediate_size": 3584}
COMMON |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
# name: layer types of one period, and what differs from COMMON. The widths are those of
# Qwen3.5 0.8B, Gemma 3 1B and LFM2 350M; Llama has the width of the first.
SHAPES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Llama": (["full_attention"], {}),
    "Qwen3.5": (
        ["linear_attention"] * 3 + ["full_attention"],
        {
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "qk_norm": True,
            "attn_output_gate": True, "partial_rotary_factor": 0.25, "linear_num_key_heads": 16,
            "linear_num_value_heads": 16, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        },
    ),
    "Gemma 3": (
        ["sliding_attention"] * 5 + ["full_attention"],
        {
            "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "qk_norm": True, "output_norms": True,
            "hidden_act": "gelu_pytorch_tanh", "embedding_multiplier": 1152**0.5,
            "sliding_window": 512, "rope_theta": 1e6, "rope_local_theta": 1e4,
        },
    ),
    "LFM2": (
        ["conv", "conv", "full_attention"],
        {
            "intermediate_size": 4608, "num_key_value_heads": 8, "qk_norm": True,
            "conv_L_cache": 3,
        },
    ),
}  # fmt: skip
# Of each type: where the fp16 scales of a block stand, and values that give weights around 0.02.
SCALES: dict[str, list[tuple[int, float]]] = {
    "Q4_0": [(0, 4e-3)],
    "Q4_K": [(0, 1e-4), (2, 7e-4)],
    "Q6_K": [(208, 2e-5)],
    "Q8_0": [(0, 3e-4)],
    "Q2_K": [(80, 2e-3), (82, 3e-3)],
    "Q3_K": [(108, 5e-4)],
    "IQ4_NL": [(0, 3e-4)],
    "IQ4_XS": [(0, 2e-5)],
    "MXFP4": [],  # its scale is a power of two in one byte
}


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Random codes with scales that keep the weights small: uint8 (rows, bytes of a row)."""
    _, block, size = TENSOR_TYPES[kind]
    blocks = np.random.default_rng(seed).integers(
        0, 256, (shape[0] * shape[1] // block, size), np.uint8
    )
    for at, scale in SCALES[kind]:
        blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = 120
    return [blocks.reshape(shape[0], -1)]


def write_random(config: ModelConfig, kind: str, path: Path) -> None:
    """A model of random blocks. No tokenizer: tokens are random as well."""
    shapes = parameter_shapes(config)
    places = ARCHITECTURES[architecture_of(config)].layout.stored(shapes)
    entries = []
    for seed, (stored, names) in enumerate(tensors(places).items()):
        name, shape = names[0], stored_shape(places, shapes, names)
        if len(shapes[name]) == 2 and not is_router(name):
            entries.append(
                TensorToWrite(stored, kind, shape, partial(random_blocks, kind, shape, seed))
            )
            continue
        values = torch.full(shape, 0.5)
        if (change := places[name].change) is not None:
            values = change.write(values)
        shape = tuple(size for i, size in enumerate(shape) if len(shape) < 3 or i != 1)
        raw = [values.contiguous().numpy().view(np.uint8)]
        entries.append(TensorToWrite(stored, "F32", shape, lambda raw=raw: raw))
    write_gguf(path, config_to_metadata(config, "Q4_0"), entries)


def config_of(name: str, megabytes: float, kind: str) -> ModelConfig:
    """As many periods of a shape's layers as come nearest to a size."""
    _, block, size = TENSOR_TYPES[kind]

    def of(periods: int) -> tuple[float, ModelConfig]:
        types, changes = SHAPES[name]
        layers = types * periods
        fields = {**COMMON, **changes, "num_hidden_layers": len(layers)}
        if set(layers) != {"full_attention"}:
            fields["layer_types"] = layers
        config = ModelConfig.parse(fields)
        weights = sum(s[0] * s[1] for s in parameter_shapes(config).values() if len(s) == 2)
        return abs(weights * size / block / 1e6 - megabytes), config

    return min((of(periods) for periods in range(1, 64)), key=lambda each: each[0])[1]


def decode_speed(runner: Runner) -> float:
    """Tokens per second after a short prompt, by the median time of a token: other work on the
    machine takes the core away for some tokens, not for most."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(runner.config.vocab_size, (PROMPT,), generator=generator).tolist()
    cache = runner.new_cache()
    logits = runner.run([Chunk(ids, cache)])[0]
    if not bool(torch.isfinite(logits).all()):
        raise SystemExit("error: the random model gives logits that are not finite")
    times = [time.perf_counter()]
    for token in ids[:ANSWER]:
        runner.run([Chunk([token], cache)])
        times.append(time.perf_counter())
    return 1 / median(after - before for before, after in pairwise(times))


def compare(title: str, models: dict[str, tuple[ModelConfig, str]], rounds: int) -> None:
    """Print a table of the contenders, the first of which is the reference."""
    runners, speeds = {}, {name: list[float]() for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (config, kind)) in enumerate(models.items()):
            path = Path(folder, f"{i}.gguf")
            write_random(config, kind, path)
            runners[name] = Runner.open(path)
            decode_speed(runners[name])  # warms up
        for number in range(1, rounds + 1):
            for name, runner in runners.items():
                speeds[name].append(weight_bytes(runner) / 1e9 * decode_speed(runner))
                print(f"  {number}/{rounds} {name}: {speeds[name][-1]:.2f} GB/s", file=sys.stderr)
        reference = speeds[next(iter(models))]
        print(f"\n| {title} | layers | MB | GB/s | ratio | lowest, highest |")
        print("|---|---|---|---|---|---|")
        for name, (config, _) in models.items():
            ratios = [a / b for a, b in zip(speeds[name], reference, strict=True)]
            print(
                f"| {name} | {config.num_hidden_layers} | {weight_bytes(runners[name]) / 1e6:.0f}"
                f" | {median(speeds[name]):.2f} | {median(ratios):.2f}"
                f" | {min(ratios):.2f}, {max(ratios):.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench shapes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=150, help="size of each model")
    options = parser.parse_args()
    print(as_markdown(describe()), file=sys.stderr)
    shapes = {name: (config_of(name, options.megabytes, "Q4_0"), "Q4_0") for name in SHAPES}
    compare("shape (Q4_0)", shapes, options.rounds)
    types = {kind: (config_of("Llama", options.megabytes, kind), kind) for kind in SCALES}
    compare("type (Llama)", types, options.rounds)


if __name__ == "__main__":
    main()
