"""Which columns of a model's matrices matter: an importance matrix, as llama.cpp calls it.

An error of a weight changes an output by that error times the input of its column, so that its
expected square is proportional to the mean square of that input over a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ModelError
from khaosz.inference.runner import Chunk, Runner
from khaosz.model.module import Part

_TOKENS = 20_000  # of the text
_WINDOW = 512


class _Head:
    """Takes the place of the head: measures its inputs, and computes no logits."""

    nbytes = 0

    def __init__(self, add: Callable[[Tensor], None]) -> None:
        self._add = add

    def __call__(self, x: Tensor) -> Tensor:
        self._add(x)
        return torch.zeros(len(x), 1)


def measure_importance(
    runner: Runner,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, np.ndarray]:
    """The mean squared inputs of each matrix, float32 (C,), by the name of its parameter, over the
    first tokens of `texts`; of an expert over those that were routed to it, and nothing of one
    without any. Raises `ModelError` for texts without tokens."""
    weights = runner.weights()
    paths = {
        part: path
        for index, block in enumerate(weights.blocks)
        for path, part in block.named_modules(prefix=f"layers.{index}")
        if isinstance(part, Part)
    }
    head = "embed_tokens" if runner.config.tie_word_embeddings else "lm_head"
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().double().flatten(0, -2)
        sums[name] = sums.get(name, torch.zeros(rows.shape[1])) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    def linear(
        part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None
    ) -> Sequence[Tensor]:
        for name in names:
            add(f"{paths[part]}.{name}.weight", x)
        return weights.linear(part, names, x, rows)

    measured = replace(weights, linear=linear, head=_Head(partial(add, f"{head}.weight")))
    runner.weights = lambda: measured
    window, done = min(_WINDOW, runner.config.max_position_embeddings), 0
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.begins_with_bos:
            ids = [tokenizer.bos_id, *ids]
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            runner.run([Chunk(part, runner.new_cache(), len(part))])
            done += len(part)
            progress(f"measuring importance: {done:,} tokens")
            if done >= _TOKENS:
                break
        if done >= _TOKENS:
            break
    if not done:
        raise ModelError("the text of the importance matrix is empty")
    return {name: (total / counts[name]).float().numpy() for name, total in sums.items()}
