"""A sandbox for untrusted chat templates: no Python attributes, limited memory and time.

Jinja's immutable sandbox keeps templates from accessing Python's internals (CVE-2024-34359). It
does not limit memory (`'a' * 10**10`, `'a'.ljust(10**10)`, doubling a string thirty times) or
loops; this module does. Every operation that makes a long value of short ones is checked before it
runs, and the values of one rendering are counted together. Lists and tables count with all that
they hold, so that nesting a list twice in itself forty times is refused too.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import FilterArgumentError, SecurityError
from jinja2.filters import do_batch, do_int, do_map, do_round, do_slice
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context

MAX_TEMPLATE = 1 << 17  # characters
MAX_TEXT = 1 << 24  # characters or elements of any value of a template
MAX_ITEMS = 1 << 17  # of a list or table with all lists and tables in it
MAX_TOTAL = 1 << 28  # characters of all values that one rendering makes
MAX_SECONDS = 5.0
_MAX_BITS = 1 << 14  # of an integer: Python prints no more than 4,300 digits
_REFERENCE = 8  # bytes of an element of a list

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
# Methods that no chat template needs: bytes have methods of their own that fill up.
_NO_METHODS = ("encode", "translate", "maketrans", "to_bytes", "from_bytes")

_account = threading.local()  # .left: characters that this thread's rendering may still make


class _Generator(CodeGenerator):
    """Compiles `a ~ b` to `join_limited`, and literals of lists and tables to `sized`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_limited((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.sized(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.sized(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            return super().visit_Tuple(node, frame)
        self.write("environment.sized(")
        super().visit_Tuple(node, frame)
        self.write(")")


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            raise SecurityError("a format of more than 999 characters")
        text = str(super().format_field(value, format_spec))
        charge(len(text))
        return text


class _Namespace(Namespace):
    def __repr__(self) -> str:  # Jinja's prints the attributes, however deep they are nested
        return "<Namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in _WITHOUT:
            self.filters.pop(name, None)
        self.globals.pop("lipsum", None)
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = lambda *args, **kwargs: self.sized(dict(*args, **kwargs))
        self.filters |= {
            "replace": _replace,
            "indent": _indent,
            "format": _format,
            "join": _join,
            "batch": _batch,
            "slice": _slice,
            "round": _round,
            "int": _int,
            "sum": _limit_sum(self.filters["sum"]),
        }
        self.filters = {name: _charged(each) for name, each in self.filters.items()}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        text = getattr(function, "__self__", None)
        if isinstance(function, Macro):
            _size((args, kwargs))
        elif isinstance(text, str):
            match function.__name__:
                case "ljust" | "rjust" | "center" | "zfill" if args:
                    charge(args[0])
                case "expandtabs":
                    charge(text.count("\t") * kwargs.get("tabsize", args[0] if args else 8))
                case "replace" if len(args) in (2, 3):
                    return _replace(text, *args)
                case "join" if len(args) == 1:
                    return _joined(text, args[0])
        return _counted(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        form, formatter = str(value.__self__), _Formatter(self)

        def formatted(*args: Any, **kwargs: Any) -> str:
            return formatter.vformat(form, args, kwargs)

        def formatted_map(values: Mapping[str, Any]) -> str:
            return formatter.vformat(form, (), values)

        return formatted if value.__name__ == "format" else formatted_map

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+" if hasattr(left, "__len__") and hasattr(right, "__len__"):
                charge(len(left) + _size(right))
            case "*":
                for sized, times in ((left, right), (right, left)):
                    if hasattr(sized, "__len__") and isinstance(times, int):
                        charge(_size(sized) * times)
                if isinstance(left, int) and isinstance(right, int):
                    _limit_bits(left.bit_length() + right.bit_length())
            case "**":
                if not (isinstance(right, int | float) and abs(right) <= 1024):
                    raise SecurityError("an exponent beyond 1024")
                if isinstance(left, int):
                    _limit_bits(left.bit_length() * abs(right))
            case "%" if isinstance(left, str):
                _check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def join_limited(self, parts: Iterable[Any]) -> str:
        return _joined("", parts)

    def concat(self, parts: Iterable[str]) -> str:  # of a macro, `{% set x %}` and the like
        return _joined("", parts)

    def sized(self, value: Any) -> Any:
        """`value`, a list or table. Raises SecurityError for one that holds too much."""
        charge(_size(value))
        return value


def charge(size: float) -> None:
    """Counts a value of this many characters. Raises SecurityError if it is too long, or all values
    of this rendering together are."""
    if size > MAX_TEXT:
        raise SecurityError(f"a text or list of more than {MAX_TEXT:,}")
    left = getattr(_account, "left", None)
    if left is not None and size > 0:
        _account.left = left - size
        if left < size:
            raise SecurityError(f"texts and lists of more than {MAX_TOTAL:,} characters in all")


def _size(value: Any) -> int:
    """Characters of a text; of a list or table, those of all that it holds, about as printed."""
    if isinstance(value, str):
        return len(value)
    total, items, waiting = 0, 0, [value]
    while waiting:
        item = waiting.pop()
        items += 1
        match item:
            case str():
                total += len(item)
            case dict():
                waiting += [*item.keys(), *item.values()]
            case list() | tuple():
                waiting += item
            case int():
                total += item.bit_length() // 3
        if total > MAX_TEXT or items + len(waiting) > MAX_ITEMS:
            raise SecurityError("a list or table that holds too much")
    return total + items


def _counted(value: Any) -> Any:
    if isinstance(value, str):
        charge(len(value))
    elif isinstance(value, list):
        charge(len(value))
        if not all(isinstance(item, dict) for item in value[:1]):  # texts, cut out of another
            charge(min(MAX_TEXT, len(value) * _REFERENCE))
    return value


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return _counted(function(*args, **kwargs))

    return counted


def _limit_bits(bits: float) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"an integer of more than {_MAX_BITS:,} bits")


def _joined(separator: str, parts: Iterable[Any]) -> str:
    texts = []
    for part in parts:
        text = str(part)
        charge(len(text) + len(separator))
        texts.append(text)
    if sum(map(len, texts)) + len(separator) * len(texts) > MAX_TEXT:
        raise SecurityError(f"a text or list of more than {MAX_TEXT:,}")
    return separator.join(texts)


@pass_context
def _join(context: Context, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = do_map(context, value, attribute=attribute)
    return _joined(str(d), value)


def _batch(value: Any, linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    charge(linecount)
    return do_batch(value, linecount, fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Iterator[list[Any]]:
    charge(slices * _REFERENCE)
    return do_slice.__wrapped__(value, slices, fill_with)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 308:
        raise SecurityError("a precision beyond 308 digits")
    return do_round(value, precision, method)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    """Of a text in base 2, 8, 16 or 32, Python does not limit the length."""
    return do_int(value if not isinstance(value, str) else value[:4300], default, base)


def _limit_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, start: float = 0, **kwargs: Any) -> Any:
        if len(args) > 3 or not isinstance(start, int | float):
            raise SecurityError("a sum that starts with something else than a number")
        return function(*args, start=start, **kwargs)

    return limited


def _check_format(text: str, values: Any) -> None:
    """Refuses a width or precision of four digits and one that an argument gives, and a long
    result."""
    specs = re.findall(r"%(?:\([^)]*\))?([-#0 +]*[*.\d]*)", text)
    size = len(text)
    for spec in specs:
        if re.search(r"\d{4}|\*", spec):
            raise SecurityError("a format of more than 999 characters")
        size += sum(map(int, re.findall(r"\d+", spec)))
    if isinstance(values, Mapping):  # a value may occur in every place
        size += len(specs) * max(map(_size, values.values()), default=0)
    else:
        size += _size(values)
    charge(size)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    text = str(value)
    _check_format(text, kwargs or args)
    return text % (kwargs or args)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    charge(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, 256)
    text = str(value) + "\n"  # as Jinja's filter, which so keeps a line end at the end
    charge(len(text) + (len(text.splitlines()) + 1) * len(prefix))
    head, *rest = text.splitlines()
    rest = [prefix + line if line or blank else line for line in rest]
    return "\n".join([(prefix if first else "") + head, *rest])


@contextmanager
def time_limit(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Raises `SecurityError` in this thread's Python code when the time is up, and when the values
    that templates make have more than `MAX_TOTAL` characters in all.

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
    _account.left = MAX_TOTAL
    try:
        yield
    finally:
        _account.left = None
        sys.settrace(previous)
