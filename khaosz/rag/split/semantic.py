"""Splits a text where its subject changes: where neighbouring windows of sentences differ most.

TextTiling (Hearst, 1997, Computational Linguistics 23:1) with sentence vectors in place of word
counts. Every sentence is embedded once; the windows on both sides of a gap are means of those
vectors, so a wider window needs no more embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from khaosz.errors import ConfigError
from khaosz.rag.split.layout import find_layout
from khaosz.rag.split.sentence import sentence_spans
from khaosz.rag.split.structure import CharacterBudget, Chunk, fill

Embed = Callable[[Sequence[str]], np.ndarray]


class SemanticSplitter:
    """Chunks of one subject each, of `min_chars` to `max_chars` characters.

    `embed` turns n sentences into (n, d) float32 vectors of length one. A gap between sentences is
    a boundary if the similarity of the `window` sentences before and after it is a local minimum,
    and its drop is deeper than `percentile` percent of all gaps (0 takes every minimum) or, with
    `threshold`, the cosine is below it. Sizes are enforced afterwards: a chunk that is too long is
    cut by the rules of the structure splitter, one that is too short joins the more similar
    neighbour if both fit. Raises ConfigError for invalid arguments and for an `embed` that returns
    something else.
    """

    def __init__(
        self,
        embed: Embed,
        max_chars: int = 800,
        min_chars: int = 60,
        window: int = 3,
        percentile: float | None = None,
        threshold: float | None = None,
    ) -> None:
        if max_chars < 1 or not 0 <= min_chars <= max_chars:
            raise ConfigError(
                f"chunks of {min_chars} to {max_chars} characters",
                hint="max_chars is 1 or more, min_chars from 0 to max_chars",
            )
        if window < 1:
            raise ConfigError(f"a window of {window} sentences", hint="use 1 or more")
        if percentile is not None and threshold is not None:
            raise ConfigError(
                "boundaries are chosen by percentile or by threshold, not both",
                hint="omit one of them",
            )
        if percentile is not None and not 0 <= percentile <= 100:
            raise ConfigError(f"percentile {percentile}", hint="use 0 to 100")
        if threshold is not None and not -1 <= threshold <= 1:
            raise ConfigError(f"threshold {threshold}", hint="it is a cosine, -1 to 1")
        self.embed = embed
        self.max_chars = max_chars
        self.min_chars = min_chars
        self.window = window
        self.percentile = 75.0 if percentile is None and threshold is None else percentile
        self.threshold = threshold

    def split(self, text: str) -> list[Chunk]:
        """The chunks in order; they tile the text. Positions are in characters."""
        spans = sentence_spans(text)
        if not spans:
            return []
        vectors = self._vectors([text[start:end].strip() for start, end in spans])
        layout = find_layout(text)
        boundaries = self._boundaries(vectors)  # (n - 1,), one per gap
        if layout is not None:
            # A heading starts a subject, and stays with the text under it.
            headings = [s for s, path in zip(layout.starts, layout.paths, strict=True) if path]
            opens = np.isin([start for start, _ in spans], headings)  # (n,)
            boundaries = (boundaries & ~opens[:-1]) | (opens[1:] & ~opens[:-1])
        ends = [*(np.flatnonzero(boundaries) + 1).tolist(), len(spans)]
        groups = list(zip([0, *ends[:-1]], ends, strict=True))
        groups = self._join_short(groups, spans, vectors)
        budget = CharacterBudget(self.max_chars, 0)
        chunks: list[Chunk] = []
        for first, last in groups:
            fill(text, spans[first][0], spans[last - 1][1], budget, layout, chunks)
        return chunks

    def _vectors(self, sentences: list[str]) -> np.ndarray:
        vectors = np.asarray(self.embed(sentences), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(sentences) or not np.isfinite(vectors).all():
            raise ConfigError(
                f"embed returned {vectors.shape} for {len(sentences)} sentences",
                hint="it must return one row of finite numbers for each",
            )
        return vectors

    def _boundaries(self, vectors: np.ndarray) -> np.ndarray:
        """bool (n - 1,): which gaps are boundaries, by similarity alone."""
        gaps = similarities(vectors, self.window)
        dips = (gaps <= np.append(np.inf, gaps)[:-1]) & (gaps <= np.append(gaps, np.inf)[1:])
        if self.threshold is not None:
            return dips & (gaps < self.threshold)
        drops = depths(gaps)
        if len(drops) == 0:
            return dips
        # Rounding gives equal vectors drops of about 1e-8.
        return dips & (drops > 1e-6) & (drops >= np.percentile(drops, self.percentile or 0.0))

    def _join_short(
        self, groups: list[tuple[int, int]], spans: list[tuple[int, int]], vectors: np.ndarray
    ) -> list[tuple[int, int]]:
        """Joins each group shorter than `min_chars` to a neighbour, if both fit in `max_chars`."""
        sums = np.vstack([np.zeros_like(vectors[:1]), np.cumsum(vectors, axis=0)])

        def mean(group: tuple[int, int]) -> np.ndarray:
            total = sums[group[1]] - sums[group[0]]
            return total / max(float(np.linalg.norm(total)), 1e-12)

        def size(first: int, last: int) -> int:
            return spans[last - 1][1] - spans[first][0]

        done: list[tuple[int, int]] = []
        rest = groups[::-1]
        while rest:
            group = rest.pop()
            if size(*group) >= self.min_chars:
                done.append(group)
                continue
            choices = []
            if done and size(done[-1][0], group[1]) <= self.max_chars:
                choices.append((float(mean(done[-1]) @ mean(group)), "before"))
            if rest and size(group[0], rest[-1][1]) <= self.max_chars:
                choices.append((float(mean(rest[-1]) @ mean(group)), "after"))
            if not choices:
                done.append(group)
            elif max(choices)[1] == "before":
                done[-1] = (done[-1][0], group[1])
            else:
                rest[-1] = (group[0], rest[-1][1])
        return done


def similarities(vectors: np.ndarray, window: int) -> np.ndarray:
    """Cosine of the means of the `window` vectors before and after every gap: (n, d) -> (n - 1,).

    At both ends of the text a window has fewer vectors.
    """
    count = len(vectors)
    sums = np.vstack([np.zeros_like(vectors[:1]), np.cumsum(vectors, axis=0, dtype=np.float64)])
    gap = np.arange(1, count)
    before = sums[gap] - sums[np.maximum(gap - window, 0)]
    after = sums[np.minimum(gap + window, count)] - sums[gap]
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return (before * after).sum(1) / np.maximum(norms, 1e-12)


def depths(gaps: np.ndarray) -> np.ndarray:
    """How far each similarity is below the peaks left and right of it (Hearst's depth score)."""
    depth = np.zeros(len(gaps))
    for values, into in ((gaps, depth), (gaps[::-1], depth[::-1])):
        peak = -np.inf
        previous = -np.inf
        for index, value in enumerate(values.tolist()):
            peak = max(peak, value) if value <= previous else value
            into[index] += peak - value
            previous = value
    return depth
