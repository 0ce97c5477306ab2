"""The served models as Ollama's API lists and describes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import KhaoszError
from khaosz.inference.parts import THINK
from khaosz.interop.gguf.config import architecture_of
from khaosz.interop.gguf.file import split_names
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface_config import load_config, read_json
from khaosz.interop.models import is_gguf, open_tokenizer
from khaosz.model import parameter_shapes
from khaosz.serve.models import Models
from khaosz.serve.prompts import gap_tokens
from khaosz.serve.retrieval_models import RetrievalModels

# llama.cpp's names of `general.file_type`.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NO_END = "9999-12-31T23:59:59+00:00"
_LATEST = ":latest"


@dataclass(frozen=True)
class Facts:
    """Of a model's files. `info`: in the names of GGUF's metadata."""

    details: dict[str, Any]
    size: int
    digest: str
    modified: str
    info: dict[str, Any]


def with_latest(names: Iterable[str]) -> list[str]:
    """The names by which Ollama's clients may ask for models."""
    return [each for name in names for each in (name, name + _LATEST)]


class Catalogue:
    """Chat models, adapters and embedders. Files are read once, in the calling thread."""

    def __init__(self, models: Models, retrieval: RetrievalModels) -> None:
        self._models, self._retrieval = models, retrieval
        self._facts: dict[Path, Facts] = {}

    def resolve(self, name: str) -> str:
        """Ollama's clients add ":latest" to a name."""
        known = {*self._models.names, *self._retrieval.embedders}
        short = name.removesuffix(_LATEST)
        return short if name not in known and short in known else name

    def tags(self) -> list[dict[str, Any]]:
        return [self._tag(name) for name in (*self._models.names, *self._retrieval.embedders)]

    def processes(self) -> list[dict[str, Any]]:
        return [
            {
                **{k: v for k, v in self._tag(model.name).items() if k != "modified_at"},
                "size": model.loaded.nbytes,
                "size_vram": 0 if self._models.device == "cpu" else model.loaded.nbytes,
                "expires_at": _NO_END,
                "context_length": model.context,
            }
            for model in self._models.all
            if model.loaded is not None
        ]

    def show(self, name: str) -> dict[str, Any]:
        """Raises `UnknownModel`, `ModelError`."""
        facts = self._of(name)
        template, capabilities = "", ["embedding"]
        if name not in self._retrieval.embedders:
            model = self._models.find(name)
            tokenizer = (
                model.loaded.generator.tokenizer if model.loaded else open_tokenizer(model.source)
            )
            template = tokenizer.chat_template_for(None) or ""
            capabilities = list(_capabilities(template, tokenizer))
        return {
            "modelfile": "",
            "parameters": "",
            "template": template,
            "license": "",
            "modified_at": facts.modified,
            "details": self._details(name, facts),
            "model_info": facts.info,
            "capabilities": capabilities,
        }

    def _tag(self, name: str) -> dict[str, Any]:
        facts = self._of(name)
        return {
            "name": name,
            "model": name,
            "modified_at": facts.modified,
            "size": facts.size,
            "digest": facts.digest,
            "details": self._details(name, facts),
        }

    def _details(self, name: str, facts: Facts) -> dict[str, Any]:
        parent = ""
        if (
            name not in self._retrieval.embedders
            and name != (model := self._models.find(name)).name
        ):
            parent = model.name
        return {"parent_model": parent, **facts.details}

    def _of(self, name: str) -> Facts:
        if name in self._retrieval.embedders:
            source, context = Path(self._retrieval.embedders[name]), None
        else:
            model = self._models.find(name)
            source, context = model.source, model.context
        if source not in self._facts:
            self._facts[source] = _read_facts(source)
        facts = self._facts[source]
        if context is None:
            return facts
        key = f"{facts.details['family']}.context_length"
        return Facts(**{**vars(facts), "info": {**facts.info, key: context}})


def _read_facts(source: Path) -> Facts:
    files = _files(source)
    stats = [(path, path.stat()) for path in files]
    listed = "\n".join(f"{path.name} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    latest = max((stat.st_mtime for _, stat in stats), default=0.0)
    try:
        details, info = _details_of(source)
    except KhaoszError:  # an embedder of another architecture, or of another server
        details, info = _unknown(), {}
    return Facts(
        details,
        sum(stat.st_size for _, stat in stats),
        hashlib.sha256(listed.encode()).hexdigest(),
        datetime.fromtimestamp(latest, UTC).isoformat(),
        info,
    )


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.is_file())
    parts = [source.with_name(name) for name in split_names(source.name)]
    return [path for path in parts if path.is_file()]


def _unknown() -> dict[str, Any]:
    return {
        "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": "",
    }  # fmt: skip


def _details_of(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raises `ModelError`."""
    if is_gguf(source):
        file = GgufModel.open(source)
        config, kind = file.config, "gguf"
        types = sorted(file.matrix_kinds)
        stored = file.file.metadata.get("general.file_type")
        level = _FILE_TYPES.get(stored, "/".join(types)) if isinstance(stored, int) else types[0]
    else:
        config, kind = load_config(source), "safetensors"
        raw = read_json(source / "config.json")
        level = _DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), "unknown")
    family = architecture_of(config)
    count = sum(prod(shape) for shape in parameter_shapes(config).values())
    details = {
        "format": kind,
        "family": family,
        "families": [family],
        "parameter_size": _in_short(count),
        "quantization_level": level,
    }
    info = {
        "general.architecture": family,
        "general.parameter_count": count,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.rope.freq_base": config.rope_theta,
    }
    return details, info


def _in_short(count: int) -> str:
    """As Ollama writes a number of parameters."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _capabilities(template: str, tokenizer: Tokenizer) -> Iterator[str]:
    yield "completion"
    yield "tools"  # of any model: in the system message where its template has none
    if gap_tokens(tokenizer) is not None:
        yield "insert"
    if THINK in template:
        yield "thinking"
