"""Preference records: every layout, what becomes of it in tokens, and what is left out, aloud."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khaosz.data.records.preference import (
    IDENTICAL,
    EncodedPair,
    Pair,
    encode_pair,
    load_pairs,
    load_prompts,
    prompt_key,
    to_pair,
    to_pairs,
    to_prompt,
)
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.data.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from khaosz.errors import DataError

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHARED = Path(os.environ.get("KHAOSZ_SHARED", "../shared")) / "data" / "preference"
ROOMY = 10_000  # a window that cuts nothing


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def says(source: str, value: str) -> dict[str, str]:
    return {"from": source, "value": value}


USER, GOOD, BAD = turn("user", "天空为什么是蓝色的？"), "因为瑞利散射。", "不知道。"
PAIR = Pair([USER], GOOD, BAD)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "hello world\n\n你好，世界。天空为什么是蓝色的？因为瑞利散射。\n"
    return train_tokenizer([text] * 20, 400)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.serialized, {**tokenizer.config, "chat_template": template})


def write(path: Path, records: list[Any]) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"prompt": USER["content"], "chosen": GOOD, "rejected": BAD}, id="ours-text"),
        pytest.param({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, id="ours-messages"),
        pytest.param(
            {
                "conversations": [says("human", USER["content"])],
                "chosen": says("gpt", GOOD),
                "rejected": says("gpt", BAD),
                "tools": "[]",
            },
            id="sharegpt",
        ),
        pytest.param(
            {
                "instruction": USER["content"],
                "input": "",
                "chosen": GOOD,
                "rejected": BAD,
                "system": "",
                "history": [],
            },
            id="alpaca",
        ),
        pytest.param(
            {
                "prompt": [USER],
                "chosen": [turn("assistant", GOOD)],
                "rejected": [turn("assistant", BAD)],
            },
            id="trl-conversational",
        ),
        pytest.param(
            {
                "chosen": [USER, turn("assistant", GOOD)],
                "rejected": [USER, turn("assistant", BAD)],
            },
            id="trl-implicit-prompt",
        ),
        pytest.param(
            {
                "prompt": USER["content"],
                "chosen": [USER, turn("assistant", GOOD)],
                "rejected": [USER, turn("assistant", BAD)],
            },
            id="prompt-given-twice",
        ),
        pytest.param(
            {"prompt": [USER], "answers": [BAD, GOOD], "ranking": [1, 0]}, id="ours-ranked"
        ),
        pytest.param(
            {
                "prompt": [USER],
                "chosen": GOOD,
                "rejected": BAD,
                "conversations": None,
                "margin": None,
            },
            id="nulls-are-left-out",
        ),
    ],
)
def test_every_layout_gives_the_same_pair(record: dict[str, Any]) -> None:
    before = json.dumps(record)
    (pair,) = to_pairs(record)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], GOOD, BAD)
    assert (pair.group is not None) == ("ranking" in record)
    if "ranking" not in record:
        assert to_pair(record) == pair == PAIR
    assert json.dumps(record) == before  # the caller's record stays as it was


def test_history_and_system_are_part_of_the_prompt() -> None:
    prompt = [turn("system", "简短"), turn("user", "q"), turn("assistant", "a"), USER]
    answers = {"chosen": GOOD, "rejected": BAD}
    conversations = [
        says("human", "q"),
        says("gpt", "a"),
        says("human", USER["content"]),
    ]
    for record in (
        {"conversations": conversations, "system": "简短", **answers},
        {"conversations": [says("system", "简短"), *conversations], **answers},
        {"conversations": [says("system", "简短"), *conversations], "system": "no", **answers},
        {"instruction": USER["content"], "system": "简短", "history": [["q", "a"]], **answers},
        {"prompt": prompt, **answers},
        {"prompt": prompt[1:], "system": "简短", **answers},
        {key: [*prompt, turn("assistant", text)] for key, text in answers.items()},
        {
            "prompt": USER["content"],
            **{key: [*prompt, turn("assistant", text)] for key, text in answers.items()},
        },
    ):
        assert to_pair(record) == Pair(prompt, GOOD, BAD), record
    assert to_pair({"instruction": "翻译", "input": "hello", **answers}).prompt == [
        turn("user", "翻译\nhello")
    ]


def test_the_longest_shared_beginning_is_the_prompt() -> None:
    shared = [USER, turn("assistant", "a"), turn("user", "q")]
    record = {key: [*shared, turn("assistant", key)] for key in ("chosen", "rejected")}
    assert to_pair(record) == Pair(shared, "chosen", "rejected")
    # The same whole conversations: the prompt is all but the answer, and the pair says nothing.
    record["rejected"] = record["chosen"]
    assert to_pair(record) == Pair(shared, "chosen", "chosen")
    # They differ from the second turn on, so no single answer can be compared.
    record["rejected"] = [USER, turn("assistant", "b"), turn("user", "q"), turn("assistant", "c")]
    with pytest.raises(DataError, match="not one assistant turn"):
        to_pair(record)


def test_tool_results_in_the_prompt() -> None:
    prompt = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        turn("tool", "1"),
    ]
    assert to_pair({"prompt": prompt, "chosen": GOOD, "rejected": BAD}) == Pair(prompt, GOOD, BAD)


@pytest.mark.parametrize("margin", [0, 2, 0.5, -1.5])
def test_a_margin_is_kept(margin: float) -> None:
    pair = to_pair({"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin})
    assert pair.margin == margin and isinstance(pair.margin, float)


ANSWERS = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "record is a list"),
        ({}, "nearest is chosen and rejected, without chosen and rejected"),
        ({"prompt": "q", "chosen": "a"}, "keys prompt, chosen; nearest is .*, without rejected"),
        ({"text": "q", **ANSWERS}, "does not end with a user"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen is neither text nor messages"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, "rejected is neither"),
        ({"prompt": 3, **ANSWERS}, "prompt is neither"),
        ({"prompt": "", **ANSWERS}, "empty prompt"),
        ({"prompt": " \n", **ANSWERS}, "empty prompt"),
        ({"prompt": [], **ANSWERS}, "does not end with a user"),
        ({"prompt": [turn("system", "s")], **ANSWERS}, "does not end with a user"),
        ({"prompt": [USER, turn("assistant", "x")], **ANSWERS}, "does not end with a user"),
        ({"prompt": [turn("narrator", "x")], **ANSWERS}, "unknown role 'narrator'"),
        ({"prompt": [{"role": "user", "content": 5}], **ANSWERS}, "content is int"),
        ({"instruction": " ", "input": "", **ANSWERS}, "empty instruction"),
        ({"prompt": "q", "chosen": says("human", "a"), "rejected": "b"}, "do not begin with"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen is not one assistant turn"),
        (
            {"prompt": "q", "chosen": [turn("assistant", "a"), USER], "rejected": "b"},
            "chosen is not one assistant turn",
        ),
        (
            {
                "prompt": "another",
                "chosen": [USER, turn("assistant", "a")],
                "rejected": [USER, turn("assistant", "b")],
            },
            "do not begin with the prompt",
        ),
        (
            {
                "prompt": "q",
                "chosen": {"role": "assistant", "content": "", "tool_calls": [CALL]},
                "rejected": "b",
            },
            "calls a tool",
        ),
        ({"prompt": "q", **ANSWERS, "tools": '[{"name": "f"}]'}, "tools are not read"),
        ({"prompt": "q", **ANSWERS, "margin": "1"}, "margin"),
        ({"prompt": "q", **ANSWERS, "margin": True}, "margin"),
        ({"prompt": "q", **ANSWERS, "margin": float("nan")}, "margin"),
        ({"prompt": "q", **ANSWERS, "margin": 10**400}, "margin"),
        ({"prompt": "q", "ranking": [0]}, "nearest is a ranking, without answers"),
        ({"prompt": "q", "answers": 3, "ranking": [0]}, "answers or ranking is not a list"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": "a>b"}, "answers or ranking"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": [0]}, "name every answer once"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": [0, 0]}, "name every answer once"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": [0, 2]}, "name every answer once"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": [0, True]}, "name every answer once"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": [0, "1"]}, "name every answer once"),
        ({"prompt": "q", "answers": ["a", "b"], "ranking": [0, [[1]]]}, "name every answer once"),
        ({"prompt": "q", "answers": ["a", 3], "ranking": [0, 1]}, "an answer is neither"),
    ],
)
def test_refusals(record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_pairs(record)


def test_a_ranking_gives_all_pairs_of_unequal_answers() -> None:
    record = {"prompt": "q", "answers": ["a", "b", "c", "d"], "ranking": [2, [0, 3], 1]}
    pairs = to_pairs(record)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        *(("c", "a"), ("c", "d"), ("c", "b")),
        *(("a", "b"), ("d", "b")),
    }
    assert len(pairs) == 5
    assert len({pair.group for pair in pairs}) == 1
    other = to_pairs({**record, "prompt": "another"})
    assert other[0].group != pairs[0].group
    assert to_pairs({**record, "ranking": [[0, 1, 2, 3]]}) == []


@settings(QUICK)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_rankings_against_their_definition(places: list[int]) -> None:
    """`places[i]` is the place of answer i, 0 the best."""
    levels = [[i for i, at in enumerate(places) if at == place] for place in sorted(set(places))]
    record = {
        "prompt": "q",
        "answers": [f"answer {i}" for i in range(len(places))],
        "ranking": [level[0] if len(level) == 1 else level for level in levels],
    }
    expected = set()
    for i, j in combinations(range(len(places)), 2):
        if places[i] != places[j]:
            better, worse = (i, j) if places[i] < places[j] else (j, i)
            expected.add((f"answer {better}", f"answer {worse}"))
    pairs = to_pairs(record)
    assert len(pairs) == len(expected)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == expected


ODD = [None, True, 3, "x", "", "{", [], {}, [[]], ["x"], [None], [0, 1], {"name": "f"}]
JSON = st.sampled_from([*ODD, [["q", None]], [CALL]])
KEYS = ["prompt", "messages", "conversations", "instruction", "input", "history", "system", "tools"]
KEYS += ["chosen", "rejected", "answers", "ranking", "margin"]
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "x"]) | JSON,
        "content": st.text(max_size=3) | JSON,
        "from": st.sampled_from(["gpt", "human", "function_call"]) | JSON,
        "value": st.text(max_size=3) | JSON,
    },
)
RECORD = st.dictionaries(
    st.sampled_from(KEYS), st.lists(TURN, max_size=3) | TURN | st.text(max_size=3) | JSON
)


@settings(QUICK, max_examples=300)
@given(RECORD)
def test_any_json_gives_pairs_or_a_reason(record: dict[str, Any]) -> None:
    for read in (to_pairs, lambda given: [to_prompt(given)]):
        try:
            found = read(record)
        except DataError as error:
            assert str(error)
            continue
        for one in found:
            assert one.prompt[-1]["role"] in ("user", "tool")
            assert len(prompt_key(one.prompt)) == 32
            if isinstance(one, Pair):
                assert isinstance(one.chosen, str) and isinstance(one.rejected, str)


def test_prompts_of_every_layout() -> None:
    chat = [USER, turn("assistant", GOOD)]
    for record in (
        {"prompt": USER["content"]},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": chat},
        {"messages": [*chat, turn("assistant", "again")]},
        {"conversations": [says("human", USER["content"]), says("gpt", GOOD)]},
        {"instruction": USER["content"], "input": ""},
        {"instruction": USER["content"], "history": []},
    ):
        prompt = to_prompt({**record, "answer": "42", "source": None})
        assert prompt.prompt == [USER], record
        assert prompt.extra == {"answer": "42"}, record
    both = to_prompt({"prompt": "q", "messages": chat, "system": "S", "output": "o"})
    assert both.prompt == [turn("system", "S"), turn("user", "q")]
    assert both.extra == {"messages": chat, "output": "o"}
    for record, reason in (
        ({"text": "x"}, "keys text; nearest is a prompt, without prompt or"),
        ({"messages": [turn("assistant", "x")]}, "does not end with a user"),
        ({"prompt": "q", "tools": [{"name": "f"}]}, "tools are not read"),
    ):
        with pytest.raises(DataError, match=reason):
            to_prompt(record)


def test_the_key_of_a_prompt() -> None:
    assert prompt_key([USER]) == prompt_key([turn("user", f" {USER['content']}\n")])
    different = [[USER], [turn("user", "q")], [turn("tool", "q")], [turn("system", "q"), USER]]
    assert len({prompt_key(prompt) for prompt in different}) == len(different)


def whole(tokenizer: Tokenizer, prompt: list[Any], text: str) -> list[int]:
    return encode_chat(tokenizer, [*prompt, turn("assistant", text)])[0]


CONTENT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "{{ 1 }}", "\n", "你好，世界。"]),
    ),
    min_size=1,
    max_size=4,
).map("".join)


@settings(QUICK, max_examples=150)
@given(CONTENT, CONTENT, CONTENT)
def test_prompt_and_answer_are_the_whole_chat(
    tokenizer: Tokenizer, question: str, chosen: str, rejected: str
) -> None:
    pair = Pair([turn("system", "简短"), turn("user", question)], chosen, rejected)
    if chosen == rejected or not chosen.strip() or not rejected.strip():
        with pytest.raises(DataError, match=rf"^{IDENTICAL}$|empty answer"):
            encode_pair(tokenizer, pair, ROOMY)
        return
    encoded = encode_pair(tokenizer, pair, ROOMY)
    prompt = encoded.prompt_ids.tolist()
    assert encoded.truncated == 0
    assert prompt[-1] == tokenizer.special_ids["<|assistant|>"]
    for ids, text in ((encoded.chosen_ids, chosen), (encoded.rejected_ids, rejected)):
        assert ids.dtype == encoded.prompt_ids.dtype == "int32"
        assert prompt + ids.tolist() == whole(tokenizer, pair.prompt, text)
        assert ids[-1] == tokenizer.end_id
        # What the text says is text: the only control token is the one that ends the turn.
        assert [i for i in ids.tolist() if tokenizer.is_special(i)] == [tokenizer.end_id]
        assert tokenizer.decode(ids[:-1]) == text
    # bos, <|system|>, its end, <|user|>, its end, <|assistant|>
    assert sum(tokenizer.is_special(i) for i in prompt) == 6


def test_answers_are_cut_to_the_window(tokenizer: Tokenizer) -> None:
    pair = Pair([USER], "hello world " * 8, "世界", margin=2.0, group="g")
    full = encode_pair(tokenizer, pair, ROOMY)
    p, c, r = len(full.prompt_ids), len(full.chosen_ids), len(full.rejected_ids)
    assert c > r > 1
    for window, cut in ((p + c, 0), (p + c - 1, 1), (p + r, 1), (p + r - 1, 2), (p + 1, 2)):
        encoded = encode_pair(tokenizer, pair, window)
        assert encoded.truncated == cut, window
        assert (encoded.margin, encoded.group) == (2.0, "g")
        assert encoded.prompt_ids.tolist() == full.prompt_ids.tolist()
        for ids, uncut in (
            (encoded.chosen_ids, full.chosen_ids),
            (encoded.rejected_ids, full.rejected_ids),
        ):
            assert ids.tolist() == uncut[: window - p].tolist()
            assert (ids[-1] == tokenizer.end_id) == (len(uncut) <= window - p)
    with pytest.raises(DataError, match=f"no room for an answer in the window of {p} tokens"):
        encode_pair(tokenizer, pair, p)


def test_rejects_answers_that_differ_only_after_the_window(tokenizer: Tokenizer) -> None:
    pair = Pair([USER], "hello world hello", "hello world 世界")
    full = encode_pair(tokenizer, pair, ROOMY)
    with pytest.raises(DataError, match="the same within the window"):
        encode_pair(tokenizer, pair, len(full.prompt_ids) + 1)


LINES = (  # a template that writes line ends behind its marks, as ChatML does
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_the_answer_ends_where_generation_ends(tokenizer: Tokenizer) -> None:
    # Behind the first token that stops generation the template may write what it likes.
    for tail in ("\n", "<|eos|>\n"):
        other = with_template(tokenizer, LINES.replace("<|end|>\n", f"<|end|>{tail}"))
        encoded = encode_pair(other, PAIR, ROOMY)
        assert other.decode(encoded.prompt_ids).endswith(f"<|end|>{tail}<|assistant|>\n")
        assert other.decode(encoded.chosen_ids) == GOOD + "<|end|>"
        ids = encoded.prompt_ids.tolist() + encoded.chosen_ids.tolist()
        assert ids == whole(other, [USER], GOOD)[: len(ids)]


def test_rejects_templates_that_do_not_fit_pairs(tokenizer: Tokenizer) -> None:
    # "\n" of the template and "\n" of the answer are one token, which the prompt does not have.
    with pytest.raises(DataError, match="does not begin with the tokens of its prompt"):
        encode_pair(with_template(tokenizer, LINES), Pair([USER], "\n好", "不"), ROOMY)
    length = "{{ messages | length }}" + LINES
    with pytest.raises(DataError, match="does not begin with the tokens of its prompt"):
        encode_pair(with_template(tokenizer, length), PAIR, ROOMY)
    endless = LINES.replace("<|end|>", "")
    with pytest.raises(DataError, match="does not end an answer with a control token"):
        encode_pair(with_template(tokenizer, endless), PAIR, ROOMY)
    with pytest.raises(DataError, match="no chat template"):
        encode_pair(Tokenizer(tokenizer.serialized, {"eos_token": "<|eos|>"}), PAIR, ROOMY)


def test_report_counts_skipped_records(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "问题一", "chosen": GOOD, "rejected": BAD},
            {"prompt": "q", "chosen": "the same", "rejected": "the same"},
            "",
            {"prompt": "q", "chosen": "", "rejected": BAD},
            {"prompt": "q" * 200, "chosen": GOOD, "rejected": BAD},
            "{torn",
            {"prompt": "q", "chosen": "a", "rejected": "a " * 200},
            {"prompt": "q", "chosen": "b " * 200, "rejected": "a " * 200},
            {"prompt": "q", "answers": ["a", "b", "a", " "], "ranking": [0, 1, [2, 3]]},
            {"prompt": "q", "answers": ["a", "b"], "ranking": [[0, 1]]},
            json.dumps({"prompt": "\ud800", "chosen": "a", "rejected": "b"}),
            {"prompt": "q", "chosen": "the same", "rejected": "the same"},
            {"prompt": "q", **ANSWERS, "tools": 3},
        ],
    )
    data = load_pairs(path, tokenizer, 60, allow_unread=True)
    report = data.report
    (entry,) = report.inputs
    assert {reason: found["lines"] for reason, found in entry.skipped.items()} == {
        IDENTICAL: [2, 9, 12],
        "empty answer": [4, 9, 9],
        "the prompt leaves no room for an answer in the window of 60 tokens": [5],
        "not valid JSON: Expecting property name enclosed in double quotes": [6],
        "all answers are ranked equal": [10],
        next(reason for reason in entry.skipped if "surrogate" in reason): [11],
        "tools is not a list": [13],
    }
    # Of the ranking: a over b and b over a, each once; a over a and the blank ones are left out.
    chosen = [tokenizer.decode(pair.chosen_ids[:-1]) for pair in data.train]
    assert chosen[:2] + chosen[3:] == [GOOD, "a", "a", "b"]
    assert chosen[2].startswith("b b b ")
    assert (report.read, report.kept, report.validation) == (12, 5, 0)
    assert report.truncated == 2  # of the second, both answers were cut
    assert data.train[3].group == data.train[4].group is not None
    for name in ("prompt", "chosen", "rejected"):
        lengths = sorted(len(getattr(pair, f"{name}_ids")) for pair in data.train)
        assert report.lengths[name]["mean"] == sum(lengths) / 5
        assert report.lengths[name]["p50"] == lengths[2]
        assert report.lengths[name]["max"] == lengths[4]
    lines = report.lines()
    assert lines[0] == f"{path}: 12 records, 5 kept, 3 not read"
    assert f"  skipped 3: {IDENTICAL} (pairs.jsonl:2, pairs.jsonl:9, pairs.jsonl:12)" in lines
    assert "5 kept, 0 of them for validation, 2 cut to the window of 60" in lines
    assert lines[-2].startswith("chosen tokens: mean ") and ", p95 " in lines[-2]


def test_every_kind_of_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"prompt": f"问题 {i}", "chosen": GOOD, "rejected": BAD} for i in range(3)]
    plain = write(tmp_path / "a.jsonl", records).read_bytes()
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(plain))
    (tmp_path / "c.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xff\n" + plain.decode().encode("gb18030"))
    data = load_pairs(tmp_path, tokenizer, ROOMY, allow_unread=True)
    last = data.report.inputs[-1]
    assert (last.records, last.skipped["not valid GB18030"]["lines"]) == (4, [1])
    assert [entry.kept for entry in data.report.inputs] == [3, 3, 3, 3]
    expected = [tokenizer.encode(f"问题 {i}") for i in range(3)] * 4
    assert [pair.prompt_ids[2:-2].tolist() for pair in data.train] == expected
    assert len(load_pairs([tmp_path / "a.jsonl", tmp_path / "c.json"], tokenizer, 99).train) == 6


def test_parquet(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"prompt": [USER], "chosen": GOOD, "rejected": BAD, "margin": 1.0, "system": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "e.parquet")
    (pair,) = load_pairs(tmp_path / "e.parquet", tokenizer, ROOMY).train
    assert tokenizer.decode(pair.chosen_ids) == GOOD + "<|end|>" and pair.margin == 1.0


def prompts_of(tokenizer: Tokenizer, pairs: list[EncodedPair]) -> list[str]:
    return [tokenizer.decode(pair.prompt_ids[2:-2]) for pair in pairs]


def test_no_prompt_is_in_both_splits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [
        {"prompt": f"问 {i % 100}" + " " * (i // 200), "chosen": f"a{i}", "rejected": "b"}
        for i in range(400)
    ]
    path = write(tmp_path / "pairs.jsonl", records)
    data = load_pairs(path, tokenizer, ROOMY, val_fraction=0.3)
    assert (data.report.kept, data.report.validation) == (400, len(data.validation))
    train, validation = prompts_of(tokenizer, data.train), prompts_of(tokenizer, data.validation)
    held_out = {text.strip() for text in validation}
    assert not held_out & {text.strip() for text in train}
    assert len(data.validation) == 4 * len(held_out)
    # 100 prompts by their hash: 30 on average, and within 4 standard deviations of 4.6.
    assert 12 <= len(held_out) <= 48
    again = load_pairs(path, tokenizer, ROOMY, val_fraction=0.3)
    assert prompts_of(tokenizer, again.validation) == validation
    other = load_pairs(path, tokenizer, ROOMY, val_fraction=0.3, seed=1)
    assert set(prompts_of(tokenizer, other.validation)) != set(validation)
    none = load_pairs(path, tokenizer, ROOMY)
    assert prompts_of(tokenizer, none.train) == [record["prompt"] for record in records]
    # The same prompts alone are split the same way.
    alone = load_prompts(path, tokenizer, ROOMY, val_fraction=0.3)
    assert {p.prompt[-1]["content"] for p in alone.validation} == set(validation)


def test_loading_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "1 + 1 = <|end|>", "answer": 2},
            {"messages": [USER, turn("assistant", GOOD)]},
            {"prompt": "q" * 100},
            {"text": "no prompt"},
        ],
    )
    data = load_prompts(path, tokenizer, 60, allow_unread=True)
    first, second = data.train
    assert first.extra == {"answer": 2}
    assert first.prompt_ids.dtype == "int32"
    assert first.prompt_ids.tolist() == [
        tokenizer.bos_id,
        tokenizer.special_ids["<|user|>"],
        *tokenizer.encode("1 + 1 = <|end|>"),
        tokenizer.end_id,
        tokenizer.special_ids["<|assistant|>"],
    ]
    ids = encode_chat(tokenizer, [USER], add_generation_prompt=True)[0]
    assert second.prompt_ids.tolist() == ids
    assert (data.report.read, data.report.kept) == (4, 2)
    assert list(data.report.lengths) == ["prompt"]
    assert [found["lines"] for found in data.report.inputs[0].skipped.values()] == [[3], [4]]
    with pytest.raises(DataError, match="no room"):
        load_prompts(write(tmp_path / "p.jsonl", [{"messages": [USER]}]), tokenizer, len(ids))
    assert load_prompts(tmp_path / "p.jsonl", tokenizer, len(ids) + 1).report.kept == 1


def test_error_without_usable_records_has_the_first_reason(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "sft.jsonl", [{"prompt": "q"}, {"prompt": "q"}, "x"])
    with pytest.raises(DataError) as caught:
        load_pairs(path, tokenizer, ROOMY)
    assert str(caught.value) == (
        "nothing to train on in 3 records: 2 records skipped as unknown layout with keys prompt;"
        f" nearest is chosen and rejected, without chosen and rejected, first {path} line 1"
    )
    assert caught.value.hint is not None
    with pytest.raises(DataError, match="does not exist"):
        load_pairs(tmp_path / "none.jsonl", tokenizer, ROOMY)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="val_fraction"):
            load_pairs(path, tokenizer, ROOMY, val_fraction=fraction)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="KHAOSZ_SHARED is not here")
def test_all_540_shared_pairs() -> None:
    records = [r for path in sorted(SHARED.glob("*.json")) for r in json.loads(path.read_bytes())]
    turns = [[*r["conversations"], r["chosen"], r["rejected"]] for r in records]
    tokenizer = train_tokenizer([t["value"] for chat in turns for t in chat], 2000)
    data = load_pairs(SHARED, tokenizer, ROOMY, val_fraction=0.1)
    assert (data.report.read, data.report.kept, data.report.truncated) == (540, 540, 0)
    assert 27 <= len(data.validation) <= 81  # 54 on average, within 4 standard deviations of 7
    pairs = iter(load_pairs(SHARED, tokenizer, ROOMY).train)
    for record in records:
        pair = next(pairs)
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        chat = "".join(
            f"<|{roles[t['from']]}|>{t['value']}<|end|>" for t in record["conversations"]
        )
        assert tokenizer.decode(pair.prompt_ids) == f"<|bos|>{chat}<|assistant|>"
        assert tokenizer.decode(pair.chosen_ids) == record["chosen"]["value"] + "<|end|>"
        assert tokenizer.decode(pair.rejected_ids) == record["rejected"]["value"] + "<|end|>"
    short = load_pairs(SHARED, tokenizer, 512)
    assert all(
        len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= 512 for p in short.train
    )
    assert 0 < short.report.truncated < short.report.kept < 540
