"""The peer: a plain training loop around transformers' Llama, as a tuned recipe would write it.

AdamW (betas .9 and .95, decay .1 on matrices), linear warm-up and cosine, clipping at 1, random
crops of the token stream `bos document eos bos document eos ...`. It prints one JSON line.

    python -m bench peer --data train.jsonl.zst --tokenizer DIR --eval dev.jsonl.zst --minutes 10
    python -m bench peer --time-only 10 --dtype bf16 --compile

It shares our tokenizer and file reader, so that both read the same tokens, and nothing of our
model, loop or scoring. Shapes: B rows, T window, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.machine import peak_rss_mb
from khaosz.data.records.texts import read_texts
from khaosz.data.tokenizer import Tokenizer, load_tokenizer

_WARMUPS, _TIMED = 3, 5  # steps before the clock starts, and steps that set the step count
_TOKENISED_TOGETHER = 512  # documents


def build_model(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """A fresh fp32 Llama with transformers' own initialisation, tied embeddings."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.d,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.window,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # None, not False: torch's own default then picks its multi-tensor path where it has one.
    fused = True if args.fused else None
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=fused)


def lr_factor(step: int, total: int, warmup: float, min_ratio: float) -> float:
    """Linear warm-up over the first `warmup` of the run, then half a cosine down to `min_ratio`."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class Loop:
    """One optimizer step, the same whether it trains, warms up or is timed."""

    def __init__(self, model: LlamaForCausalLM, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.forward: Any = torch.compile(model) if args.compile else model
        self.dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32

    def step(self, optimizer: torch.optim.Optimizer, ids: Tensor, lr: float) -> float:
        """Train on crops (B, T + 1); returns the loss before the update."""
        inputs, targets = ids[:, :-1], ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            # transformers' own loss; the shifted labels make all T positions count.
            loss = self.forward(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def warm_up(self, crops: Iterator[Tensor], timed: int = _TIMED) -> tuple[float, list[float]]:
        """Seconds of the first step (compilation) and of the timed ones, with a throw-away
        optimizer and a learning rate of 0: the weights stay as they are."""
        optimizer = build_optimizer(self.model, self.args)
        seconds = []
        for _ in range(_WARMUPS + timed):
            started = time.perf_counter()
            self.step(optimizer, next(crops), 0.0)
            seconds.append(time.perf_counter() - started)
        return seconds[0], seconds[_WARMUPS:]


def token_stream(
    path: Path, tokenizer: Tokenizer, limit: int | None
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """bos, document, eos of every document, one after the other."""
    texts = (text for _, text in islice(read_texts(path), limit))
    parts: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
    while block := list(islice(texts, _TOKENISED_TOGETHER)):
        for ids in tokenizer.encode_batch(block):
            parts.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=np.uint32))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


def random_crops(
    stream: np.ndarray[Any, np.dtype[np.uint32]], rows: int, window: int, seed: int
) -> Iterator[Tensor]:
    """Endless (B, T + 1) int64 crops at uniformly random places."""
    generator = np.random.default_rng(seed)
    reach = np.arange(window + 1)
    while True:
        starts = generator.integers(0, len(stream) - window, size=rows)
        yield torch.from_numpy(stream[starts[:, None] + reach].astype(np.int64))


def random_tokens(vocab_size: int, rows: int, window: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(vocab_size, (rows, window + 1), generator=generator)


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    path: Path,
    window: int,
    limit: int | None = None,
    rows: int = 16,
) -> tuple[float, dict[str, float]]:
    """Bits per UTF-8 byte of a file of texts, overall and by language, in fp32.

    Each document alone: bos first, consecutive windows of T inputs, every token of the text scored
    once, eos not scored. Written apart from `khaosz.evaluation`, which has to give the same.
    """
    model.eval()
    nats: dict[str, float] = {}
    sizes: dict[str, int] = {}
    segments: list[tuple[str, list[int]]] = []  # language, up to T + 1 ids
    texts = iter(islice(read_texts(path), limit))
    while block := list(islice(texts, _TOKENISED_TOGETHER)):
        encoded = tokenizer.encode_batch([text for _, text in block])
        for (lang, text), tail in zip(block, encoded, strict=True):
            sizes[lang] = sizes.get(lang, 0) + len(text.encode("utf-8"))
            ids = [tokenizer.bos_id, *tail]
            for start in range(0, len(tail), window):
                segments.append((lang, ids[start : start + window + 1]))
    segments.sort(key=lambda segment: len(segment[1]))  # rows of like length share a batch
    for first in range(0, len(segments), rows):
        part = segments[first : first + rows]
        longest = len(part[-1][1])
        ids_bt = torch.zeros(len(part), longest, dtype=torch.int64)
        targets = torch.full((len(part), longest - 1), -100)
        for row, (_, ids) in enumerate(part):
            ids_bt[row, : len(ids)] = torch.tensor(ids)
            targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
        logits = model(input_ids=ids_bt[:, :-1]).logits  # causal: the padding behind is unseen
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
        ).double()
        for (lang, _), loss in zip(part, losses.sum(1).tolist(), strict=True):
            nats[lang] = nats.get(lang, 0.0) + loss
    if not sizes:
        raise SystemExit(f"error: {path}: no text to score")
    by_lang = {lang: nats[lang] / math.log(2) / sizes[lang] for lang in sorted(sizes)}
    return sum(nats.values()) / math.log(2) / sum(sizes.values()), by_lang


def time_only(args: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory on random tokens: every position counts as a token."""
    model = build_model(args, args.vocab).train()
    loop = Loop(model, args)
    crops = random_tokens(args.vocab, args.batch, args.window, args.seed)
    first, seconds = loop.warm_up(crops, timed=args.time_only)
    tokens = args.batch * args.window
    return {
        "tokens_per_s": round(tokens / statistics.median(seconds), 1),
        "best_tokens_per_s": round(tokens / min(seconds), 1),
        "steps": len(seconds),
        "tokens": tokens * len(seconds),
        "peak_rss_mb": peak_rss_mb(),
        "first_step_s": round(first, 2),
        "seconds": round(sum(seconds), 2),
        "dtype": args.dtype,
        "compiled": args.compile,
        "parameters": model.num_parameters(),
    }


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train for `--minutes` of step time, then score."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.tokenizer)
    stream = token_stream(args.data, tokenizer, args.data_docs)
    if len(stream) <= args.window:
        raise SystemExit(f"error: {args.data}: {len(stream)} tokens, fewer than one window")
    _say(f"{len(stream):,} tokens read in {time.perf_counter() - started:.0f} s")
    model = build_model(args, tokenizer.vocab_size).train()
    loop = Loop(model, args)
    # Crops of another seed: the warm-up must not use up, or show, what training will see.
    first, timed = loop.warm_up(random_crops(stream, args.batch, args.window, args.seed + 1))
    total = max(1, int(args.minutes * 60 / statistics.median(timed)))
    _say(f"{model.num_parameters():,} parameters, {total:,} steps, first one {first:.1f} s")
    optimizer = build_optimizer(model, args)
    crops = random_crops(stream, args.batch, args.window, args.seed)
    seconds, losses = 0.0, []
    for step in range(total):
        before = time.perf_counter()
        lr = args.lr * lr_factor(step, total, args.warmup, args.min_ratio)
        losses.append(loop.step(optimizer, next(crops), lr))
        seconds += time.perf_counter() - before
        if step % max(1, total // 20) == 0:
            _say(f"step {step + 1}/{total}  loss {statistics.fmean(losses[-20:]):.3f}")
    tokens = total * args.batch * args.window
    result: dict[str, Any] = {
        "tokens_per_s": round(tokens / seconds, 1),
        "steps": total,
        "tokens": tokens,
        "bits_per_byte": None,
        "by_lang": {},
        "peak_rss_mb": peak_rss_mb(),  # of training; scoring comes after
        "first_step_s": round(first, 2),
        "seconds": round(seconds, 2),
        "final_loss": round(statistics.fmean(losses[-20:]), 4),
        "parameters": model.num_parameters(),
    }
    if args.save is not None:
        model.save_pretrained(args.save)
        tokenizer.save(args.save)
    if args.eval is not None:
        score, by_lang = bits_per_byte(model, tokenizer, args.eval, args.window, args.eval_docs)
        result["bits_per_byte"] = round(score, 5)
        result["by_lang"] = {lang: round(value, 5) for lang, value in by_lang.items()}
    return result


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A plain transformers Llama training loop; prints one JSON line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    work = parser.add_argument_group("work")
    work.add_argument("--time-only", type=int, metavar="STEPS", help="time steps on random tokens")
    work.add_argument("--data", type=Path, help="texts to train on: jsonl, jsonl.zst, txt, ...")
    work.add_argument("--data-docs", type=int, help="documents to train on at most")
    work.add_argument("--tokenizer", type=Path, help="tokenizer directory of khaosz")
    work.add_argument("--eval", type=Path, help="held-out texts to score")
    work.add_argument("--eval-docs", type=int, help="documents to score at most")
    work.add_argument("--minutes", type=float, default=10.0, help="time in optimizer steps")
    work.add_argument("--save", type=Path, help="directory for the trained model")
    shape = parser.add_argument_group("shape (the vocabulary is the tokenizer's when it has one)")
    for name, value in {"vocab": 8192, "d": 256, "layers": 6, "heads": 4, "ffn": 704}.items():
        shape.add_argument(f"--{name}", type=int, default=value)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--window", type=int, default=256, help="tokens in a row")
    recipe.add_argument("--batch", type=int, default=16, help="rows in a step")
    recipe.add_argument("--lr", type=float, default=3e-3)
    recipe.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    recipe.add_argument("--min-ratio", type=float, default=0.1, help="last over peak learning rate")
    recipe.add_argument("--weight-decay", type=float, default=0.1)
    recipe.add_argument("--seed", type=int, default=0)
    compute = parser.add_argument_group("compute")
    compute.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="autocast")
    compute.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    compute.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.time_only is None and (args.data is None or args.tokenizer is None):
        parser.error("give --time-only STEPS, or --data FILE and --tokenizer DIR")
    for path in (args.data, args.eval, args.tokenizer):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    print(json.dumps(time_only(args) if args.time_only is not None else train(args)))


if __name__ == "__main__":
    main()
