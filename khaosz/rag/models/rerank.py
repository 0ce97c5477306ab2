"""A second look at the passages that were found: rerankers, opened by their name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from khaosz.errors import ConfigError, GenerationError, ModelError
from khaosz.inference.generator import Generator
from khaosz.interop.encoder import is_encoder
from khaosz.rag.models.encoder import CrossEncoder
from khaosz.rag.models.protocols import Reranker
from khaosz.rag.split.structure import StructureSplitter

# The words that Qwen3-Reranker was trained with (Zhang et al. 2025, arXiv:2506.05176); any model
# that follows orders understands them.
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".'
)
_ORDER = "Given a web search query, retrieve relevant passages that answer the query"
_NO_THOUGHT = "<think>\n\n</think>\n\n"


class ModelJudge:
    """Any model that chats, asked "does this passage answer?": how much likelier yes is than no.

    Of a passage longer than the context, the best part counts. Raises `ModelError` for a model
    whose tokenizer begins yes and no alike, `GenerationError` for a question that it has no room
    for.
    """

    def __init__(self, model: Path | str | Generator, *, device: str = "cpu") -> None:
        if not isinstance(model, Generator):
            model = Generator.from_directory(model, device=device)
        self._generator = model
        encode = model.tokenizer.encode
        self._answers = encode("yes")[0], encode("no")[0]
        if self._answers[0] == self._answers[1]:
            raise ModelError("this model's tokenizer cannot tell yes from no by one token")
        thought = encode(_NO_THOUGHT)
        # A reasoning model would begin to think; one that doesn't know the marks spells them.
        self._prefix = thought if len(thought) <= 4 else []

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): logit of yes less that of no."""
        owners: list[int] = []
        prompts: list[list[int]] = []
        for owner, passage in enumerate(passages):
            for ids in self._prompts(query, passage):
                owners.append(owner)
                prompts.append(ids)
        best = np.full(len(passages), -np.inf, np.float32)
        if prompts:
            logits = self._generator.next_logits(prompts, self._answers)  # (prompts, 2)
            np.maximum.at(best, owners, logits[:, 0] - logits[:, 1])
        return best

    def _prompts(self, query: str, passage: str) -> list[list[int]]:
        ids = self._asked(query, passage)
        if len(ids) < self._generator.context:
            return [ids]
        if len(passage) < 2:
            raise GenerationError(
                f"the question alone fills the judge's context of {self._generator.context}",
                hint="a shorter question, or a model with a longer context",
            )
        parts = StructureSplitter(max_chars=(len(passage) + 1) // 2).split(passage)
        return [ids for part in parts for ids in self._prompts(query, part.text)]

    def _asked(self, query: str, passage: str) -> list[int]:
        text = f"<Instruct>: {_ORDER}\n\n<Query>: {query}\n\n<Document>: {passage}"
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]
        return [*self._generator.chat_ids(messages), *self._prefix]


def open_reranker(name: str, *, device: str = "cpu") -> Reranker:
    """A folder with a cross-encoder (bge-reranker), or a model directory or .gguf file that judges
    by yes and no. Raises `ConfigError` and `ModelError`."""
    if name.startswith(("http://", "https://")):
        raise ConfigError(
            "a reranker is a local folder or file", hint="a cross-encoder, or a model that chats"
        )
    if is_encoder(name):
        return CrossEncoder(name, device=device)
    return ModelJudge(name, device=device)
