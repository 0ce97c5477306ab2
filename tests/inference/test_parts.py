"""What a model says, taken apart: whole, and cut anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from khaosz.inference.parts import Calls, Part, PartStream, ToolCall

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def summary(
    pieces: list[str],
    calls: Calls = "marked",
    thinking: bool = False,
    cut: bool = False,
    tools: tuple[str, ...] = (),
) -> dict[str, Any]:
    stream = PartStream(calls, thinking=thinking, tools=tools)
    result = [part for piece in pieces for part in stream.feed(piece)] + stream.finish(cut=cut)
    output: dict[str, Any] = {"reasoning": "", "content": "", "calls": []}
    for part in result:
        if isinstance(part, ToolCall):
            assert part.id.startswith("call_")
            output["calls"].append((part.name, json.loads(part.arguments)))
        else:
            assert part.text, "an empty part"
            output[part.kind] += part.text
    return output


CASES: list[tuple[str, Calls, bool, dict[str, Any]]] = [
    ("  plain \n text \n", "marked", False, {"content": "  plain \n text \n"}),
    ("  plain \n text \n", "none", False, {"content": "  plain \n text \n"}),
    ("", "marked", False, {}),
    ("<think>\n一二\n\n三\n</think>\n\n答案", "none", False,
     {"reasoning": "一二\n\n三", "content": "答案"}),
    ("一二\n</think>\n\n答案\n", "marked", True, {"reasoning": "一二", "content": "答案\n"}),
    ("\n\n</think>\n\nyes", "marked", True, {"content": "yes"}),
    ("<think>cut at its len", "none", False, {"reasoning": "cut at its len"}),
    ("a <think> in the text</think>", "none", False, {"content": "a <think> in the text</think>"}),
    ("<thinking>", "none", False, {"content": "<thinking>"}),
    (" <thi", "none", False, {"content": " <thi"}),
    (f"{WEATHER}\n{TIME}", "marked", False,
     {"calls": [("weather", {"city": "北京"}), ("time", {})]}),
    (f"I look. \n{TIME}\nDone", "marked", False,
     {"content": "I look.Done", "calls": [("time", {})]}),
    (f"<think>\nhm\n</think>\n\n{TIME}", "marked", False,
     {"reasoning": "hm", "calls": [("time", {})]}),
    (WEATHER, "none", False, {"content": WEATHER}),
    ("a \n<tool_call>not JSON</tool_call> b", "marked", False,
     {"content": "a \n<tool_call>not JSON</tool_call> b"}),
    ('<tool_call>{"name": "cut', "marked", False, {"content": '<tool_call>{"name": "cut'}),
    ('<tool_call>[{"name": "a", "arguments": "{\\"x\\": 1}"}, {"name": "b"}]</tool_call>',
     "marked", False, {"calls": [("a", {"x": 1}), ("b", {})]}),
    ('<tool_call>[{"name": "a"}, 3]</tool_call>', "marked", False,
     {"content": '<tool_call>[{"name": "a"}, 3]</tool_call>'}),
    ('<tool_call>{"name": "a\\ud83d", "arguments": {"x": "\\ud83d"}}</tool_call>', "marked", False,
     {"calls": [("a?", {"x": "?"})]}),
    ('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "marked", False,
     {"content": '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>'}),
    ('<tool_call>{"name": "a", "arguments": {"x": "</tool_call> \\" </tool_call>"}}</tool_call>b',
     "marked", False, {"calls": [("a", {"x": '</tool_call> " </tool_call>'})], "content": "b"}),
    ('<tool_call>{"name": "a", "arguments": {"x": "\\\\"}}</tool_call>', "marked", False,
     {"calls": [("a", {"x": "\\"})]}),
    ('<tool_call>{"name": "a", "arguments": {"x": "a\n\tb\r\n"}}</tool_call>', "marked", False,
     {"calls": [("a", {"x": "a\n\tb\r\n"})]}),
    ('<tool_call>{"name": "a", "arguments": "{\\"x\\": \\"a\n\\"}"}</tool_call>', "marked", False,
     {"calls": [("a", {"x": "a\n"})]}),
    ('<tool_call>\n{{"name": "a", "arguments": {}}}\n</tool_call>', "marked", False,
     {"calls": [("a", {})]}),
    # The end marker is missing.
    ('on <tool_call>{"name": "a", "arguments": {"x": "</tool_call>"}}\n', "marked", False,
     {"content": "on", "calls": [("a", {"x": "</tool_call>"})]}),
    # A quotation mark is missing.
    (f'<tool_call>{{"name: 1}}</tool_call> b {TIME}', "marked", False,
     {"content": '<tool_call>{"name: 1}</tool_call> b', "calls": [("time", {})]}),
    ('{"name": "a", "parameters": {"x": 1}}', "bare", False, {"calls": [("a", {"x": 1})]}),
    ('{"other": 1}', "bare", False, {"content": '{"other": 1}'}),
    ("no {", "bare", False, {"content": "no {"}),
]  # fmt: skip


def test_numbers_beyond_python_are_kept_as_written() -> None:
    """The grammar of a forced call allows them: JSON does not bound numbers."""
    digits = "-" + "9" * 5000
    arguments = f'{{"a": 7e8164181, "b": [-1E+999, {digits}], "c": 0.5, "d": "1e999"}}'
    twice = json.dumps(arguments)
    for written in (arguments, twice):
        stream = PartStream("marked")
        parts = stream.feed(f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>')
        [call] = parts + stream.finish()
        assert isinstance(call, ToolCall) and call.arguments == arguments


@pytest.mark.parametrize(("text", "calls", "thinking", "expected"), CASES)
def test_parts_whole_or_in_pieces(
    text: str, calls: Calls, thinking: bool, expected: dict[str, Any]
) -> None:
    target = {"reasoning": "", "content": "", "calls": [], **expected}
    assert summary([text], calls, thinking) == target
    assert summary(list(text), calls, thinking) == target
    for cut in range(len(text)):
        assert summary([text[:cut], text[cut:]], calls, thinking) == target, cut


UNMARKED: list[tuple[str, bool, dict[str, Any]]] = [
    ('{"name": "a", "arguments": {"x": "}"}}\n', False, {"calls": [("a", {"x": "}"})]}),
    (' ```json\n{\n  "name": "a",\n  "parameters": {"x": 1}\n}\n```\n', False,
     {"calls": [("a", {"x": 1})]}),
    ('```\n{"name": "a", "arguments": "{}"}', False, {"calls": [("a", {})]}),
    ('<think>hm</think>\n{"name": "a", "arguments": {}}', False,
     {"reasoning": "hm", "calls": [("a", {})]}),
    ('{{"name": "a", "arguments": {"x": 1}}}', False, {"calls": [("a", {"x": 1})]}),
    # Of another name, without arguments, or with a text around them, they are text.
    ('{"name": "b", "arguments": {}}', False, {"content": '{"name": "b", "arguments": {}}'}),
    ('{"name": "a"}', False, {"content": '{"name": "a"}'}),
    ('{"name": "a", "age": 7}', False, {"content": '{"name": "a", "age": 7}'}),
    ('so {"name": "a", "arguments": {}}', False,
     {"content": 'so {"name": "a", "arguments": {}}'}),
    ('{"name": "a", "arguments": {}} calls a', False,
     {"content": '{"name": "a", "arguments": {}} calls a'}),
    ("```json\n[1]\n```", False, {"content": "```json\n[1]\n```"}),
    ('{"name": "a", "arg', True, {}),
    ('```json\n{"name": "a", "arguments": {"x": ', True, {}),
    ("```json\n{", True, {"content": "```json\n{"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cut", "expected"), UNMARKED)
@pytest.mark.parametrize("calls", ["marked", "bare"])
def test_call_without_markers(text: str, cut: bool, expected: dict[str, Any], calls: Calls) -> None:
    """As Qwen2.5-Coder writes them."""
    if calls == "bare" and text in ('{"name": "a"}', '{"name": "a", "age": 7}'):
        expected = {"calls": [("a", {})]}  # Llama's template promises no arguments
    target = {"reasoning": "", "content": "", "calls": [], **expected}
    for at in range(len(text)):
        pieces = [text[:at], text[at:]]
        assert summary(pieces, calls, cut=cut, tools=("a", "c")) == target, at
    assert summary(list(text), calls, cut=cut, tools=("a", "c")) == target
    if "```" not in text and "<" not in text:
        assert summary([text], "none", cut=cut, tools=("a",))["content"] == text


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "a"}', " ", "\n", "x",
          "<", '"', "\\", '{"name": "a", "arguments": {"x": "</tool_call>"}}', "```"]  # fmt: skip


# A backslash before the marker, outside of a string, once hid it for ever.
@example(["<tool_call>", "\\", "</tool_call>", "\\"], "marked", False, False, ())
@given(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.sampled_from(["none", "marked", "bare"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), ("a",)]),
)
def test_streamed_parts_join_to_whole(
    pieces: list[str], calls: Calls, thinking: bool, cut: bool, tools: tuple[str, ...]
) -> None:
    whole = summary(["".join(pieces)], calls, thinking, cut, tools)
    assert summary(pieces, calls, thinking, cut, tools) == whole
    assert summary(list("".join(pieces)), calls, thinking, cut, tools) == whole


CUT: list[tuple[str, Calls, bool, dict[str, Any]]] = [
    ('so <tool_call>\n{"name": "a", "argum', "marked", False, {"content": "so"}),
    ("so <tool_call>\n", "marked", False, {"content": "so"}),
    ("so <tool_c", "marked", False, {"content": "so "}),
    ("a <", "marked", False, {"content": "a <"}),
    ("<tool_call> is a marker of", "marked", False, {"content": "<tool_call> is a marker of"}),
    (f"{TIME}\n<tool_call>[", "marked", False, {"calls": [("time", {})]}),
    ('<tool_call>{"name": "a", "arguments": {}}\n</tool', "marked", False, {"calls": [("a", {})]}),
    ("hm</thi", "none", True, {"reasoning": "hm"}),
    (" <thi", "none", False, {"content": " "}),
    ('{"name": "a", "para', "bare", False, {}),
    ('{"na', "bare", False, {"content": '{"na'}),
    ('{"other": "x', "bare", False, {"content": '{"other": "x'}),
]


@pytest.mark.parametrize(("text", "calls", "thinking", "expected"), CUT)
def test_output_cut_at_its_limit_shows_no_markup(
    text: str, calls: Calls, thinking: bool, expected: dict[str, Any]
) -> None:
    target = {"reasoning": "", "content": "", "calls": [], **expected}
    for at in range(len(text)):
        assert summary([text[:at], text[at:]], calls, thinking, cut=True) == target, at


def test_text_is_held_only_while_it_may_be_a_marker() -> None:
    stream = PartStream("marked")
    assert stream.feed("one two <") == [Part("content", "one two")]
    assert stream.feed("b>") == [Part("content", " <b>")]
    assert stream.feed(" <tool_call") == []
    assert stream.feed("s>") == [Part("content", " <tool_calls>")]
