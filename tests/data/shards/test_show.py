"""`data show`: boundaries, trained spans and bytes, with and without colour."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from khaosz.data.shards.prepare import prepare
from khaosz.data.shards.show import BOUNDARY, render_tokens, show, token_text
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import DataError

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CHATS = [
    {"instruction": f"问题 {i}", "input": "", "output": f"answer {i} <|end|>"} for i in range(6)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world 你好世界\n"] * 20, 300)


def shown(source: Path, tokenizer: Tokenizer, *, colour: bool = False, **options: Any) -> str:
    out = io.StringIO()
    console = (
        Console(
            file=out, force_terminal=True, color_system="standard", width=80, legacy_windows=False
        )
        if colour
        else Console(file=out, no_color=True, width=80)
    )
    show(source, tokenizer, console=console, **options)
    return out.getvalue()


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_boundaries_and_trained_spans_without_colour(tokenizer: Tokenizer) -> None:
    ids, mask = encode_chat(
        tokenizer, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "23"}]
    )
    text = render_tokens(tokenizer, ids, mask, colour=False)
    assert text.plain == ("<|bos|>▏<|user|>▏1▏<|end|>▏<|assistant|>▏⟦2▏3▏<|end|>⟧")
    assert not text.spans or all(not span.style for span in text.spans)
    middle = render_tokens(tokenizer, ids[:4], [0, 1, 0, 1], colour=False)
    assert middle.plain == "<|bos|>▏⟦<|user|>⟧▏1▏⟦<|end|>⟧"


def test_colour_marks_the_same_tokens(tokenizer: Tokenizer) -> None:
    ids, mask = encode_chat(
        tokenizer, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "23"}]
    )
    text = render_tokens(tokenizer, ids, mask)
    assert BOUNDARY not in text.plain
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    dim = "".join(text.plain[s.start : s.end] for s in text.spans if "dim" in str(s.style))
    assert green == "23<|end|>"
    assert dim == "<|bos|><|user|>1<|end|><|assistant|>"


def test_incomplete_and_control_characters_are_printed_as_bytes(tokenizer: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [token_text(tokenizer, i) for i in tokenizer.encode(text)]

    assert pieces("𠀀") == ["⟨f0⟩", "⟨a0⟩", "⟨80⟩", "⟨80⟩"]
    assert "".join(pieces("\x1b[31m\n")) == "⟨1b⟩[31m↵\n"
    assert token_text(tokenizer, tokenizer.end_id) == "<|end|>"


@settings(QUICK, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_no_terminal_control_gets_through(tokenizer: Tokenizer, text: str) -> None:
    plain = render_tokens(tokenizer, tokenizer.encode(text), colour=False).plain
    assert not any(ord(c) < 32 and c not in "\n\t" for c in plain)
    assert not any(0x7F <= ord(c) <= 0x9F or 0xD800 <= ord(c) <= 0xDFFF for c in plain)


def test_long_documents_are_cut(tokenizer: Tokenizer) -> None:
    text = render_tokens(tokenizer, [20] * 50, colour=False, max_tokens=10)
    assert text.plain.endswith("… 40 more tokens")
    with pytest.raises(DataError, match="2 entries for 3 tokens"):
        render_tokens(tokenizer, [20, 20, 20], [1, 1])


@pytest.mark.parametrize("colour", [False, True])
def test_raw_chat_and_text_files(tokenizer: Tokenizer, tmp_path: Path, colour: bool) -> None:
    chats = write_lines(tmp_path / "chats.jsonl", CHATS)
    out = shown(chats, tokenizer, colour=colour, n=2)
    assert out.count("<|assistant|>") == 2
    assert ("⟦" in out) is not colour
    assert ("\x1b[" in out) is colour
    assert shown(chats, tokenizer, n=2, seed=3) == shown(chats, tokenizer, n=2, seed=3)
    assert len({shown(chats, tokenizer, n=1, seed=s) for s in range(12)}) > 1
    assert shown(chats, tokenizer, n=99).count("<|assistant|>") == len(CHATS)
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "[bold]x[/bold] 你好"}])
    out = shown(texts, tokenizer)
    assert out.replace(BOUNDARY, "").count("[bold]x[/bold] 你好") == 1  # no markup is parsed
    assert "<|bos|>" in out
    plain = tmp_path / "book.txt"
    plain.write_text("hello world\n", encoding="utf-8")
    assert "hello" in shown(plain, tokenizer).replace(BOUNDARY, "")


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_prepared_directories(tokenizer: Tokenizer, tmp_path: Path, stage: str) -> None:
    records = CHATS if stage == "sft" else [{"text": f"你好 {i}"} for i in range(6)]
    sources = [  # two inputs make two groups of shards
        write_lines(tmp_path / "first.jsonl", records[:2]),
        write_lines(tmp_path / "second.jsonl", records[2:]),
    ]
    prepare(sources, tokenizer, tmp_path / "out", workers=0)
    out = shown(tmp_path / "out", tokenizer, n=6)
    # Each document once, whatever shard it lies in.
    assert out.count("<|bos|>") == 6
    flat = out.replace(BOUNDARY, "").replace("⟦", "").replace("⟧", "")
    for i in range(6):
        assert (f"answer {i} <|end|>" if stage == "sft" else f"你好 {i}<|eos|>") in flat
    assert ("⟦" in out) is (stage == "sft")
    other = train_tokenizer(["something else entirely"] * 9, 290)
    with pytest.raises(DataError, match="prepared with another tokenizer") as info:
        shown(tmp_path / "out", other)
    assert "tokenizer" in str(info.value.hint)


def test_user_mistakes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        shown(tmp_path / "nowhere", tokenizer)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="no records"):
        shown(empty, tokenizer)
    bad = write_lines(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(DataError, match=r"bad\.jsonl, record 1: no assistant turn"):
        shown(bad, tokenizer)
    with pytest.raises(DataError, match="cannot show 0"):
        shown(bad, tokenizer, n=0)
