"""`python -m bench NAME ...`: runs one bench; without a name, lists them."""

from __future__ import annotations

import runpy
import sys

# name: (module, arguments put before the user's, what it answers)
BENCHES: dict[str, tuple[str, list[str], str]] = {
    "throughput": (
        "bench.throughput",
        [],
        "training tokens/s and peak memory, transformers and us",
    ),
    "memory": (
        "bench.throughput",
        ["--only", "memory"],
        "the peak-memory half of throughput alone",
    ),
    "race": ("bench.race", [], "bits per byte after the same minutes, transformers and us"),
    "ours": ("bench.ours", [], "one timing of our own training step"),
    "peer": ("bench.peer_transformers", [], "one run or timing of the transformers loop"),
    "align": ("bench.align", [], "SFT and DPO tokens/s and peak memory, TRL and us"),
    "infer": ("bench.infer", [], "prefill and decode tokens/s, llama.cpp and us"),
    "network": ("bench.network", [], "decode, prefill and training step, another tree and us"),
    "shapes": ("bench.shapes", [], "decode bandwidth by shape and by type of weights"),
    "lookup": ("bench.lookup", [], "prompt lookup against plain decoding"),
    "prepare": ("bench.prepare", [], "MB/s and memory of data preparation"),
    "tokenizer": ("bench.tokenizer", [], "characters per token, zh and en"),
    "learn": ("bench.learn", [], "whether RM, DPO, PPO and GRPO learn, over seeds"),
    "rag": ("bench.rag", [], "retrieval: right answers, ingestion, a million chunks"),
    "rag_split": ("bench.rag_split", [], "splitters: MB/s, sentence ends, evidence; peers and us"),
    "answers": ("bench.answers", [], "questions about documents: right, cited, refused"),
    "questions": (
        "bench.plain_questions",
        [],
        "plain questions in both languages: right, language kept, cut; llama.cpp and us",
    ),
    "grounded": ("bench.grounded", [], "whether a small model learns to answer from passages"),
    "teach": ("bench.teach", [], "whether a .gguf learns a name, what it forgets, and its memory"),
    "serve": ("bench.serve", [], "the service: overhead per token, 64 clients for ten minutes"),
    "planned": (
        "bench.planned",
        [],
        "memory that is planned and that is used, training and generating",
    ),
    "machine": ("bench.machine", [], "describes this machine for RESULTS.md"),
}


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m bench NAME [options]\n")
        for name, (_, _, purpose) in BENCHES.items():
            print(f"  {name:<12}{purpose}")
        return 0
    if arguments[0] not in BENCHES:
        print(
            f"error: bench not found: {arguments[0]}; available: {', '.join(BENCHES)}",
            file=sys.stderr,
        )
        return 2
    module, before, _ = BENCHES[arguments[0]]
    sys.argv = [f"python -m bench {arguments[0]}", *before, *arguments[1:]]
    # Run as if by `python -m`, so that a bench is an ordinary script and needs no interface here.
    runpy.run_module(module, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
