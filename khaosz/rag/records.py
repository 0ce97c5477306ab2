"""Documents as records to train on: `{"text", "source"}`, each a piece that has a meaning whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from khaosz.rag.load import Problem, load_paths
from khaosz.rag.split.semantic import SemanticSplitter
from khaosz.rag.split.structure import StructureSplitter


def text_records(
    paths: Sequence[Path | str],
    splitter: StructureSplitter | SemanticSplitter,
    on_problem: Callable[[Problem], None],
) -> Iterator[dict[str, str]]:
    """For `khaosz data prepare` and the recipes of pretraining. A file that cannot be read is a
    problem and stops no other. Raises `DataError` for a path that does not exist."""
    for _, documents in load_paths([Path(path) for path in paths], on_problem=on_problem):
        for document in documents:
            for chunk in splitter.split(document.text):
                if text := chunk.text.strip():
                    yield {"text": text, "source": document.name}
