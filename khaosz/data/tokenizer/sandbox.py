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
from jinja2.exceptions import FilterArgumentError, SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 17  # characters
MAX_TEXT = 1 << 24  # characters or elements of any value of a template
MAX_SECONDS = 5.0

# Filters that no chat template needs and that make long texts of short ones.
_WITHOUT = (
    "center",
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
        self.filters["format"] = _format

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
                _check_format(left)
        return super().call_binop(context, operator, left, right)

    def join_limited(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        _allow(sum(map(len, texts)))
        return "".join(texts)


def _allow(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"a text or list of more than {MAX_TEXT:,}")


def _check_format(text: str) -> None:
    """Refuses a width or precision of four digits and one that an argument gives."""
    for spec in re.findall(r"%(?:\([^)]*\))?([-#0 +]*[*.\d]*)", text):
        if re.search(r"\d{4}|\*", spec):
            raise SecurityError("a format of more than 999 characters")


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    text = str(value)
    _check_format(text)
    return text % (kwargs or args)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    _allow(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, 256)
    text = str(value) + "\n"  # as Jinja's filter, which so keeps a line end at the end
    _allow(len(text) + (len(text.splitlines()) + 1) * len(prefix))
    head, *rest = text.splitlines()
    rest = [prefix + line if line or blank else line for line in rest]
    return "\n".join([(prefix if first else "") + head, *rest])


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
