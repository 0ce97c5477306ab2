"""A sandbox for untrusted chat templates: no Python attributes, limited memory and time.

Jinja's immutable sandbox keeps templates from accessing Python's internals (CVE-2024-34359). It
does not limit memory (`'a' * 10**10`, doubling a string thirty times) or loops; this module does.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 17  # characters
MAX_TEXT = 1 << 24  # characters or elements of any value of a template
MAX_SECONDS = 5.0

# Filters that no chat template needs and that make long texts of short ones.
_WITHOUT = (
    "center",
    "format",
    "wordwrap",
    "urlize",
    "xmlattr",
    "pprint",
    "random",
    "filesizeformat",
)


class _Generator(CodeGenerator):
    """Compiles `a ~ b` to `join_limited`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_limited((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in _WITHOUT:
            self.filters.pop(name, None)
        self.globals.pop("lipsum", None)
        self.filters["replace"] = _replace
        self.filters["indent"] = _indent

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+" if hasattr(left, "__len__") and hasattr(right, "__len__"):
                _allow(len(left) + len(right))
            case "*":
                for sized, times in ((left, right), (right, left)):
                    if hasattr(sized, "__len__") and isinstance(times, int):
                        _allow(len(sized) * times)
            case "**":
                if not (isinstance(right, int | float) and abs(right) <= 1024):
                    raise SecurityError("an exponent beyond 1024")
            case "%" if isinstance(left, str):
                if re.search(r"\d{4}|\*", left):
                    raise SecurityError("a format of more than 999 characters")
        return super().call_binop(context, operator, left, right)

    def join_limited(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        _allow(sum(map(len, texts)))
        return "".join(texts)


def _allow(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"a text or list of more than {MAX_TEXT:,}")


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(value)
    _allow(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, 256)
    text = str(value)
    _allow(len(text) + (text.count("\n") + 1) * len(prefix))
    lines = text.split("\n")
    rest = [prefix + line if line or blank else line for line in lines[1:]]
    return "\n".join([(prefix if first else "") + lines[0], *rest])


@contextmanager
def time_limit(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Raises `SecurityError` in this thread's Python code when the time is up.

    Uses line tracing: signals exist on POSIX and in main threads only. Another tracer (a debugger,
    coverage) is suspended until the block ends.
    """
    deadline = time.monotonic() + seconds
    lines = 0

    def watch(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal lines
        lines += 1
        if lines % 64 == 0 and time.monotonic() > deadline:
            raise SecurityError(f"more than {seconds:g} seconds")
        return watch

    previous = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(previous)
