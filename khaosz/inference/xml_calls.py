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

from khaosz.inference.json_schema import target_of

OPENING = "<function"
END = "</function>"
# The forms =x> and name="x">.
_NAMED = r'(?:=|(?P<xml>\s+name\s*=\s*))(?P<quote>["\']?)(?P<name>[^"\'<>\n]+)(?P=quote)\s*>'
_FUNCTION = re.compile(rf"\s*<function{_NAMED}\s*")
_PARAMETER = re.compile(rf"\s*<(?P<tag>param(?:eter)?){_NAMED}")
_CLOSED = re.compile(rf"\s*{END}\s*")
_CDATA, _CDATA_END = "<![CDATA[", "]]>"
_ENTITIES = {"&quot;": '"', "&apos;": "'"}
TYPES: dict[str, Callable[[Any], bool]] = {
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
    text: str, schemas: Mapping[str, Any], parse: Callable[[str], Any], *, strings: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls that `text` is; none if it is anything else, or one is
    incomplete. `schemas`: of the parameters of each tool; `parse`: JSON, raises ValueError;
    `strings`: a marker in a string of JSON ends nothing, and every string ends."""
    calls, at = [], 0
    while at < len(text):
        opening = _FUNCTION.match(text, at)
        if opening is None:
            return []
        name, at = opening["name"].strip(), opening.end()
        schema, arguments = schemas.get(name) or {}, {}
        while (parameter := _PARAMETER.match(text, at)) is not None:
            key, properties = parameter["name"].strip(), schema.get("properties")
            known = properties.get(key) if isinstance(properties, dict) else None
            types = _types(known, schema)
            nested = strings and bool(types & {"array", "object"})
            end, is_xml = f"</{parameter['tag']}>", parameter["xml"] is not None
            raw = _value(text, parameter.end(), end, is_xml, nested)
            if raw is None:
                return []
            value, at = raw
            arguments[key] = _typed(value, types, parse)
        closed = _CLOSED.match(text, at)
        if closed is None:
            return []
        calls.append((name, arguments))
        at = closed.end()
    return calls


def _value(text: str, at: int, end: str, is_xml: bool, nested: bool) -> tuple[str, int] | None:
    """A value and where its end marker ends. Templates put a line break at both of its ends.
    Sections of CDATA may hold any marker, and so may strings in JSON that is `nested`."""
    start, sections = at, []
    while (
        is_xml
        and (section := at + _space(text, at)) < len(text)
        and text.startswith(_CDATA, section)
    ):
        stop = _find(text, _CDATA_END, section + len(_CDATA), nested)
        if stop < 0:
            return None
        sections.append(text[section + len(_CDATA) : stop])
        at = stop + len(_CDATA_END)
    stop = _find(text, end, at, nested)
    if stop < 0:
        return None
    after = stop + len(end)
    if sections and not text[at:stop].strip():
        return "".join(sections), after
    value = text[start:stop].removeprefix("\n").removesuffix("\n")
    return (unescape(value, _ENTITIES) if is_xml else value), after


def _find(text: str, marker: str, at: int, nested: bool) -> int:
    """Where a marker begins, outside of strings if the text is the JSON of a list or an object."""
    start = at + _space(text, at)
    if not nested or text[start : start + 1] not in ("[", "{"):
        return text.find(marker, at)
    tokens = re.compile(rf'"(?:\\.|[^"\\])*+"?|{re.escape(marker)}', re.DOTALL)
    return next((t.start() for t in tokens.finditer(text, at) if t[0] == marker), -1)


def _space(text: str, at: int) -> int:
    return len(text[at : at + 64]) - len(text[at : at + 64].lstrip())


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """JSON types that a schema allows; none where it doesn't say."""
    if not isinstance(schema, dict) or depth > _DEPTH:
        return set()
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        return _types(target_of(root, reference), root, depth + 1)
    listed = schema.get("type")
    types = {each for each in (listed if isinstance(listed, list) else [listed]) if each}
    for alternatives in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(alternatives) or ():
            types |= _types(each, root, depth + 1)
    for value in [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]:
        if not listed:
            types |= {name for name, holds in TYPES.items() if holds(value)} or {"string"}
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
    if isinstance(value, str) and literal[0] in "-0123456789":  # a number that Python can't hold
        return value if types & {"integer", "number"} else text
    return value if any(each in TYPES and TYPES[each](value) for each in types) else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
