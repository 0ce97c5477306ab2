"""`khaosz quantize` and `khaosz init`: write .gguf files, and measure what quantising costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from khaosz.config.presets import preset
from khaosz.data.records.report import InputReport, refuse_unread, summary
from khaosz.data.records.texts import read_texts
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.errors import ConfigError, ModelError
from khaosz.files import SAMPLE_DIR
from khaosz.inference.importance import measure_importance
from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.gguf.config import FILE_TYPES
from khaosz.interop.gguf.file import SPLIT_NAME
from khaosz.interop.gguf.mixed import MIXED
from khaosz.interop.gguf.model import write_model
from khaosz.interop.modelfile import write_modelfile
from khaosz.interop.models import is_gguf, open_model, open_tokenizer, write_served
from khaosz.interop.sampling import recommended_sampling
from khaosz.model import parameter_shapes

_KINDS = {"int8": "Q8_0", "int4": "Q4_1"}
_REPORT_TOKENS = 20_000  # of each language


@dataclass
class LanguageQuality:
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    reference_nats: float = 0.0
    agreeing: int = 0


@dataclass
class QualityReport:
    """By language: bits per byte of both models, and how often their likeliest tokens agree."""

    by_lang: dict[str, LanguageQuality] = field(default_factory=dict)

    @property
    def total(self) -> LanguageQuality:
        total = LanguageQuality()
        for part in self.by_lang.values():
            for name, value in asdict(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def as_dict(self) -> dict[str, object]:
        def line(part: LanguageQuality) -> dict[str, float]:
            scale = part.bytes * math.log(2)
            return {
                "reference_bits_per_byte": round(part.reference_nats / scale, 5),
                "bits_per_byte": round(part.nats / scale, 5),
                "loss_percent": round(100 * (part.nats / part.reference_nats - 1), 3),
                "top1_agreement": round(part.agreeing / part.tokens, 5),
                "tokens": part.tokens,
            }

        languages = {lang: line(part) for lang, part in sorted(self.by_lang.items())}
        return {**line(self.total), "by_lang": languages}


def compare(
    reference: Runner,
    other: Runner,
    tokenizer: Tokenizer,
    texts: Iterable[tuple[str, str]],
    *,
    window: int = 512,
    max_tokens: int = _REPORT_TOKENS,
) -> QualityReport:
    """Both models on (language, text) pairs: each text alone, begin token first, in windows that
    do not overlap, until `max_tokens` of a language are scored."""
    report = QualityReport()
    lengths = tokenizer.byte_lengths
    for lang, text in texts:
        part = report.by_lang.setdefault(lang, LanguageQuality())
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, window):
            if part.tokens >= max_tokens:
                break
            inputs = ids[start : start + window]
            targets = np.array(ids[start + 1 : start + window + 1])
            inputs = inputs[: len(targets)]
            count = len(inputs)
            a = reference.run([Chunk(inputs, reference.new_cache(), count)])[0].log_softmax(-1)
            b = other.run([Chunk(inputs, other.new_cache(), count)])[0].log_softmax(-1)
            rows = np.arange(count)
            part.reference_nats -= float(a.double().numpy()[rows, targets].sum())
            part.nats -= float(b.double().numpy()[rows, targets].sum())
            part.agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
            part.tokens += count
            part.bytes += int(lengths[targets].sum())
    return report


def quantize_model(
    model: Path,
    *,
    to: str,
    out: Path | None,
    data: Path | None,
    report: bool,
    console: Console,
    allow_unread: bool = False,
    imatrix: Path | None = None,
) -> dict[str, Any]:
    """Write `model` quantised; the file's path and size and, with `report`, its quality against
    the unquantised model on `data`. `imatrix`: texts that say which columns matter. Raises
    `ModelError`, also when `out` exists."""
    kind = _KINDS.get(to.lower(), to.upper() if to.upper() in FILE_TYPES else to)
    out = out or Path(f"{_without_suffix(model)}-{kind}.gguf")
    if imatrix is not None and kind not in MIXED:
        raise ModelError(f"--imatrix has no effect on {kind}", hint=f"--to {' or '.join(MIXED)}")
    if out.exists() or not is_gguf(out):
        problem = "exists" if out.exists() else "does not end in .gguf"
        raise ModelError(f"{out} {problem}", hint="name another file with --out")
    for path in filter(None, (data if report else None, imatrix)):
        counts = InputReport(str(path))
        for _ in read_texts(path, counts):
            pass
        refuse_unread([counts], allow_unread)
        console.print("\n".join(summary([counts])), highlight=False, markup=False, soft_wrap=True)
    source, tokenizer = open_model(model), open_tokenizer(model)
    importance = None
    if imatrix is not None:
        with console.status("measuring importance") as status:
            texts = (text for _, text in read_texts(imatrix))
            importance = measure_importance(
                Runner.open(model, dtype=torch.float32), tokenizer, texts, status.update
            )
    with console.status(f"quantising to {kind}") as status:

        def progress(done: int, all: int) -> None:
            status.update(f"quantising to {kind}: {done} of {all} tensors")

        write_model(
            source.config, source.read, tokenizer, out, kind, True, importance, progress,
            recommended_sampling(model),
        )  # fmt: skip
        write_modelfile(out, tokenizer, source.config.max_position_embeddings)
    parameters = source.config.parameters()
    result: dict[str, Any] = {
        "out": str(out),
        "type": kind,
        "bytes": out.stat().st_size,
        "bits_per_weight": round(8 * out.stat().st_size / parameters, 3),
    }
    if report:
        window = min(512, source.config.max_position_embeddings)
        with console.status("comparing on held-out text"):
            quality = compare(
                Runner.open(model, dtype=torch.float32),
                Runner.open(out),
                tokenizer,
                _texts(data),
                window=window,
            )
        result["quality"] = quality.as_dict()
    return result


def _without_suffix(model: Path) -> str:
    split = SPLIT_NAME.fullmatch(model.name)
    return str(model.with_name(split["name"]) if split else model).removesuffix(".gguf")


def format_quality(result: dict[str, Any]) -> str:
    lines = [
        f"{result['out']}: {result['type']}, {result['bytes'] / 1e6:.1f} MB,"
        f" {result['bits_per_weight']} bits per weight"
    ]
    if "quality" in result:
        overall = result["quality"]
        rows = {"all": overall, **overall["by_lang"]}
        lines.append(f"{'':6}{'bits/byte':>12}{'quantised':>12}{'loss':>9}{'same token':>12}")
        lines += [
            f"{name:6}{row['reference_bits_per_byte']:12.4f}{row['bits_per_byte']:12.4f}"
            f"{row['loss_percent']:8.2f}%{row['top1_agreement']:11.2%}"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


def _texts(data: Path | None) -> Iterator[tuple[str, str]]:
    if data is not None:
        yield from read_texts(data)
        return
    # The demo may train on this sample; for other models it is held out.
    for name in ("statutes_zh.jsonl", "state_of_the_union_2024.txt"):
        yield from islice(read_texts(SAMPLE_DIR / name), 200)


def write_random_model(size: str, out: Path, *, kind: str, seed: int, console: Console) -> Path:
    """A model of a preset's shape with random weights and a tokenizer of the built-in sample.

    Raises `ConfigError` for an unknown size, `ModelError` when `out` exists. A .gguf is written
    tensor by tensor, so it may be larger than memory.
    """
    config = preset(size).model
    if not 0 <= seed < 2**64:
        raise ConfigError(f"--seed is {seed}, not 0 to 2**64 - 1")
    if out.exists():
        raise ModelError(f"{out} exists", hint="name another output, or remove it")
    tokenizer = train_tokenizer((text for _, text in _texts(None)), 4096)
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)

    def draw(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name])
        return torch.empty(shapes[name]).normal_(0.0, 0.02, generator=generator)

    with console.status(f"drawing {size}"):
        if is_gguf(out):
            write_model(config, draw, tokenizer, out, kind)
            return out
        tensors = {name: draw(name) for name in shapes}
        write_served(out, config, tensors.__getitem__, tokenizer)
    return out
