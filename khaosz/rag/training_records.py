"""Documents as records to train on: texts that have a meaning whole, and pairs for an embedder."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from khaosz.data.records.pairs import LEAST_PASSAGE, inverse_cloze
from khaosz.rag.load import Problem, load_paths
from khaosz.rag.split.semantic import SemanticSplitter
from khaosz.rag.split.sentence import sentence_spans
from khaosz.rag.split.structure import StructureSplitter

_HEADING_LINES = re.compile(r"\A(?:\s*#+ .*\n?)+")  # a query must not stand in its own passage


def text_records(
    paths: Sequence[Path | str],
    splitter: StructureSplitter | SemanticSplitter,
    on_problem: Callable[[Problem], None],
) -> Iterator[dict[str, str]]:
    """`{"text", "source"}`, for `khaosz data prepare` and the recipes of pretraining. A file that
    cannot be read is a problem and stops no other. Raises `DataError` for a path that does not
    exist."""
    for _, documents in load_paths([Path(path) for path in paths], on_problem=on_problem):
        for document in documents:
            for chunk in splitter.split(document.text):
                if text := chunk.text.strip():
                    yield {"text": text, "source": document.name}


def pair_records(
    paths: Sequence[Path | str],
    splitter: StructureSplitter | SemanticSplitter,
    seed: int,
    on_problem: Callable[[Problem], None],
) -> Iterator[dict[str, str]]:
    """`{"query", "positive", "source"}`, for `stage = "embed"`: the headings above a passage, and
    one of its sentences with what stands around it. Otherwise as `text_records`."""
    rng = random.Random(seed)
    for _, documents in load_paths([Path(path) for path in paths], on_problem=on_problem):
        for document in documents:
            for chunk in splitter.split(document.text):
                parts = [chunk.text[start:end] for start, end in sentence_spans(chunk.text)]
                found = [inverse_cloze(parts, "", rng)]
                text = _HEADING_LINES.sub("", chunk.text).strip()
                if chunk.headings and len(text) >= LEAST_PASSAGE:
                    found.append((" ".join(chunk.headings[-2:]), text))
                for query, passage in filter(None, found):
                    yield {"query": query, "positive": passage, "source": document.name}
