"""SFT records: the layouts in use, and why a record is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khaosz.data.records.chat import cut_at_turn, to_messages
from khaosz.data.records.turns import text_of
from khaosz.errors import DataError

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_openai_messages() -> None:
    record = {
        "messages": [
            turn("developer", "S"),
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            turn("tool", "1"),
            turn("assistant", "好"),
            turn("user", "never answered"),
        ],
        "tools": [{"name": "f"}],
    }
    chat = to_messages(record)
    assert chat.messages == [
        turn("system", "S"),
        turn("user", "ab"),
        {"role": "assistant", "tool_calls": [CALL | {"id": "1"}]},
        turn("tool", "1"),
        turn("assistant", "好"),
    ]
    assert chat.tools == [{"name": "f"}]


def test_alpaca() -> None:
    record = {"instruction": "翻译", "input": "hello", "output": "你好"}
    assert to_messages(record).messages == [turn("user", "翻译\nhello"), turn("assistant", "你好")]
    record |= {"input": "", "system": "S", "history": [["q", "a"]]}
    assert to_messages(record).messages == [
        turn("system", "S"),
        turn("user", "q"),
        turn("assistant", "a"),
        turn("user", "翻译"),
        turn("assistant", "你好"),
    ]
    assert to_messages({"instruction": "i", "output": "o"}).tools == []


@pytest.mark.parametrize("as_list", [False, True])
def test_sharegpt(as_list: bool) -> None:
    call: Any = {"name": "f", "arguments": {"x": 1}}
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps([call] if as_list else call)},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "system": "S",
        "tools": '[{"name": "f"}]',
    }
    chat = to_messages(record)
    assert chat.messages == [
        turn("system", "S"),
        turn("user", "q"),
        {"role": "assistant", "tool_calls": [CALL]},
        turn("tool", "1"),
        turn("assistant", "a"),
    ]
    assert chat.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "a text .*, with keys text, is not read by this stage"),
        ({}, "unknown layout"),
        ([], "record is a list"),
        ({"messages": "x"}, "is text, not messages"),
        ({"messages": [3]}, "not a list of messages"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [turn("user", "x")]}, "no assistant turn"),
        ({"messages": [turn("assistant", " \n")]}, "empty assistant turn"),
        ({"messages": [turn("narrator", "x"), turn("assistant", "y")]}, "unknown role 'narrator'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is int"),
        ({"messages": [{"role": "user"}]}, "content is NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "'str' is not text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "in a user turn"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "without a name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments are not JSON",
        ),
        ({"messages": [turn("assistant", "x")], "tools": "{"}, "tools is not JSON"),
        ({"messages": [turn("assistant", "x")], "tools": 3}, "tools is not a list"),
        ({"messages": [turn("assistant", "x")], "tools": ["f"]}, "JSON schemas"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "content is NoneType"),
        ({"conversations": [{"from": "function_call", "value": "x("}]}, "not JSON"),
        ({"conversations": [{"from": "function_call", "value": ""}]}, "empty assistant"),
        ({"conversations": [{"from": "function_call", "value": "[[]]"}]}, "without a name"),
        ({"instruction": "", "input": " ", "output": "x"}, "empty instruction"),
        ({"instruction": "x", "output": ""}, "empty assistant turn"),
        (
            {"instruction": "x", "output": None},
            "keys instruction; nearest is a prompt and its answer",
        ),
        ({"instruction": 3, "output": "x"}, "instruction is neither text nor messages"),
        ({"instruction": "x", "output": "y", "history": [["q"]]}, "history"),
        ({"instruction": "x", "output": "y", "history": "q"}, "history"),
    ],
)
def test_refusals(record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_messages(record)


ODD = [
    None,
    True,
    3,
    "x",
    "",
    "{",
    "[1]",
    '{"name": 1}',
    [],
    {},
    [[]],
    ["x"],
    [None],
    {"name": "f"},
]
JSON = st.sampled_from([*ODD, [{"name": "f", "arguments": "3"}], {"function": 1}, [["q", None]]])
KEYS = ["messages", "conversations", "instruction", "input", "output", "system", "history", "tools"]
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "x"]) | JSON,
        "content": st.text(max_size=3) | JSON,
        "from": st.sampled_from(["gpt", "human", "function_call"]) | JSON,
        "value": st.text(max_size=3) | JSON,
        "tool_calls": JSON,
    },
)


@settings(QUICK)
@given(st.dictionaries(st.sampled_from(KEYS), st.lists(TURN, max_size=3) | JSON, max_size=4))
def test_any_json_gives_a_chat_or_a_reason(record: dict[str, Any]) -> None:
    try:
        chat = to_messages(record)
    except DataError as error:
        assert str(error)
        return
    assert chat.messages[-1]["role"] == "assistant"
    for message in chat.messages:
        assert isinstance(message.get("content", ""), str)
        assert "content" in message or message["tool_calls"]


def test_text_of_joins_parts_without_a_separator() -> None:
    assert text_of([{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]) == "你好"


def test_cut_at_turn() -> None:
    mask = np.array([0, 0, 1, 1, 0, 0, 1, 0, 1, 1], dtype=np.uint8)
    assert [cut_at_turn(mask, limit) for limit in range(12)] == [
        *[0, 0, 0, 0],
        *[4, 4, 4],
        *[7, 7, 7],
        *[10, 10],
    ]
    assert cut_at_turn(np.zeros(4, dtype=np.uint8), 4) == 0
    assert cut_at_turn(np.zeros(0, dtype=np.uint8), 4) == 0


@settings(QUICK)
@given(st.lists(st.integers(0, 1), max_size=30), st.integers(0, 35))
def test_cut_at_turn_against_its_definition(bits: list[int], limit: int) -> None:
    ends = [n for n in range(1, len(bits) + 1) if bits[n - 1] and (n == len(bits) or not bits[n])]
    expected = max((n for n in ends if n <= limit), default=0)
    assert cut_at_turn(np.array(bits, dtype=np.uint8), limit) == expected
