"""Record layouts: spellings, what wins where two fit, what is compared, and named columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from khaosz.config import ColumnsConfig
from khaosz.data.records.chat import to_messages, weighted_mask
from khaosz.data.records.comparisons import Pair, Rated
from khaosz.data.records.layouts import Texts, read_record
from khaosz.data.records.preference import load_pairs, to_pairs, to_prompt
from khaosz.data.records.turns import LeftOut
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.data.tokenizer.tokenizer import Tokenizer, train_tokenizer
from khaosz.errors import ConfigError, DataError

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(
    "chat",
    [
        [HI, HELLO],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        [{"from": "user", "content": "Hi"}, {"role": "Assistant", "value": "Hello."}],
        [{"role": "User", "text": "Hi"}, {"role": "model", "text": "Hello."}],
        [{"speaker": "human", "content": "Hi"}, {"speaker": "bot", "content": "Hello."}],
        [{"user": "Hi", "assistant": "Hello."}],
        [{"input": "Hi", "output": "Hello."}],
        [["Hi", "Hello."]],
        ["Hi", "Hello."],
        json.dumps([HI, HELLO]),
        "\n\nHuman: Hi\n\nAssistant: Hello.",
        "Human: Hi\n\nAssistant: Hello.",
        {"messages": [HI, HELLO]},
        [HI | {"weight": None, "tool_calls": None}, HELLO | {"reasoning_content": None}],
        [HI | {"content": {"string": "Hi", "parts": None}}, HELLO],  # a union of a table
        [HI | {"content": [{"type": "text", "text": "Hi", "image": None}]}, HELLO],
    ],
)
def test_conversations_in_every_spelling_under_every_key(chat: Any) -> None:
    for key in ("messages", "conversations", "conversation", "dialog", "dialogue", "chat"):
        assert to_messages({key: chat}).messages == [HI, HELLO], key
        empty = {other: None for other in ("messages", "text", "output") if other != key}
        assert to_messages({**empty, key: chat}).messages == [HI, HELLO]
    if not isinstance(chat, dict):
        assert to_prompt({"messages": chat}).prompt == [HI]


def test_null_and_empty_columns_beside_a_valid_layout() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for columns in (
        {"messages": None, "instruction": "q", "input": None, "output": "a"},
        {"messages": [], "instruction": "q", "input": "", "output": "a"},
        {"conversations": None, "chosen": None, "question": "q", "answer": "a", "label": None},
        {"conversation": 3, "prompt": "q", "completion": "a", "history": None, "system": None},
    ):
        assert to_messages(columns).messages == chat, columns
    for columns in (
        {"prompt": "q", "messages": None, "answers": None, "chosen": "a", "rejected": "b"},
        {"messages": [], "prompt": "q", "ranking": None, "chosen": "a", "rejected": "b"},
    ):
        assert to_pairs(columns) == [Pair(chat[:1], "a", "b")], columns


def test_messages_in_columns() -> None:
    """As Hugging Face's `Sequence` of objects is written."""
    columns = {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}
    for value in (
        columns,
        {"from": ["human", "gpt"], "value": ["Hi", "Hello."], "weight": [None, 1]},
    ):
        messages = to_messages({"conversations": value}).messages
        assert [m["role"] for m in messages] == ["user", "assistant"], value
        assert [m["content"] for m in messages] == ["Hi", "Hello."], value
    with pytest.raises(DataError, match="role, content are lists of different lengths"):
        to_messages({"messages": {**columns, "content": ["Hi"]}})


def test_fields_of_messages_reach_the_template() -> None:
    tool = {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        tool,
        HELLO | {"reasoning_content": "A greeting."},
    ]
    read = to_messages({"messages": messages}).messages
    # As in transformers, a null is absent.
    assert read == [HI, {"role": "assistant", "tool_calls": [call]}, *messages[2:]]
    legacy = [
        HI,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
        HELLO,
    ]
    read = to_messages({"messages": legacy}).messages
    assert [m["role"] for m in read] == ["user", "assistant", "tool", "assistant"]
    assert read[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world. Hi Hello. BADANSWER good q2 1 + 1?\n"] * 20, 400)


def test_a_turn_of_weight_zero_is_not_trained_on(tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "BADANSWER", "weight": 0},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "good", "weight": 1},
    ]
    chat = to_messages({"messages": turns})
    assert chat.weights == [0, 1] and all("weight" not in turn for turn in chat.messages)
    ids, mask = encode_chat(tokenizer, chat.messages)
    trained = [i for i, on in zip(ids, weighted_mask(mask, chat.weights), strict=True) if on]
    assert tokenizer.decode(trained) == "good<|end|>"
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]).startswith("BAD")
    assert to_messages({"messages": [*turns[:3], {**turns[3], "weight": None}]}).weights == [0, 1]
    assert to_messages({"messages": [*turns[2:]]}).weights is None
    with pytest.raises(LeftOut, match="every assistant turn has weight 0"):
        to_messages({"messages": turns[:2]})
    with pytest.raises(DataError, match=r"weight 0\.5 is neither 0 nor 1"):
        to_messages({"messages": [{**turns[1], "weight": 0.5}]})
    with pytest.raises(DataError, match="weights of 3 turns, but the chat template trains 2"):
        weighted_mask(mask, [0, 1, 1])


def test_what_wins_where_two_layouts_fit() -> None:
    both = {"messages": [HI, HELLO], "prompt": "q", "completion": "a", "question": "q2"}
    assert to_messages(both).messages == [HI, HELLO]
    assert to_messages({**both, "messages": None}).messages[0]["content"] == "q"
    assert to_messages({"question": "q", "answer": "42", "solution": "so 42"}).messages[1] == {
        "role": "assistant",
        "content": "so 42",
    }
    ranked = {"prompt": "q", "answers": ["a", "b"], "ranking": [1, 0], "chosen": "x"}
    assert to_pairs({**ranked, "rejected": "y"})[0].chosen == "b"
    labelled = {"prompt": "q", "chosen": "a", "rejected": "b", "completion": "c", "label": True}
    assert read_record(labelled, ("comparison", "rated")) == to_pairs(labelled)


def test_an_answer_alone_is_compared_within_longer_chats() -> None:
    shared = [HI, HELLO, {"role": "user", "content": "Why?"}]
    answers = {
        key: [*shared, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")
    }
    for record in (
        answers,
        {"prompt": [HI], "chosen": answers["chosen"][1:], "rejected": answers["rejected"][1:]},
        {"prompt": "Why?", **answers},
        {"messages": answers["chosen"], **answers},
        {
            key: "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: " + key
            for key in answers
        },
        {
            "prompt": "Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nWhy?",
            "response_1": "rejected",
            "response_2": "chosen",
            "preference_strength": 3,
        },
    ):
        assert to_pairs(record) == [Pair(shared, "chosen", "rejected")], record
        if "prompt" not in record:
            assert to_prompt(record).prompt == shared
    tied = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0}
    with pytest.raises(LeftOut, match="rated equal"):
        to_pairs(tied)
    with pytest.raises(DataError, match="preference_strength is not a number"):
        to_pairs({**tied, "preference_strength": "much"})


def test_plain_texts_are_cut_at_whole_words() -> None:
    (pair,) = to_pairs({"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert pair == Pair([{"role": "user", "content": "The sky is"}], " blue", " black")
    (pair,) = to_pairs({"chosen": "天空是蓝色", "rejected": "天空是绿色"})
    assert (pair.prompt[0]["content"], pair.chosen) == ("天空是", "蓝色")
    with pytest.raises(DataError, match="no beginning in common"):
        to_pairs({"chosen": "Yes", "rejected": "No"})
    # Another column may be the prompt under a name that is not known: nothing is guessed.
    with pytest.raises(DataError, match="does not end with a user"):
        to_pairs({"ask": "Colour?", "chosen": "It is blue", "rejected": "It is green"})


def write(path: Path, records: list[Any]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def answers_of(tokenizer: Tokenizer, path: Path) -> list[tuple[str, str, str]]:
    return [
        (
            tokenizer.decode(pair.prompt_ids[2:-2]),
            tokenizer.decode(pair.chosen_ids[:-1]),
            tokenizer.decode(pair.rejected_ids[:-1]),
        )
        for pair in load_pairs(path, tokenizer, 500).train
    ]


def test_labels_and_scores_are_compared_within_a_prompt(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    labelled = [
        {"prompt": "Hi", "completion": "a", "label": True},
        {"prompt": "other", "completion": "c", "label": True},
        {"prompt": "Hi", "completion": "b", "label": False},
        {"prompt": [HI], "completion": [{"role": "assistant", "content": "d"}], "label": "false"},
    ]
    path = write(tmp_path / "kto.jsonl", labelled)
    assert answers_of(tokenizer, path) == [("Hi", "a", "b"), ("Hi", "a", "d")]
    report = load_pairs(path, tokenizer, 500).report
    assert report.inputs[0].skipped == {
        "no other answer to its prompt to compare with": {
            "count": 1,
            "lines": [2],
            "left_out": True,
        }
    }
    assert report.inputs[0].unread == 0
    scored = [
        {"prompt": "Hi", "response": text, "helpfulness": score, "verbosity": 9 - score}
        for text, score in (("a", 1), ("b", 4), ("c", 1))
    ]
    path = write(tmp_path / "scored.jsonl", scored)
    assert answers_of(tokenizer, path) == [("Hi", "b", "a"), ("Hi", "b", "c")]
    data = load_pairs(path, tokenizer, 500).train
    assert data[0].group == data[1].group is not None
    # Fine-tuning learns the desirable answers alone.
    assert to_messages(labelled[0]).messages[-1]["content"] == "a"
    with pytest.raises(LeftOut, match="labelled undesirable"):
        to_messages(labelled[2])
    with pytest.raises(DataError, match="label is neither true nor false"):
        read_record({**labelled[0], "label": 3}, ("rated",))
    assert to_messages({**labelled[0], "label": "science"}).messages[-1]["content"] == "a"


def test_mean_ratings_rank_answers() -> None:
    def answer(text: str, overall: float, *ratings: str) -> dict[str, Any]:
        aspects = {f"aspect{i}": {"Rating": rating} for i, rating in enumerate(ratings)}
        return {"response": text, "annotations": aspects, "overall_score": overall}

    answers = [
        answer("a", 10.0, "1", "N/A"),  # an overall score of 10 that should be 1
        answer("b", 7.0, "5", "4"),
        answer("c", 7.0, "1", "1"),
        answer("d", 2.0),
    ]
    pairs = to_pairs({"instruction": "Hi", "completions": answers})
    assert {(p.chosen, p.rejected) for p in pairs} == {
        *(("b", "a"), ("b", "c"), ("b", "d")),
        *(("d", "a"), ("d", "c")),
    }
    with pytest.raises(DataError, match="an answer has no rating"):
        to_pairs({"instruction": "Hi", "completions": [{"response": "a"}]})


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"ask": "Hi", "reply": "Hello."}, {"prompt": "ask", "response": "reply"}),
        ({"ask": "Hi", "output": "Hello."}, {"prompt": "ask"}),
        ({"messages": ["x"], "ask": "Hi", "output": "Hello."}, {"prompt": "ask"}),
        ({"prompt": "no", "question": "Hi", "output": "Hello."}, {"prompt": "question"}),
        ({"output": "no", "prompt": "Hi", "gold": "Hello."}, {"response": "gold"}),
        (
            {"log": [{"who": "customer", "what": "Hi"}, {"who": "agent", "what": "Hello."}]},
            {
                "messages": "log",
                "role": "who",
                "content": "what",
                "roles": {"customer": "user", "agent": "assistant"},
            },
        ),
        (
            {"messages": [{"role": "Kunde", "content": "Hi"}, HELLO]},
            {"roles": {"Kunde": "user"}},
        ),
    ],
)
def test_named_columns_win(record: dict[str, Any], columns: dict[str, Any]) -> None:
    config = ColumnsConfig.parse(columns)
    assert to_messages(record, config).messages == [HI, HELLO]
    # As read back from a checkpoint, with every key set.
    assert to_messages(record, ColumnsConfig.parse(config.model_dump())).messages == [HI, HELLO]
    prompt = to_prompt({**record, "gold_id": 7}, config)
    assert prompt.prompt == [HI] and prompt.extra["gold_id"] == 7


def test_named_columns_of_other_kinds() -> None:
    config = ColumnsConfig.parse({"prompt": "ask", "chosen": "good", "rejected": "bad"})
    record = {"ask": "Hi", "good": "a", "bad": "b"}
    assert to_pairs(record, config) == [Pair([HI], "a", "b")]
    with pytest.raises(
        DataError, match=r"no column ask, which \[columns\] names, with keys prompt, good, bad$"
    ):
        to_pairs({"prompt": "Hi", "good": "a", "bad": "b"}, config)
    text = ColumnsConfig.parse({"text": "body"})
    assert read_record({"body": "x", "text": "y"}, ("text",), text) == "x"
    passages = ColumnsConfig.parse({"query": "q", "positive": "p", "negative": "n"})
    assert read_record({"q": "a", "p": "b", "n": ["c"]}, ("passages",), passages) == Texts(
        "a", ("b",), ("c",)
    )
    labels = ColumnsConfig.parse({"label": "ok"})
    rated = read_record({"prompt": "Hi", "response": "a", "ok": True}, ("rated",), labels)
    assert rated == Rated([HI], "a", 1.0)
    with pytest.raises(ConfigError, match="unknown key 'promt'"):
        ColumnsConfig.parse({"promt": "ask"})
    with pytest.raises(ConfigError, match=r"roles\.bot"):
        ColumnsConfig.parse({"roles": {"bot": "robot"}})


@pytest.mark.parametrize(
    ("record", "kinds", "reason"),
    [
        ({"question": "x", "reply": "y"}, ("chat",), "question, reply; nearest is a prompt and"),
        ({"body": "x"}, ("text",), "keys body; nearest is a text"),
        ({"body": "x"}, ("text", "chat", "comparison", "prompt"), "nearest is a text"),
        ({"messages": [HI, HELLO]}, ("text",), "a conversation .* is not read by this stage"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("chat",), "chosen and rejected, with"),
        ({"human_ref_A": "a", "human_ref_B": "b"}, ("comparison",), "nearest is SHP, without"),
        ({"a\x1b[31m\n" + "b" * 99: 1}, ("chat",), r"keys a\\x1b\[31m\\nb+;"),
        ({f"k{i}": 1 for i in range(99)}, ("chat",), r"k11, \.\.\.; nearest"),
    ],
)
def test_records_that_are_not_read_are_named(
    record: dict[str, Any], kinds: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        read_record(record, kinds)


def test_reasoning_and_tools_are_not_compared_in_silence() -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    with pytest.raises(DataError, match="chosen has reasoning"):
        to_pairs({"prompt": "Hi", "chosen": thought, "rejected": "b"})
    asked = {"messages": [HI], "tools": [{"name": "f"}]}
    with pytest.raises(DataError, match="tools are not read"):
        to_pairs({"input": asked, "preferred_output": "a", "non_preferred_output": "b"})
