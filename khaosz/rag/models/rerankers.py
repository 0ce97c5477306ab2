"""Models that score passages against a query (`protocols.Reranker`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import ConfigError, GenerationError, ModelError
from khaosz.inference.generator import Generator
from khaosz.interop.gguf.file import is_gguf
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import is_reward_model
from khaosz.interop.models import check_model
from khaosz.interop.retrieval import is_encoder, is_named_embedder
from khaosz.interop.sentence_transformers import answer_ids, rerank_instruction
from khaosz.rag.models.embedders import model_path
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
    """A model that is asked whether a passage answers the query: the log odds of yes and no.

    Any chat model, and Qwen3-Reranker, whose files may have a template of query and document, the
    ids of both answers, or their output rows alone. A passage longer than the context has the score
    of its best part. Raises `ModelError` for a tokenizer in which yes and no start with the same
    token, `GenerationError` for a query that does not fit in the context.
    """

    def __init__(self, model: Path | str | Generator, *, device: str = "cpu") -> None:
        path = None if isinstance(model, Generator) else Path(model)
        if not isinstance(model, Generator):
            model = Generator.from_directory(model, device=device, reranker=True)
        self._generator, self._rows, answers = model, None, None
        self._system: list[dict[str, str]] = []
        if path is not None and is_gguf(path):
            head = GgufModel.open(path).rerank_head
            self._rows = None if head is None else head.numpy()
        elif path is not None:
            answers = answer_ids(path)
            if instruction := rerank_instruction(path):
                self._system = [{"role": "system", "content": instruction}]
        tokenizer = model.tokenizer
        self._answers = answers or (tokenizer.encode("yes")[0], tokenizer.encode("no")[0])
        if self._answers[0] == self._answers[1]:
            raise ModelError("in this model's tokenizer yes and no start with the same token")
        self._pairs = _pair_tokenizer(tokenizer)
        # Keeps a reasoning model from thinking; to others it is mere text.
        reasons = len(tokenizer.encode("<think>")) == 1
        self._prefix = tokenizer.encode(_NO_THINKING) if reasons else []

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): the logit of yes minus that of no."""
        owners, prompts = flatten(self._prompts(query, passage) for passage in passages)
        best = np.full(len(passages), -np.inf, np.float32)
        if prompts:
            if self._rows is None:
                logits = self._generator.next_logits(prompts, self._answers)  # (prompts, 2)
            else:
                logits = self._generator.pooled_states(prompts, "last") @ self._rows.T
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
        if self._pairs is not None:
            pair = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
            chat = [*self._system, *pair]
            return encode_chat(self._pairs, chat, add_generation_prompt=True)[0]
        text = f"<Instruct>: {_INSTRUCTION}\n<Query>: {query}\n<Document>: {passage}"
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]
        return [*self._generator.chat_ids(messages), *self._prefix]


def _pair_tokenizer(tokenizer: Tokenizer) -> Tokenizer | None:
    """A tokenizer whose chat template takes a query and a document, if the model has one: of
    sentence-transformers, with these two roles, or llama.cpp's, which is not Jinja."""
    templates = tokenizer.chat_templates
    template = templates.get("rerank", "")
    if template.endswith("\n"):
        template += "{{ '' }}"  # Jinja leaves out a line end at the end
    for n, name in enumerate(("query", "document")):
        template = template.replace(f"{{{name}}}", f"{{{{ messages[{n}].content }}}}")
    if not template:
        template = templates.get("reranker") or templates.get("default") or ""
        if not re.search("""["']document["']""", template):
            return None
    return Tokenizer(tokenizer.serialized, {**tokenizer.config, "chat_template": template})


def check_reranker(name: str) -> None:
    """Raise what `open_reranker` would raise for an address or a missing file, without loading the
    weights."""
    if split_address(name):
        raise ConfigError(
            "a reranker is a local folder or file", hint="use a cross-encoder or a chat model"
        )
    path = model_path(name, "reranker")
    if is_named_embedder(path):
        raise ModelError(f"{path} is an embedder, not a reranker", hint="name it as --embedder")
    if is_reward_model(path):
        raise ModelError(
            f"{path}: a sequence classifier on a decoder is not supported as a reranker",
            hint="use Qwen3-Reranker as it was published, or a cross-encoder of the BERT family",
        )
    check_model(path)


def open_reranker(name: str, *, device: str = "cpu") -> Reranker:
    """A model directory or .gguf file: of a cross-encoder (bge-reranker), of Qwen3-Reranker, or of
    any chat model. Raises `ConfigError` and `ModelError`."""
    check_reranker(name)
    path = model_path(name, "reranker")
    if is_encoder(path):
        return CrossEncoder(path, device=device)
    return ChatReranker(path, device=device)
