"""Our side of the throughput bench: the real `Trainer.step` on random tokens, in one process.

Random documents are written to a token file and packed by the real `TokenDataset`, attention kept
within documents; `calibrate` chooses compute type and compilation as it does in a run. It prints
one JSON line. Tokens are scored labels: padding does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.machine import peak_rss_mb
from khaosz.config import ModelConfig, ParallelConfig, TrainConfig
from khaosz.config.presets import training_numbers
from khaosz.data.batches.dataset import TokenDataset
from khaosz.data.shards.mmap import MmapFileHandler, TokenFileWriter
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext, setup_parallel
from khaosz.trainer.calibration import apply_plan, calibrate, rows_per_step
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.strategy import PTStrategy, Strategy
from khaosz.trainer.train_context import Plan, TrainContext
from khaosz.trainer.trainer import Trainer

_SPECIAL = 16  # ids below are special tokens and occur in no document


@dataclass(frozen=True)
class RandomGroup:
    """What the dataset reads of a prepared group."""

    shards: Sequence[MmapFileHandler]
    split: str = "train"
    source: str = "random"
    lang: str = "en"


@dataclass(frozen=True)
class RandomData:
    """What the dataset reads of prepared data."""

    groups: Sequence[RandomGroup]
    stage: str = "pt"


def random_shard(path: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> MmapFileHandler:
    """Documents of uniformly random tokens, lengths exponential around `--document-tokens`."""
    generator = np.random.default_rng(args.seed)
    wanted = 64 * args.batch * args.window  # enough that the timed steps repeat nothing
    n = max(8, wanted // args.document_tokens)
    lengths = generator.exponential(args.document_tokens - 8, size=n).astype(np.int64) + 8
    tokens = generator.integers(_SPECIAL, args.vocab, size=int(lengths.sum()), dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens[ends - 1] = tokenizer.eos_id
    tokens[ends - lengths] = tokenizer.bos_id
    writer = TokenFileWriter(
        path, vocab_size=args.vocab, stage="pt", fingerprint=tokenizer.fingerprint
    )
    writer.append(tokens, lengths, None, n_bytes=0)
    writer.close()
    return MmapFileHandler(path)


def train_config(folder: Path, args: argparse.Namespace) -> TrainConfig:
    """The recipe, learning rates derived as a run derives them."""
    numbers = {number.name: number.value for number in training_numbers(args.d, "pt")}
    return TrainConfig(
        stage="pt",
        data=folder,
        out=folder,
        window=args.window,
        batch_tokens=args.batch * args.window,
        optimizer=args.optimizer,
        lr=numbers["lr"] if args.optimizer == "muon" else numbers["embedding_lr"],
        embedding_lr=numbers["embedding_lr"],
        weight_decay=numbers["weight_decay"],
        dtype=args.dtype,
        compile=args.compile,
        # Calibration weighs compilation against the length of the run: give it a real one.
        max_minutes=10,
        parallel=ParallelConfig(device="cpu"),
    )


def random_model(args: argparse.Namespace, window: int, *, qk_norm: bool = True) -> Transformer:
    model = Transformer(
        ModelConfig(
            vocab_size=args.vocab,
            hidden_size=args.d,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            head_dim=args.d // args.heads,
            max_position_embeddings=window,
            qk_norm=qk_norm,
        )
    )
    model.initialise(torch.Generator().manual_seed(args.seed))
    return model


def open_trainer(
    config: TrainConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    parallel: ParallelContext,
    plan: Plan,
    strategy: Strategy,
) -> Trainer:
    compute = apply_plan(plan, model, config)
    context = TrainContext(
        config=config,
        model=model.train(),
        tokenizer=tokenizer,
        parallel=parallel,
        plan=plan,
        optimizers=build_optimizers(model, config, dtype=compute.dtype),
    )
    return Trainer(context, strategy, compute)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time whole optimizer steps, batch assembly included."""
    # Only its ids are used; no step reads text.
    tokenizer = train_tokenizer(iter(["to be or not to be", "学而时习之，不亦说乎"]), 300)
    shard = random_shard(folder / "random.tok", tokenizer, args)
    try:
        data = RandomData([RandomGroup([shard])])
        dataset = TokenDataset.open(data, args.window, pad_id=tokenizer.pad_id, plan_dir=folder)
        return _measure_on(dataset, tokenizer, train_config(folder, args), args)
    finally:
        shard.close()


def _measure_on(
    dataset: TokenDataset, tokenizer: Tokenizer, config: TrainConfig, args: argparse.Namespace
) -> dict[str, Any]:
    parallel = setup_parallel(config.parallel)
    model = random_model(args, args.window, qk_norm=args.qk_norm)
    rows, micro = rows_per_step(config, parallel, model.config.hidden_size)
    strategy = PTStrategy(dataset, rows, micro, parallel)
    started = time.perf_counter()
    plan = calibrate(model, config, parallel, strategy, rows, micro, Console(stderr=True))
    ready = time.perf_counter() - started
    trainer = open_trainer(config, model, tokenizer, parallel, plan, strategy)
    seconds, rates, loss = [], [], 0.0
    for step in range(args.warmups + args.steps):
        before = time.perf_counter()
        metrics = trainer.step(step)
        assert metrics is not None, trainer.context.stopping
        if step >= args.warmups:
            seconds.append(time.perf_counter() - before)
            rates.append(metrics["tokens_per_s"])
            loss = metrics["loss"]
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "best_tokens_per_s": round(max(rates), 1),
        "steps": args.steps,
        "tokens": round(sum(rate * s for rate, s in zip(rates, seconds, strict=True))),
        "peak_rss_mb": peak_rss_mb(),
        "first_step_s": round(ready, 2),  # all of calibration, compilation included
        "seconds": round(sum(seconds), 2),
        "dtype": plan.dtype,
        "compiled": plan.compiled,
        "optimizer": config.optimizer,
        "parameters": model.config.parameters(),
        "fill": round(dataset.stats.fill, 4),
        "loss": round(loss, 4),
        "reasons": plan.reasons,
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time our training step on random tokens; prints one JSON line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--steps", type=int, default=10, help="timed optimizer steps")
    parser.add_argument("--warmups", type=int, default=3, help="steps before the clock starts")
    shape = {"vocab": 8192, "d": 384, "layers": 8, "heads": 6, "ffn": 1024}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--window", type=int, default=512, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--document-tokens", type=int, default=300, help="mean document length")
    parser.add_argument(
        "--qk-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as our presets have it (Qwen3); without it the network is the peer's Llama",
    )
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = arguments().parse_args()
    # Errors are ignored: Windows does not remove a file that is still mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        print(json.dumps(measure(args, Path(folder))))


if __name__ == "__main__":
    main()
