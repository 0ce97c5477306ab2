"""HTML as Markdown: bytes are decoded, parsed as browsers do (lexbor), and the tree is written."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any

from selectolax.lexbor import LexborHTMLParser, SelectolaxError

from khaosz.rag.load.decode import clean, decode
from khaosz.rag.load.document import Limits, Parsed
from khaosz.rag.load.markdown import MarkdownWriter

_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?([\w-]+)""", re.I
)
# Pages that declare the first are written in the second (https://encoding.spec.whatwg.org).
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "iso-8859-1": "cp1252"}

_DROPPED = frozenset(
    (
        *("script", "style", "noscript", "template", "head", "nav", "rt", "rp", "svg", "canvas"),
        *("iframe", "object", "embed", "audio", "video", "map", "frameset", "meter", "progress"),
        *("select", "datalist", "textarea", "input", "annotation", "annotation-xml"),
    )
)
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)


def parse(raw: bytes, limits: Limits) -> Parsed:
    """Raises DocumentError for bytes that are not text."""
    return html_to_markdown(_decode(raw))


def _decode(raw: bytes) -> str:
    """The declared encoding is used if the bytes are not UTF-8: programs save pages again without
    changing the declaration."""
    declared = _CHARSET.search(raw[:4096])
    if declared and not raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        label = declared[1].decode("ascii").lower()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            try:
                return clean(raw.decode(_SUPERSETS.get(label, label)))
            except (LookupError, UnicodeError):
                pass  # an unknown encoding, or not this one
    return decode(raw)[0]


def html_to_markdown(html: str) -> Parsed:
    """Without scripts, styles, navigation, forms and hidden parts."""
    try:
        tree = LexborHTMLParser(html)
    except SelectolaxError as error:
        raise MemoryError from error  # any HTML can be parsed, so it has no other reason
    title = tree.css_first("head > title")
    layout = _layout_tables(tree.body) if tree.body else set()
    writer = MarkdownWriter()
    if tree.body:
        for event, node in _walk(tree.body):
            if event == "text":
                writer.text(node.text_content or "")
            elif event == "start":
                writer.start(node.tag, node.attributes, is_layout=node.mem_id in layout)
            else:
                writer.end(node.tag)
    return Parsed(clean(writer.finish()), " ".join(clean(title.text()).split()) if title else "")


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """("start" | "text" | "end", node) in document order. Not recursive: elements nest deeper than
    Python's recursion limit."""
    node = root
    above: list[Any] = []
    while True:
        child = None
        if node.tag == "-text":
            yield "text", node
        elif node is root or not (
            node.tag.startswith("-") or node.tag in _DROPPED or _is_hidden(node)
        ):
            yield "start", node
            child = node.child
            if child is None:
                yield "end", node
        if child is not None:
            above.append(node)
            node = child
            continue
        while above and node.next is None:
            node = above.pop()
            yield "end", node
        if not above:
            return
        node = node.next


def _is_hidden(node: Any) -> bool:
    attributes = node.attributes
    if not attributes:
        return node.tag == "dialog"
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") == "navigation"
        or (node.tag == "dialog" and "open" not in attributes)
        or _HIDING.search(attributes.get("style") or "") is not None
    )


def _layout_tables(root: Any) -> set[int]:
    """The ids of tables that contain tables: they lay out a page and hold no rows of data."""
    layout: set[int] = set()
    tables: list[int] = []
    for event, node in _walk(root):
        if event != "text" and node.tag == "table":
            if event == "end":
                tables.pop()
            else:
                layout.update(tables[-1:])
                tables.append(node.mem_id)
    return layout
