"""Tool calls as XML: of MiniCPM5, and of Qwen3.5; whole, cut anywhere, and typed by schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khaosz.inference.parts import Calls, Part, PartStream, ToolCall

TOOLS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "hourly": {"type": "boolean"},
            "scale": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "at": {"type": "array", "items": {"type": "integer"}},
            "place": {"$ref": "#/$defs/place"},
            "unit": {"enum": ["C", "F", 1]},
            "any": {},
        },
        "$defs": {"place": {"type": "object"}},
    },
    "time": None,
}
PARIS = '<function name="weather"><param name="city">Paris</param></function>'
NOW = '<function name="time"></function>'
QWEN = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
QWEN += "</function>\n</tool_call>"
NESTED = (
    '<function name="weather"><param name="city"><![CDATA[</function></param> "5" < 6]]></param>'
    "</function>"
)


def summary(pieces: list[str], calls: Calls, cut: bool = False) -> dict[str, Any]:
    stream = PartStream(calls, tools=TOOLS)
    parts = [part for piece in pieces for part in stream.feed(piece)] + stream.finish(cut=cut)
    result: dict[str, Any] = {"content": "", "calls": []}
    for part in parts:
        if isinstance(part, ToolCall):
            result["calls"].append((part.name, json.loads(part.arguments)))
        else:
            assert isinstance(part, Part) and part.text
            result["content"] += part.text
    return result


CASES: list[tuple[Calls, str, dict[str, Any]]] = [
    ("functions", PARIS, {"calls": [("weather", {"city": "Paris"})]}),
    ("functions", f"I look. \n{PARIS}{NOW}\n\nDone", {"content": "I look.Done",
     "calls": [("weather", {"city": "Paris"}), ("time", {})]}),
    ("functions", f"{NOW}\n{NOW}", {"calls": [("time", {}), ("time", {})]}),
    ("functions", NESTED, {"calls": [("weather", {"city": '</function></param> "5" < 6'})]}),
    ("functions", "<function name='weather'>\n<param name='city'>a &lt;b&gt; &amp; c</param>\n"
     "</function>", {"calls": [("weather", {"city": "a <b> & c"})]}),
    ("functions", '<function name="weather"><param name="city"><![CDATA[a]]]]><![CDATA[>b]]>'
     "</param></function>", {"calls": [("weather", {"city": "a]]>b"})]}),
    # The end marker is missing.
    ("functions", PARIS.removesuffix("</function>"), {"calls": [("weather", {"city": "Paris"})]}),
    ("functions", 'a <function name="time"> is', {"content": 'a <function name="time"> is'}),
    ("functions", "a <function> b", {"content": "a <function> b"}),
    ("functions", '<tool_call>{"name": "time", "arguments": {}}</tool_call>',
     {"calls": [("time", {})]}),
    ("none", PARIS, {"content": PARIS}),
    ("marked", PARIS, {"content": PARIS}),
    ("marked", f"so\n{QWEN}\n{QWEN} end", {"content": "soend",
     "calls": [("weather", {"city": "Paris"})] * 2}),
    ("marked", "<tool_call><function=weather><parameter=city>\nit's 5\" </tool_call>\n\n\n"
     "</parameter></function></tool_call>",
     {"calls": [("weather", {"city": "it's 5\" </tool_call>\n\n"})]}),
    ("marked", QWEN.removesuffix("</tool_call>"), {"calls": [("weather", {"city": "Paris"})]}),
    ("marked", "<tool_call><function=a>no</tool_call> b",
     {"content": "<tool_call><function=a>no</tool_call> b"}),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "text", "expected"), CASES)
def test_calls_whole_or_in_pieces(calls: Calls, text: str, expected: dict[str, Any]) -> None:
    target = {"content": "", "calls": [], **expected}
    assert summary([text], calls) == target
    assert summary(list(text), calls) == target
    for at in range(len(text)):
        assert summary([text[:at], text[at:]], calls) == target, at


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", "75001", "75001"),
        ("city", "true", "true"),
        ("days", " 3 ", 3),
        ("days", "three", "three"),
        ("days", "1.5", "1.5"),
        ("days", "true", "true"),
        ("hourly", "true", True),
        ("hourly", "False", False),
        ("scale", "1e-3", 1e-3),
        ("scale", "None", None),
        ("scale", "NaN", "NaN"),
        ("at", "[1, 2]", [1, 2]),
        ("at", "[1, 2", "[1, 2"),
        ("at", '["</parameter></param>]]>"]', ["</parameter></param>]]>"]),
        ("at", '["\\"</function>"]', ['"</function>']),
        ("scale", "1e999", float("inf")),
        ("place", '{"lat": 1}', {"lat": 1}),
        ("unit", "C", "C"),
        ("unit", "1", 1),
        ("any", "1", "1"),
        ("other", "[1]", "[1]"),
    ],
)
def test_values_are_typed_by_the_schema(name: str, text: str, value: Any) -> None:
    first = f'<function name="weather"><param name="{name}">{text}</param></function>'
    other = f"<tool_call>\n<function=weather>\n<parameter={name}>\n{text}\n</parameter>\n"
    other += "</function>\n</tool_call>"
    for calls, written in (("functions", first), ("marked", other)):
        assert summary([written], calls)["calls"] == [("weather", {name: value})]  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [f"so {PARIS}", f"so {NESTED}", f"so {QWEN}"])
def test_call_cut_at_the_limit_shows_no_markup(text: str) -> None:
    calls: Calls = "marked" if text.endswith(QWEN) else "functions"
    start = text.index("<")
    for at in range(start + 2, len(text)):
        shown = summary([text[:at]], calls, cut=True)
        assert shown["content"].strip() == "so", text[:at]
        assert not shown["calls"] or at > text.rindex("</function>"), text[:at]
    assert summary([text], calls, cut=True)["calls"]


def test_cdata_is_text_between_tags() -> None:
    """As vLLM reads Qwen3-Coder's calls: a file of XML may be what is written."""
    for text in ("<![CDATA[a]]>", "<![CDATA[a"):
        call = f"<tool_call>\n<function=weather>\n<parameter=city>\n{text}\n</parameter>\n"
        assert summary([call + "</function>\n</tool_call>"], "marked")["calls"] == [
            ("weather", {"city": text})
        ]


PIECES = [PARIS, NOW, QWEN, "<function name=", "</function>", "<tool_call>", "</tool_call>", " ",
          "\n", "x", "<", '"', "<![CDATA[", "]]>", "</param>", "<parameter=a>"]  # fmt: skip


@given(
    st.lists(st.sampled_from(PIECES), max_size=10),
    st.sampled_from(["none", "marked", "bare", "functions"]),
    st.booleans(),
)
def test_streamed_parts_join_to_whole(pieces: list[str], calls: Calls, cut: bool) -> None:
    whole = summary(["".join(pieces)], calls, cut)
    assert summary(pieces, calls, cut) == whole
    assert summary(list("".join(pieces)), calls, cut) == whole
