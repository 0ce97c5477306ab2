"""Prefill, decode and memory of llama.cpp and us on the same .gguf, interleaved.

    KHAOSZ_LLAMA_CPP=PYTHON python -m bench infer MODEL.gguf --rounds 5

`KHAOSZ_LLAMA_CPP` names a Python that has llama-cpp-python. Each round starts a fresh process of
each; medians of the rounds and of their ratios are printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from statistics import median
from typing import Any

from bench.contenders import run_json
from bench.machine import as_markdown, describe

PEER = """
import json, sys, time
from llama_cpp import Llama
start = time.perf_counter()
model = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, n_batch=512, n_ubatch=512,
              verbose=False)
loaded = time.perf_counter() - start
size, prompt = model.n_vocab(), []
state = 1
for _ in range(512):
    state = state * 48271 % 2147483647
    prompt.append(state % size)
prefill, decode = [], []
for _ in range(3):
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    prefill.append(512 / (time.perf_counter() - start))
    start = time.perf_counter()
    for token in prompt[:64]:
        model.eval([token])
    decode.append(64 / (time.perf_counter() - start))
rss = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
print(json.dumps({"prefill_tokens_per_s": max(prefill[1:]), "decode_tokens_per_s": max(decode[1:]),
                  "load_s": loaded, "peak_rss_mb": int(rss) // 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench infer", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    peer = os.environ.get("KHAOSZ_LLAMA_CPP")
    if not peer:
        raise SystemExit("KHAOSZ_LLAMA_CPP must name a Python that has llama-cpp-python")
    print(as_markdown(describe()), "\n", file=sys.stderr)
    ours_command = [sys.executable, "-m", "khaosz", "bench", "infer", options.model, "--json"]
    rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for _ in range(options.rounds):
        theirs = run_json("llama.cpp", [peer, "-c", PEER, options.model])
        ours = run_json("khaosz", ours_command)
        rounds.append((theirs, ours))
        print(f"  llama.cpp {theirs}\n  khaosz    {ours}", file=sys.stderr)
    print("| | llama.cpp | khaosz | khaosz / llama.cpp |\n|---|---|---|---|")
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s", "peak_rss_mb"):
        theirs_all = [theirs[key] for theirs, _ in rounds]
        ours_all = [ours[key] for _, ours in rounds]
        ratio = median(b / a for a, b in zip(theirs_all, ours_all, strict=True))
        print(f"| {key} | {median(theirs_all):.4g} | {median(ours_all):.4g} | {ratio:.2f} |")
    together = median(o["batch8_tokens_per_s"] / o["decode_tokens_per_s"] for _, o in rounds)
    print(f"\neight sequences together: {together:.2f}x one")


if __name__ == "__main__":
    main()
