"""Documents as training records: self-contained texts, and pairs for an embedder."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from khaosz.data.records.pairs import LEAST_PASSAGE, inverse_cloze
from khaosz.folders import OnSkip
from khaosz.rag.load import Loaded, Problem, load_paths
from khaosz.rag.split.semantic import SemanticSplitter
from khaosz.rag.split.sentence import sentence_spans
from khaosz.rag.split.structure import StructureSplitter

_HEADING_LINES = re.compile(r"\A(?:\s*#+ .*\n?)+")  # a query must not be in its own passage


def text_records(
    paths: Sequence[Path | str],
    splitter: StructureSplitter | SemanticSplitter,
    on_problem: Callable[[Problem], None],
    on_skip: OnSkip = lambda skipped: None,
) -> Iterator[dict[str, str]]:
    """`{"text", "source"}`, for `khaosz data prepare` and the pretraining recipes. A file that
    cannot be read is reported to `on_problem`, one that is left out to `on_skip`. Raises
    `DataError` for a path that does not exist.
    """
    for _, documents in _loaded(paths, on_problem, on_skip):
        for document in documents:
            for chunk in splitter.split(document.text):
                if text := chunk.text.strip():
                    yield {"text": text, "source": document.name}


def pair_records(
    paths: Sequence[Path | str],
    splitter: StructureSplitter | SemanticSplitter,
    seed: int,
    on_problem: Callable[[Problem], None],
    on_skip: OnSkip = lambda skipped: None,
) -> Iterator[dict[str, str]]:
    """`{"query", "positive", "source"}`, for `stage = "embed"`: the headings above a passage with
    the passage, and a sentence with the text around it. Otherwise as `text_records`."""
    rng = random.Random(seed)
    for _, documents in _loaded(paths, on_problem, on_skip):
        for document in documents:
            for chunk in splitter.split(document.text):
                parts = [chunk.text[start:end] for start, end in sentence_spans(chunk.text)]
                pairs = [inverse_cloze(parts, "", rng)]
                text = _HEADING_LINES.sub("", chunk.text).strip()
                if chunk.headings and len(text) >= LEAST_PASSAGE:
                    pairs.append((" ".join(chunk.headings[-2:]), text))
                for query, passage in filter(None, pairs):
                    yield {"query": query, "positive": passage, "source": document.name}


def _loaded(
    paths: Sequence[Path | str], on_problem: Callable[[Problem], None], on_skip: OnSkip
) -> Iterator[Loaded]:
    return load_paths([Path(path) for path in paths], on_problem=on_problem, on_skip=on_skip)
