"""Tool calls written as XML, in two forms: MiniCPM5's

    <function name="weather"><param name="city"><![CDATA[Paris]]></param></function>

and that of Qwen3.5 and Qwen3-Coder, inside of <tool_call>:

    <function=weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

Values are texts. The parameter's JSON schema says which of them are numbers, lists and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from xml.sax.saxutils import unescape

OPENING = "<function"
END = "</function>"
# The forms =x> and name="x">.
_NAMED = r'(?:=|(?P<xml>\s+name\s*=\s*))(?P<quote>["\']?)(?P<name>[^"\'<>\n]+)(?P=quote)\s*>'
_FUNCTION = re.compile(rf"\s*<function{_NAMED}\s*")
_PARAMETER = re.compile(rf"\s*<(?P<tag>param(?:eter)?){_NAMED}")
_CLOSED = re.compile(rf"\s*{END}\s*")
_CDATA, _CDATA_END = "<![CDATA[", "]]>"
_ENTITIES = {"&quot;": '"', "&apos;": "'"}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: _is_number(value),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_DEPTH = 8  # of references and alternatives in a schema


def parse_calls(
    text: str, schemas: Mapping[str, Any], parse: Callable[[str], Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls that `text` is; none if it is anything else, or one is
    incomplete. `schemas`: of the parameters of each tool; `parse`: JSON, raises ValueError."""
    calls, at = [], 0
    while at < len(text):
        opening = _FUNCTION.match(text, at)
        if opening is None:
            return []
        name, at = opening["name"].strip(), opening.end()
        schema, arguments = schemas.get(name) or {}, {}
        while (parameter := _PARAMETER.match(text, at)) is not None:
            raw = _value(
                text, parameter.end(), f"</{parameter['tag']}>", parameter["xml"] is not None
            )
            if raw is None:
                return []
            key, (value, at) = parameter["name"].strip(), raw
            properties = schema.get("properties")
            known = properties.get(key) if isinstance(properties, dict) else None
            arguments[key] = _typed(value, _types(known, schema), parse)
        closed = _CLOSED.match(text, at)
        if closed is None:
            return []
        calls.append((name, arguments))
        at = closed.end()
    return calls


def _value(text: str, at: int, end: str, is_xml: bool) -> tuple[str, int] | None:
    """A value and where its end marker ends. Templates put a line break at both of its ends.
    Sections of CDATA may hold any marker."""
    start, sections = at, []
    while (section := at + _space(text, at)) < len(text) and text.startswith(_CDATA, section):
        stop = text.find(_CDATA_END, section)
        if stop < 0:
            return None
        sections.append(text[section + len(_CDATA) : stop])
        at = stop + len(_CDATA_END)
    stop = text.find(end, at)
    if stop < 0:
        return None
    after = stop + len(end)
    if sections and not text[at:stop].strip():
        return "".join(sections), after
    value = text[start:stop].removeprefix("\n").removesuffix("\n")
    return (unescape(value, _ENTITIES) if is_xml else value), after


def _space(text: str, at: int) -> int:
    return len(text[at : at + 64]) - len(text[at : at + 64].lstrip())


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """JSON types that a schema allows; none where it doesn't say."""
    if not isinstance(schema, dict) or depth > _DEPTH:
        return set()
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for key in reference[2:].split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        return _types(target, root, depth + 1)
    listed = schema.get("type")
    types = {each for each in (listed if isinstance(listed, list) else [listed]) if each}
    for alternatives in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(alternatives) or ():
            types |= _types(each, root, depth + 1)
    for value in [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]:
        if not listed:
            types |= {name for name, holds in _TYPES.items() if holds(value)} or {"string"}
    return types


def _typed(text: str, types: set[str], parse: Callable[[str], Any]) -> Any:
    """The value that a text stands for: JSON of one of the types, else the text itself."""
    if not types - {"string"}:
        return text
    literal = text.strip()
    try:
        value = parse(_PYTHON.get(literal, literal))
    except (ValueError, RecursionError):
        return text
    return value if any(each in _TYPES and _TYPES[each](value) for each in types) else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
