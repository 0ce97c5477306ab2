"""Each keyword of JSON Schema is held, as an independent validator confirms, or refused before the
first token."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bytewise

from khaosz.errors import GenerationError
from khaosz.inference.grammar import matcher_for
from khaosz.inference.sampling import SamplingParams

pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")
torch.set_num_threads(1)

Schema = dict[str, Any]


def closed(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    names = [*properties] if required is None else required
    base = {"type": "object", "properties": properties, "required": names}
    return {**base, "additionalProperties": False, **more}


NULL, INTEGER = {"type": "null"}, {"type": "integer"}
NODE = closed({"value": NULL, "next": {"anyOf": [NULL, {"$ref": "#/$defs/node"}]}})
HELD: list[Any] = [
    {},
    {"title": "x", "description": "y", "default": 1, "deprecated": True, "type": "null"},
    {"type": ["string", "null"], "maxLength": 2},
    {"const": {"a": 1, "b": [1.0, 'x"\n春\u0001', None, True, 0.1]}},
    {"enum": [1, "a", None, True, [1], {"x": 1}, 2**53, -0.25]},
    {"enum": [1, 2.5, "abc"], "type": ["integer", "string"], "minLength": 2},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3, "multipleOf": 2},
    {"type": "integer", "minimum": 0.5, "maximum": 2.5},
    {"type": "number", "minimum": 0.1, "maximum": 0.3},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
    {"type": "number", "minimum": -0.5, "exclusiveMaximum": 0},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.25},
    {"type": "number", "exclusiveMinimum": 2**53, "maximum": 1e300},
    {"type": "number", "multipleOf": 0.01, "minimum": -2, "maximum": 2},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^a+b?$", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^\\d{2}\\w[^\\s]$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": ["string", "null"], "format": "date-time"},
    {"type": "string", "format": "email", "maxLength": 20},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "duration"},
    {"type": "array", "items": NULL, "minItems": 1, "maxItems": 3, "uniqueItems": False},
    {"type": "array", "prefixItems": [NULL, {"type": "boolean"}], "items": False, "minItems": 1},
    {"type": "array", "prefixItems": [NULL], "items": INTEGER, "maxItems": 3},
    closed({"a": NULL, "b": INTEGER}, ["a"], minProperties=1),
    closed({"a": NULL, "b": NULL}, [], maxProperties=1),
    closed({'a"b\n春': NULL}),
    closed({"a": False, "b": NULL}, []),
    {"type": "object", "properties": {"a": NULL}, "additionalProperties": INTEGER},
    {"type": "object", "required": ["x"], "minProperties": 2},
    closed({}, [], patternProperties={"^a": INTEGER, "^b": {"type": "boolean"}}),
    closed({"ab": {"type": "boolean"}}, patternProperties={"^[a-c]{1,3}$": {"enum": [True, 1]}}),
    closed({"score": INTEGER}, patternProperties={"^score$": INTEGER}),
    closed({"score": INTEGER}, ["score"], patternProperties={"^(score|a)$": {"maximum": 5}}),
    closed({"a": INTEGER, "b": INTEGER}, patternProperties={"^[ab]$": {"minimum": 5}}),
    {"type": "object", "required": ["a"], "patternProperties": {"^a$": INTEGER}},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"allOf": [closed({"a": NULL, "b": NULL}), {"required": ["a"]}]},
    {"allOf": [closed({"k": NULL}), {"patternProperties": {"^k$": NULL}}]},
    {"anyOf": [{"type": "string", "minLength": 3, "maxLength": 1}, NULL]},
    {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 4}, NULL]},
    {
        "properties": {"a": NULL},
        "required": ["a"],
        "anyOf": [{"required": ["b"]}, {"type": "null"}],
    },
    {"oneOf": [{"type": "string", "maxLength": 3}, INTEGER]},
    {"oneOf": [closed({"k": {"const": "a"}}), closed({"k": {"const": "b"}})]},
    {"$ref": "#/$defs/x", "maximum": 2, "$defs": {"x": {**INTEGER, "minimum": 1}}},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "null"}}},
    {"type": "string", "maxLength": 3, "x-guidance": {"lenient": True}},
]
REFUSED: list[Any] = [
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "dependentSchemas": {"a": {}}},
    {"type": "object", "dependencies": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "object", "patternProperties": {"^a": INTEGER, "b$": NULL}},
    {"type": "object", "minProperties": 2},
    closed({"a": NULL}, ["b"]),
    closed({"a": False}),
    {"type": "array", "unevaluatedItems": False},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": INTEGER},
    {"type": "array", "contains": INTEGER, "minContains": 2},
    {"type": "array", "minItems": 3, "maxItems": 1},
    {"type": "array", "prefixItems": [NULL], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [NULL], "items": INTEGER, "additionalItems": False},
    {"if": {"type": "string"}, "then": {"maxLength": 2}},
    {"not": {"type": "string"}},
    {"not": {}, "x-guidance": {"lenient": True}},
    {"oneOf": [{"type": "number"}, INTEGER]},
    {"oneOf": [{**INTEGER, "minimum": 0}, {**INTEGER, "maximum": 5}]},
    {"anyOf": []},
    {"enum": []},
    {"allOf": [{"type": "string"}, NULL]},
    {"allOf": [{"multipleOf": 65_537}, {"multipleOf": 65_539}]},
    {"$ref": "http://example.com/x"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/n", "$defs": {"n": closed({"next": {"$ref": "#/$defs/n"}})}},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}},
    {"$dynamicRef": "#n", "$dynamicAnchor": "n"},
    {"type": "string", "minLength": 4, "maxLength": 2},
    {"type": "string", "pattern": "^aa$", "minLength": 3},
    {"type": "string", "pattern": "^(?=a)b?a"},
    {"type": "string", "pattern": "^(?!a).*$"},
    {"type": "string", "pattern": "(a)\\1"},
    {"type": "string", "pattern": "\\bword\\b"},
    {"type": "string", "format": "nonsense"},
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "integer", "minimum": 0.2, "maximum": 0.8},
    {"type": "integer", "minimum": "3"},
    {"type": "integer", "multipleOf": 0},
    {"type": "integer", "multipleOf": 10, "minimum": 1, "maximum": 9},
    {"type": "number", "multipleOf": 0.07},
    {"type": "number", "minimum": 1e20},
    {"const": 2**53 + 1},
    {"enum": [1, 2**70]},
    {"const": [{"a": 1234567.123456789012}]},
    {"type": "nonsense"},
    {"type": "object", "properties": []},
]


def written(schema: Schema, seed: int, limit: int = 300) -> str | None:
    """A value that random logits write, one byte a token; None if it is not done by `limit`."""
    params = SamplingParams(json_schema=json.dumps(schema))
    matcher = matcher_for(params, bytewise())
    assert matcher is not None
    draw, ids = random.Random(seed), []
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([each for text in '"]},:' for each in bytewise().encode(text)])
    for _ in range(limit):
        logits = torch.randn(bytewise().vocab_size, generator=generator)
        if draw.random() < 0.4:
            logits[ends] += 9.0
        logits[bytewise().end_id] += 4.0
        token = int(matcher.mask(logits).argmax())
        matcher.accept(token)
        if token == bytewise().end_id:
            return bytewise().decode(ids)
        ids.append(token)
    return None


@pytest.mark.parametrize("schema", HELD, ids=lambda schema: json.dumps(schema)[:70])
def test_schema_is_held(schema: Schema) -> None:
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    values = [text for seed in range(12) if (text := written(schema, seed)) is not None]
    assert values, "nothing was finished"
    for text in values:
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("schema", REFUSED, ids=lambda schema: json.dumps(schema)[:70])
def test_schema_is_refused_before_the_first_token(schema: Schema) -> None:
    with pytest.raises(GenerationError, match=r"^json_schema cannot be used: ") as caught:
        matcher_for(SamplingParams(json_schema=json.dumps(schema)), bytewise())
    assert caught.value.param == "json_schema" and "\n" not in str(caught.value)


EDGES = [0, 1, 10**15, 2**53, 10**18, 2**60, 2**62, 2**63 - 1024]


@settings(max_examples=150, deadline=None)
@given(
    near=st.sampled_from(EDGES),
    offset=st.integers(-3, 3),
    width=st.sampled_from([None, 0, 1, 2, 5, 1500, 2**54]),
    sign=st.sampled_from([1, -1]),
    exclusive=st.booleans(),
)
def test_integer_bounds_are_exact(
    near: int, offset: int, width: int | None, sign: int, exclusive: bool
) -> None:
    """Also beyond 2**53, where fp64 has gaps: within them a schema may be refused."""
    low = near + offset
    high = None if width is None else low + width
    names = ("minimum", "maximum") if sign > 0 else ("maximum", "minimum")
    schema: Schema = {"type": "integer"}
    if exclusive:
        schema[f"exclusive{names[0].capitalize()}"] = sign * (low - 1)
    else:
        schema[names[0]] = sign * low
    if high is not None:
        schema[names[1]] = sign * high
    try:
        text = written(schema, near % 1009 + offset)
    except GenerationError:
        # A number that fp64 and int64 hold would have to be there.
        assert low > 2**63 - 1024 or (near >= 2**53 and width is not None and width < 1024)
        return
    assert text is not None and "." not in text
    assert low <= sign * int(text) and (high is None or sign * int(text) <= high)


def test_largest_bounds_of_common_types_are_accepted() -> None:
    for low, high in ((-(2**63), 2**63 - 1), (0, 2**64 - 1), (0, 2**53 - 1)):
        text = written({"type": "integer", "minimum": low, "maximum": high}, 3)
        assert text is not None and low <= int(text) <= high


def test_declared_name_cannot_be_written_with_escapes() -> None:
    """As a name that is not declared, its value would fit the wrong schema."""
    schema = {"type": "object", "properties": {"a": NULL}, "additionalProperties": INTEGER}
    for name in ('{"\\u0061', '{"\\u006', '{"\\/'):
        matcher = matcher_for(SamplingParams(json_schema=json.dumps(schema)), bytewise())
        assert matcher is not None
        allowed = True
        for token in bytewise().encode(name):
            logits = matcher.mask(torch.zeros(bytewise().vocab_size))
            allowed = allowed and bool(logits[token] == 0)
            if not allowed:
                break
            matcher.accept(token)
        assert not allowed, name
