"""Inference speed of a model on this machine: `khaosz bench infer`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from khaosz.inference.linear.load import Products
from khaosz.inference.runner import Chunk, Runner

PROMPT, ANSWER = 512, 64


def measure_inference(path: Path, *, device: str, rounds: int = 3) -> dict[str, Any]:
    """Prefill of 512 tokens and decoding of 64 at context 512, medians of `rounds`.

    `bandwidth_share`: bytes of weights a token reads, times tokens per second, over what this
    machine reads per second. `peak_rss_mb` includes the loading. `batch8` decodes eight sequences.
    """
    started = time.perf_counter()
    runner = Runner.open(path, device=device)
    loaded = time.perf_counter() - started
    generator = torch.Generator().manual_seed(0)
    size = runner.config.vocab_size
    prompt = torch.randint(size, (PROMPT,), generator=generator).tolist()
    prefill, decode, eight = [], [], []
    ttft = 0.0
    for _ in range(rounds + 1):  # the first one warms up
        cache = runner.new_cache()
        start = time.perf_counter()
        runner.run([Chunk(prompt, cache, 1)])
        prefill.append(PROMPT / (time.perf_counter() - start))
        start = time.perf_counter()
        for i in range(ANSWER):
            runner.run([Chunk([prompt[i]], cache, 1)])
        decode.append(ANSWER / (time.perf_counter() - start))
        caches = [cache.fork(PROMPT) for _ in range(8)]
        start = time.perf_counter()
        for i in range(ANSWER // 4):
            runner.run([Chunk([prompt[i]], each, 1) for each in caches])
        eight.append(8 * (ANSWER // 4) / (time.perf_counter() - start))
        start = time.perf_counter()
        runner.run([Chunk(prompt[:16], runner.new_cache(), 1)])
        ttft = time.perf_counter() - start
    speed = median(decode[1:])
    read = weight_bytes(runner)
    return {
        "prefill_tokens_per_s": round(median(prefill[1:]), 1),
        "decode_tokens_per_s": round(speed, 2),
        "batch8_tokens_per_s": round(median(eight[1:]), 1),
        "load_s": round(loaded, 2),
        "ttft_s": round(loaded + ttft, 2),
        "peak_rss_mb": peak_rss_mb(),
        "bandwidth_share": round(read * speed / read_bandwidth(), 3),
    }


def weight_bytes(runner: Runner) -> int:
    """Bytes of all matrices that a token passes through, as stored in memory."""
    weights = runner.weights()
    assert isinstance(weights.linear, Products), "live weights are not measured"
    return weights.head.nbytes + weights.linear.nbytes


def read_bandwidth(size: int = 1 << 29) -> float:
    """Bytes per second that all threads read from memory together, the best of five."""
    data = torch.ones(size // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def peak_rss_mb() -> int | None:
    """Peak resident memory of this process; None where the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux a child's ru_maxrss starts at its parent's.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20  # bytes on macOS
