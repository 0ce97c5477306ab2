"""transformers reads our directory and agrees to the id, whatever model family it lies in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khaosz.data.tokenizer.chat import encode_chat, render_chat
from khaosz.data.tokenizer.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

transformers = pytest.importorskip("transformers")

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
NASTY = [
    "",
    " leading and trailing  ",
    "\x00\x1b[31m\x7f\r\n\r\n\t x",
    "👨‍👩‍👧‍👦🏳️‍🌈 𠀀𠮷𪚥 “全角”，ＡＢＣ１２３——《书》",
    "e\u0301 \u212b \uf900 \u1100\u1161",  # an NFC normaliser would change each of these
    "I'm, you'RE; don't 1234567890 x_y  = {'a': 1}\n\n\n",
    "<|bos|><|end|>text<|user|><|endoftext|></s><s>",
    "שלום עולם \ufeff\u200b\u3000",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "查天气 <b>&</b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "n": 1}}}
SYSTEM = {"role": "system", "content": "Be brief. 简短。"}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": " 你好\n\n"},
    {"role": "assistant", "content": "\nhello  "},
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "Let me see", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": '{"sky": "晴"}'},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "Sunny. 晴 𠀀"},
]
CHATS: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    (TURNS[:1], None),
    (TURNS[:2], None),
    ([SYSTEM, *TURNS[:4]], None),
    (TURNS, [TOOL]),
    ([SYSTEM, *TURNS], [TOOL, TOOL]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    lines = [
        "hello world 你好，世界。 It's 2024\n",
        "def f(x):\n    return x\n",
        "天气 weather 北京\n",
    ]
    return train_tokenizer(lines * 20, 400)


@pytest.fixture(scope="module", params=list(FAMILIES))
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp(request.param)
    tokenizer = request.getfixturevalue("tokenizer")
    tokenizer.save(directory)
    config = {
        "model_type": request.param,
        "architectures": [FAMILIES[request.param]],
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(directory)


def their_ids(theirs: Any, text: str) -> list[int]:
    encoded = theirs(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


def test_vocabulary_and_named_tokens(tokenizer: Tokenizer, theirs: Any) -> None:
    assert len(theirs) == tokenizer.vocab_size  # an added token would lie outside the embedding
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert theirs.convert_tokens_to_ids("<|end|>") == tokenizer.end_id
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert theirs.backend_tokenizer.normalizer is None
    assert theirs("x")["input_ids"] == tokenizer.encode("x")  # no bos of its own: never twice


@pytest.mark.parametrize("text", NASTY)
def test_same_ids_and_same_text(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert their_ids(theirs, text) == ids
    assert theirs.decode(ids) == text


@settings(QUICK, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_same_ids_for_any_text(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    assert their_ids(theirs, text) == tokenizer.encode(text)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(("messages", "tools"), CHATS)
def test_same_chats(
    tokenizer: Tokenizer,
    theirs: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    prompt: bool,
) -> None:
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert render_chat(tokenizer, messages, tools, prompt) == text
    ids, mask = encode_chat(tokenizer, messages, tools, prompt)
    encoded = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    assert ids == list(encoded["input_ids"])
    if prompt:  # transformers gives masks for training only
        assert sum(mask) == sum(encode_chat(tokenizer, messages, tools)[1])
        return
    masked = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    assert mask == list(masked["assistant_masks"])


def test_transformers_saves_what_we_load(tokenizer: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    back = load_tokenizer(tmp_path)
    assert [back.encode(text) for text in NASTY] == [tokenizer.encode(text) for text in NASTY]
    assert encode_chat(back, TURNS, [TOOL]) == encode_chat(tokenizer, TURNS, [TOOL])
    assert (back.bos_id, back.eos_id, back.end_id) == (1, 2, 7)
