"""Models that score passages against a query (`protocols.Reranker`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from khaosz.errors import ConfigError, GenerationError, ModelError
from khaosz.inference.generator import Generator
from khaosz.interop.encoder import is_encoder
from khaosz.interop.models import check_model
from khaosz.rag.models.encoder_models import CrossEncoder
from khaosz.rag.models.http_client import split_address
from khaosz.rag.models.protocols import Reranker, flatten
from khaosz.rag.split.structure import StructureSplitter

# The prompt that Qwen3-Reranker was trained with (Zhang et al. 2025, arXiv:2506.05176); any model
# that follows instructions understands it.
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".'
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_NO_THINKING = "<think>\n\n</think>\n\n"


class ChatReranker:
    """Any chat model, asked whether a passage answers the query: the log odds of yes and no.

    A passage longer than the context has the score of its best part. Raises `ModelError` for a
    tokenizer in which yes and no start with the same token, `GenerationError` for a query that does
    not fit in the context.
    """

    def __init__(self, model: Path | str | Generator, *, device: str = "cpu") -> None:
        if not isinstance(model, Generator):
            model = Generator.from_directory(model, device=device)
        self._generator = model
        encode = model.tokenizer.encode
        self._answers = encode("yes")[0], encode("no")[0]
        if self._answers[0] == self._answers[1]:
            raise ModelError("in this model's tokenizer yes and no start with the same token")
        no_thinking = encode(_NO_THINKING)
        # Keeps a reasoning model from thinking; without these special tokens it is longer.
        self._prefix = no_thinking if len(no_thinking) <= 4 else []

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): the logit of yes minus that of no."""
        owners, prompts = flatten(self._prompts(query, passage) for passage in passages)
        best = np.full(len(passages), -np.inf, np.float32)
        if prompts:
            logits = self._generator.next_logits(prompts, self._answers)  # (prompts, 2)
            np.maximum.at(best, owners, logits[:, 0] - logits[:, 1])
        return best

    def _prompts(self, query: str, passage: str) -> list[list[int]]:
        ids = self._prompt(query, passage)
        if len(ids) < self._generator.context:
            return [ids]
        if len(passage) < 2:
            raise GenerationError(
                f"the query alone fills the reranker's context of {self._generator.context}",
                hint="use a shorter query, or a model with a longer context",
            )
        parts = StructureSplitter(max_chars=(len(passage) + 1) // 2).split(passage)
        return [ids for part in parts for ids in self._prompts(query, part.text)]

    def _prompt(self, query: str, passage: str) -> list[int]:
        text = f"<Instruct>: {_INSTRUCTION}\n\n<Query>: {query}\n\n<Document>: {passage}"
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]
        return [*self._generator.chat_ids(messages), *self._prefix]


def check_reranker(name: str) -> None:
    """Raise what `open_reranker` would raise for an address or a missing file, without loading the
    weights."""
    if split_address(name):
        raise ConfigError(
            "a reranker is a local folder or file", hint="use a cross-encoder or a chat model"
        )
    if not Path(name).exists():
        raise ModelError(f"reranker {name} not found", hint="a model directory or a .gguf file")
    check_model(name)


def open_reranker(name: str, *, device: str = "cpu") -> Reranker:
    """A folder with a cross-encoder (bge-reranker), or a model directory or .gguf file of a chat
    model. Raises `ConfigError` and `ModelError`."""
    check_reranker(name)
    if is_encoder(name):
        return CrossEncoder(name, device=device)
    return ChatReranker(name, device=device)
