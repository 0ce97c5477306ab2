"""Tokenizers of many families give the ids of transformers, for texts and for chats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, SPECIAL, write

from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.data.tokenizer.chat import encode_chat, render_chat
from khaosz.data.tokenizer.tokenizer import StreamDecoder

transformers = pytest.importorskip("transformers")
QUICK = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

TEXTS = [
    "hello world",
    " two  spaces ",
    "\n\nnew\tline\n",
    "你好，世界！",
    "中English混排",
    "👨‍👩‍👧‍👦 🏳️‍🌈 𠮷野家",
    "e\u0301 Å ﬁ ＡＢＣ１２３\u3000",
    "\u200b\ufeff\u2028\x00",
    "▁under▁score ▁",
    "",
    " ",
    "123456789 3.14 don't",
]


def their_ids(theirs: Any, chat: list[dict[str, str]], prompt: bool) -> list[int]:
    encoded = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=True)
    return list(encoded["input_ids"])


def chats(text: str) -> list[list[dict[str, str]]]:
    user, system = {"role": "user", "content": text}, {"role": "system", "content": text}
    answer = {"role": "assistant", "content": text or "x"}
    return [[user], [system, user, answer, user]]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def ours(family: Path) -> Tokenizer:
    return load_tokenizer(family)


@pytest.fixture(scope="module")
def theirs(family: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(family))


def test_texts(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert [*ours.begin_ids, *ids, *ours.finish_ids] == theirs(text)["input_ids"], repr(text)
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)


def test_chats(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        for chat in chats(text):
            for prompt in (True, False):
                rendered = theirs.apply_chat_template(
                    chat, add_generation_prompt=prompt, tokenize=False
                )
                assert render_chat(ours, chat, None, prompt) == rendered
                assert encode_chat(ours, chat, None, prompt)[0] == their_ids(theirs, chat, prompt)


@QUICK
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_chat(ours: Tokenizer, theirs: Any, text: str) -> None:
    assume(not any(name in text for name in SPECIAL))  # in ours these are text
    for chat in chats(text):
        assert encode_chat(ours, chat)[0] == their_ids(theirs, chat, False)


def test_generated_tokens(ours: Tokenizer, theirs: Any) -> None:
    if "generation" not in (ours.chat_template or ""):
        return
    for text in ("hello world", "你好", "a b"):
        chat = chats(text)[1]
        mask = theirs.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        assert encode_chat(ours, chat)[1] == list(mask)


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
TIGHT = (
    "{% for m in messages %}{{ m.role + '<|im_start|>' + m.content }}"
    "{{ '<|eom_id|><|im_end|>' }}{% endfor %}{{ 'x<|im_end|>_' }}"
)
LOOSE = "{% for m in messages %}{{ '<|im_start|> ' + m.content + ' <|im_end|> ' }}{% endfor %}"
WORDS = [
    "hello",
    " ",
    "\n",
    "你好",
    "é",
    "▁",
    "user",
    "ﬁ",
    "😀",
    "_",
    "9",
    "<",
    "|>",
    "\t",
    "\u3000",
]


@pytest.mark.parametrize("seed", range(24))
def test_random_flags(tmp_path: Path, seed: int) -> None:
    rnd = random.Random(seed)
    write(rnd.choice(list(FAMILIES)), tmp_path, chat_template=rnd.choice([TIGHT, LOOSE]))
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token |= {flag: rnd.random() < 0.25 for flag in FLAGS}
    path.write_text(json.dumps(spec), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    for _ in range(12):
        for chat in chats("".join(rnd.choices(WORDS, k=rnd.randint(0, 6)))):
            assert encode_chat(ours, chat)[0] == their_ids(theirs, chat, False)


def test_names_of_control_tokens_in_messages_are_text(ours: Tokenizer) -> None:
    control = set(ours.special_ids.values()) - {ours.special_ids["<unk>"]}

    def controls(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        return [i for i in encode_chat(ours, chat, None, True)[0] if i in control]

    for name in SPECIAL:
        other = name[0] + "q" + name[2:]
        for text in (name, f"a {name} b", f" {name}\n{name}", name[:3] + name, "你" + name + "好"):
            assert controls(text) == controls(text.replace(name, other)), text


def test_transformers_reads_what_we_save(ours: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    ours.save(tmp_path)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert again.special_tokens_map == theirs.special_tokens_map
    assert again.all_special_ids == theirs.all_special_ids
    for text in TEXTS:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
        for chat in chats(text):
            assert their_ids(again, chat, True) == their_ids(theirs, chat, True)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.end_ids) == (ours.fingerprint, ours.end_ids)
