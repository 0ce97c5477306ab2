"""`khaosz quantize` and `khaosz init`: .gguf files of our models, and what quantising cost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from khaosz.config.presets import preset
from khaosz.data.fetch import SAMPLE_DIR
from khaosz.data.texts import read_texts
from khaosz.data.tokenizer import train_tokenizer
from khaosz.errors import ModelError
from khaosz.inference.quality import compare
from khaosz.inference.runner import Runner
from khaosz.interop import is_gguf, load_model, open_tokenizer, save_gguf, save_model
from khaosz.interop.gguf_model import write_model
from khaosz.interop.modelfile import write_modelfile
from khaosz.model import Transformer, parameter_shapes

_KINDS = {"int8": "Q8_0", "int4": "Q4_1"}
_REPORT_TOKENS = 20_000  # of each language


def quantize_model(
    model: Path,
    *,
    to: str,
    out: Path | None,
    data: Path | None,
    report: bool,
    console: Console,
) -> dict[str, Any]:
    """Write `model` quantised; the file's path and size and, with `report`, its quality against
    the unquantised model on `data`. Raises `ModelError`, also when `out` exists."""
    kind = _KINDS.get(to, to)
    out = out or Path(f"{str(model).removesuffix('.gguf')}-{kind}.gguf")
    if out.exists() or not is_gguf(out):
        problem = "exists" if out.exists() else "does not end in .gguf"
        raise ModelError(f"{out} {problem}", hint="name another file with --out")
    source, tokenizer = load_model(model), open_tokenizer(model)
    with console.status(f"quantising to {kind}"):
        save_gguf(source, tokenizer, out, kind, search=True)
        write_modelfile(out, tokenizer, source.config.max_position_embeddings)
    parameters = sum(p.numel() for p in source.parameters())
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
                Runner.from_module(source),
                Runner.open(out),
                tokenizer,
                _texts(data),
                window=window,
                max_tokens=_REPORT_TOKENS,
            )
        result["quality"] = quality.as_dict()
    return result


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
    # The sample is what the demo may train on; for other models it is held out.
    for name in ("statutes_zh.jsonl", "state_of_the_union_2024.txt"):
        yield from islice(read_texts(SAMPLE_DIR / name), 200)


def write_random_model(size: str, out: Path, *, kind: str, seed: int, console: Console) -> Path:
    """A model of a preset's shape with random weights and a tokenizer of the built-in sample.

    Raises `ConfigError` for an unknown size, `ModelError` when `out` exists. A .gguf is written
    tensor by tensor, so its size may pass the memory's.
    """
    config = preset(size).model
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
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict({name: draw(name) for name in shapes}, assign=True)
        tokenizer.save(out)
        save_model(model, out, bos_id=tokenizer.bos_id, eos_ids=[tokenizer.eos_id])
    return out
