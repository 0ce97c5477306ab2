"""Peak resident memory of reading, converting and writing a model, above what was resident before:
one line of JSON, in MB. Runs in a process of its own."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from khaosz.inference.quantize import quantize_model
from khaosz.inference.runner import Runner
from khaosz.interop.adapter import merge_adapter
from khaosz.interop.models import convert, load_model


def status(key: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{key}:\s+(\d+) kB", text)
    assert match is not None, key
    return int(match[1]) / 1024


def growth(action: Callable[[], object]) -> float:
    """MB that `action` takes at its peak, its result included."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM becomes VmRSS
    before = status("VmRSS")
    kept = action()
    peak = status("VmHWM") - before
    del kept
    return round(peak, 1)


def main(model: Path, out: Path) -> None:
    quiet = Console(quiet=True)
    first = out / "first.gguf"
    convert(model, first, kind="Q8_0")  # imports what is imported late
    with torch.device("meta"):  # so does the first embedding there: 90 MB
        torch.nn.Embedding(2, 2)
    peaks = {
        "convert": growth(lambda: convert(model, out / "a.gguf", kind="Q8_0")),
        "convert back": growth(lambda: convert(out / "a.gguf", out / "back")),
        "quantize": growth(
            lambda: quantize_model(
                model, to="Q8_0", out=out / "q.gguf", data=None, report=False, console=quiet
            )
        ),
        "merge": growth(lambda: merge_adapter(out / "adapter", out / "merged")),
        "engine in bf16": growth(lambda: Runner.open(model, dtype=torch.bfloat16)),
        "engine in fp32": growth(lambda: Runner.open(model)),
        "module": growth(lambda: load_model(model)),
    }
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
