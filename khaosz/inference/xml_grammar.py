"""Grammars of tool calls in the XML of `xml_calls`, in llguidance's dialect of Lark.

`xml_calls.parse_calls` reads what such a grammar allows as arguments that fit the schema. Values
are texts without quotes there, so some schemas cannot be written: those with a pattern, with a
constrained number beside a text, or with a name that the XML cannot hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from khaosz.inference.grammar import check_schema
from khaosz.inference.json_schema import target_of
from khaosz.inference.xml_calls import END, TYPES, parse_calls

Schema = dict[str, Any]

# Keywords that restrict nothing here. Properties that are not declared are not written.
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id"}
_DEFINITIONS = ("$defs", "definitions")
_OBJECT = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_NOTES}
_LENGTHS = {"minLength", "maxLength"}
_CONSTANTS = {"enum", "const"}
_SCALARS = {"null", "boolean", "integer", "number"}
_DEPTH = 8  # of references and alternatives


def _any_but(marker: str, length: str) -> str:
    """Characters that do not contain a marker, as an expression of a terminal."""
    return rf"(/(?s:.{length})/ & ~/(?s:.*){marker}(?s:.*)/)"


@dataclass(frozen=True)
class Form:
    """How calls are written: `tags` as Qwen3.5 and Qwen3-Coder do, else as MiniCPM5 does.
    `quote`: a text as grammar, in which the tokenizer's special tokens are tokens."""

    tags: bool
    quote: Callable[[str], str]

    @property
    def closing(self) -> str:
        return "\n</parameter>\n" if self.tags else "</param>"

    def function(self, name: str) -> str:
        return f"<function={name}>\n" if self.tags else f'<function name="{name}">'

    def parameter(self, name: str) -> str:
        return f"<parameter={name}>\n" if self.tags else f'<param name="{name}">'

    def constant(self, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        plain = self.tags or (text == text.strip("\n") and not set(text) & {"<", "&"})
        return text if plain else f"<![CDATA[{text}]]>"

    def text(self, length: str) -> tuple[str, str]:
        """A terminal, and what stands after it. The parser drops a line break at both ends, which
        counts where a length is held."""
        if self.tags:
            return _any_but(r"<\/parameter>", length) + ' "\\n</parameter>"', '"\\n"'
        characters = "[^<&]" if length == "*" else r"[^<&\n]"
        section = f'"<![CDATA[" {_any_but("]]>", length)} "]]>"'
        return f"/{characters}{length}/ | {section}", self.quote(self.closing)

    def json(self, rule: str, kind: str) -> str:
        if self.tags or kind in _SCALARS:
            return f"{rule} {self.quote(self.closing)}"
        return f'"<![CDATA[" {rule} "]]>" {self.quote(self.closing)}'


def function_rules(
    rule: str, name: str, schema: Schema, form: Form, layout: Schema
) -> list[str] | None:
    """Rules, the first of them `rule`, of a call of the function `name` whose parameters have this
    schema; None where the XML cannot hold it. `layout`: llguidance's options of JSON."""
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    if not set(schema) <= _OBJECT or not set(required) <= set(properties):
        return None
    parts, rules = [form.quote(form.function(name))], []
    for i, key in enumerate(properties):
        part = f"{rule}_{i}"
        value = _value(part, name, key, schema, form, layout)
        if value is None:
            return None
        rules += value
        parts.append(part if key in required else f"{part}?")
    return [f"{rule}: {' '.join(parts)} {form.quote(END)}", *rules]


def _value(
    rule: str, name: str, key: str, schema: Schema, form: Form, layout: Schema
) -> list[str] | None:
    """Rules of one parameter."""

    def reads(text: str, value: Any) -> bool:
        """Whether the parser finds this value in a text."""
        call = f"{form.function(name)}{form.parameter(key)}{text}{form.closing}{END}"
        return parse_calls(call, {name: schema}, json.loads) == [(name, {key: value})]

    options = _options(schema["properties"][key], schema)
    opening = form.quote(form.parameter(key))
    if options is None or not reads("", ""):  # the name
        return None
    texts = [option for option in options if option.get("type", "string") == "string"]
    texts = [option for option in texts if _CONSTANTS.isdisjoint(option)]
    if texts:
        # A text that is a number is read as a number, so any number must be allowed.
        others = [option for option in options if option not in texts]
        if len(texts) > 1 or not all(map(_is_free, others)):
            return None
        least, most = texts[0].get("minLength", 0), texts[0].get("maxLength")
        length = (
            "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        )
        terminal, after = form.text(length)
        upper = rule.upper()
        return [f"{rule}: {opening} {upper} {after}", f"{upper}: {terminal}"]
    bodies, rules = [], []
    for i, option in enumerate(options):
        if _CONSTANTS.isdisjoint(option):
            needed = _DEFINITIONS if '"$ref"' in json.dumps(option) else ()
            inner = {**{key: schema[key] for key in needed if key in schema}, **option}
            inner = {**check_schema(inner, "lark"), "x-guidance": layout}
            bodies.append(form.json(f"{rule}_{i}", option["type"]))
            rules.append(f"{rule}_{i}: %json {json.dumps(inner)}")
            continue
        for value in [option["const"]] if "const" in option else option["enum"]:
            text = form.constant(value)
            if not reads(text, value):
                return None
            bodies.append(form.quote(text + form.closing))
    return [f"{rule}: {opening} ( {' | '.join(bodies)} )", *rules]


def _options(schema: Any, root: Schema, depth: int = 0) -> list[Schema] | None:
    """Alternatives of a schema: constants, a type each, or none for any text. None: it has
    keywords that a text cannot be held to."""
    if schema is True:
        return [{}]
    if not isinstance(schema, dict) or depth > _DEPTH:
        return None
    keys = set(schema) - _NOTES
    kind = schema.get("type")
    if keys == {"$ref"}:
        return _options(target_of(root, schema["$ref"]), root, depth + 1)
    if keys == {"anyOf"}:
        inner = [_options(each, root, depth + 1) for each in schema["anyOf"]]
        return None if None in inner else [each for options in inner for each in options or ()]
    if keys & _CONSTANTS:
        return [schema] if keys <= {"type", "enum"} or keys <= {"type", "const"} else None
    if isinstance(kind, list):
        return _options({"anyOf": [{**schema, "type": each} for each in kind]}, root, depth + 1)
    if kind in TYPES or not keys or (kind == "string" and keys <= {"type", *_LENGTHS}):
        return [schema]
    return None


def _is_free(option: Schema) -> bool:
    if _CONSTANTS & set(option):
        return all(isinstance(each, str) for each in option.get("enum", [option.get("const")]))
    return option["type"] in _SCALARS and set(option) <= {"type", *_LENGTHS, *_NOTES}
