"""Forced calls in XML: whatever the grammar allows is read as arguments that fit the schema, as an
independent validator confirms. Schemas that the XML cannot hold are left to JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from khaosz.inference.parts import PartStream, ToolCall
from khaosz.inference.xml_grammar import Form, function_rules

llguidance = pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

TEXT: dict[str, Any] = {"type": "string"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": TEXT,
        "short": {"type": "string", "minLength": 2, "maxLength": 4},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "unit": {"enum": ["C", "<F> & '\"", "", 1, None]},
        "exactly": {"const": "\n"},
        "note": {"anyOf": [TEXT, {"type": "null"}], "default": None},
        "names": {"type": "array", "items": TEXT, "maxItems": 3},
        "place": {"$ref": "#/$defs/place", "description": "where"},
        "any": {},
        "flag": {"type": ["boolean", "null"]},
        "mixed": {"type": ["string", "integer"], "minLength": 2},
        "hourly": True,
        "kind": {"anyOf": [{"$ref": "#/$defs/kind"}, {"type": "null"}]},
    },
    "required": ["short", "unit", "exactly", "names", "place", "kind"],
    "$defs": {
        "place": {"type": "object", "properties": {"lat": {"type": "integer"}},
                  "required": ["lat"], "additionalProperties": False},
        "kind": {"type": "string", "enum": ["rain", "sun"]},
    },
}  # fmt: skip
FINAL = 256
ENDS = (b"\n</parameter>\n", b"]]>", b"</param>", b'"')


def written(grammar: str, draw: random.Random) -> str:
    """A random text of a grammar, in which what ends values is frequent."""
    import llguidance.numpy
    import numpy as np

    from khaosz.inference.grammar import _byte_tokens

    matcher, text = llguidance.LLMatcher(_byte_tokens(), grammar, log_level=0), bytearray()
    assert not matcher.is_error(), matcher.get_error()
    mask = np.zeros((1, FINAL // 32 + 1), dtype=np.int32)
    while len(text) < 20_000:
        llguidance.numpy.fill_next_token_bitmask(matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8)[0], bitorder="little")
        if bits[FINAL]:
            return text.decode()
        more = bytes([draw.choice(bits[:FINAL].nonzero()[0].tolist())])
        for end in draw.sample(ENDS, 4) if draw.random() < 0.3 else ():
            if matcher.deep_copy().try_consume_tokens([*end]) == len(end):
                more = end
                break
        assert matcher.try_consume_tokens([*more]) == len(more), matcher.get_error()
        text += more
    raise AssertionError(text[:500])


@pytest.mark.parametrize("tags", [True, False])
def test_forced_calls_are_read_and_fit(tags: bool) -> None:
    rules = function_rules("f0", "look", SCHEMA, Form(tags, json.dumps), {})
    assert rules is not None
    start = 'start: "<tool_call>" f0 "</tool_call>"' if tags else "start: f0"
    draw, names = random.Random(0), set()
    for _ in range(40):
        text = written("\n".join([start, *rules]), draw)
        stream = PartStream("marked" if tags else "functions", tools={"look": SCHEMA})
        [call] = [*stream.feed(text), *stream.finish()]
        assert isinstance(call, ToolCall) and call.name == "look", text
        arguments = json.loads(call.arguments)
        jsonschema_rs.Draft202012Validator(SCHEMA).validate(arguments)
        names |= set(arguments)
    assert names == set(SCHEMA["properties"])


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "^[a-z]$"}}},
        {"properties": {"a": {"type": "string", "format": "date"}}},
        {"properties": {"a": {"anyOf": [TEXT, {"type": "integer", "minimum": 1}]}}},
        {"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
        {"properties": {"a": {"enum": ["1", 1]}}},
        {"properties": {"a": {"minimum": 1}}},
        {"properties": {'a"': TEXT}},
        {"properties": {" a": TEXT}},
        {"properties": {}, "required": ["a"]},
        {"properties": {"a": TEXT}, "minProperties": 1},
        {"properties": {"a": TEXT, "b": TEXT}, "dependentRequired": {"a": ["b"]}},
    ],
)
@pytest.mark.parametrize("tags", [True, False])
def test_what_the_xml_cannot_hold_is_left_to_json(schema: dict[str, Any], tags: bool) -> None:
    assert function_rules("f0", "look", schema, Form(tags, json.dumps), {}) is None
