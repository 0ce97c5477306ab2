"""What is learned of a chat with templates that have no markers: what the model is asked to say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from khaosz.data.records.learned import learned_chats
from khaosz.data.records.readers import RawBatch
from khaosz.data.shards.encode import PieceEncoder, encode_records
from khaosz.data.tokenizer import train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.data.tokenizer.chat_template import CHAT_TEMPLATE
from khaosz.data.tokenizer.tokenizer import Tokenizer
from khaosz.errors import DataError

MARKERS = re.compile(r"\{%-? (end)?generation -?%\}")
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = "{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}"
# The constructs of public templates with the control tokens of ours, and what a chat becomes: of
# each text the chat as the model reads it, learned parts in brackets.
U, A, U2, A2 = "<|user|>q", "<|assistant|>", "<|user|>r", "<|assistant|>"
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "chatml": (LOOP + TURN + "{% endfor %}" + PROMPT, [
        f"{U}<|end|>\n{A}[a<|end|>]\n{U2}<|end|>\n{A2}[b<|end|>]\n",
    ]),
    "qwen2.5, a system message of its own": (
        "{% if messages[0].role != 'system' %}<|system|>s<|end|>\n{% endif %}" + LOOP + TURN
        + "{% endfor %}" + PROMPT,
        [f"<|system|>s<|end|>\n{U}<|end|>\n{A}[a<|end|>]\n{U2}<|end|>\n{A2}[b<|end|>]\n"],
    ),
    "qwen3, thoughts in the last turn alone": (
        LOOP + "{% if m.role == 'assistant' %}<|assistant|>{% if loop.last %}(think){% endif %}{{ "
        "m.content + '<|end|>\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT,
        [
            f"{U}<|end|>\n{A}[(think)a<|end|>]\n",
            f"{U}<|end|>\n{A}a<|end|>\n{U2}<|end|>\n{A2}[(think)b<|end|>]\n",
        ],
    ),
    "phi3, another token at the end": (
        LOOP + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}<|eos|>"
        "{% endif %}",
        [f"{U}<|end|>\n{A}[a<|end|>]\n{U2}<|end|>\n{A2}[b<|end|>]\n<|eos|>"],
    ),
    "gemma and llama, trimmed content": (
        LOOP + "{{ '<|' + m.role + '|>' }}\n{{ m.content | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [f"<|user|>\nq<|end|>{A}\n[a<|end|>]<|user|>\nr<|end|>{A2}\n[b<|end|>]"],
    ),
    "mistral, no prompt": (
        LOOP + "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
        "{{ ' ' + m.content + '<|end|>' }}{% endif %}{% endfor %}",
        [f"{U}[ a<|end|>]{U2}[ b<|end|>]"],
    ),
    "deepseek-r1, a prompt that begins a thought": (
        LOOP + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>(think)\n{% endif %}",
        [f"{U}<|end|>\n{A}[a<|end|>]\n{U2}<|end|>\n{A2}[b<|end|>]\n"],
    ),
}  # fmt: skip
CHAT = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "b"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world. (think) a b q r s\n"] * 20, 300)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.serialized, {**tokenizer.config, "chat_template": template})


def bracketed(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    text, before = "", 0
    for token, on in zip([*ids, None], [*mask, 0], strict=True):
        text += "[" * (on > before) + "]" * (on < before)
        text += "" if token is None else tokenizer.decode([token])
        before = on
    return text


def learned(template: str, chat: list[dict[str, Any]], tokenizer: Tokenizer) -> list[str]:
    other = with_template(tokenizer, template)
    return [bracketed(other, *encoded) for encoded in learned_chats(other, chat)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_and_its_end_are_learned(name: str, tokenizer: Tokenizer) -> None:
    template, texts = FAMILIES[name]
    assert learned(template, CHAT, tokenizer) == texts


def test_the_same_as_with_markers(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": {"x": "y"}}}
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q <|end|> r"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "hello"},
        {"role": "assistant", "content": " <|assistant|> world"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a\n"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    bare = with_template(tokenizer, MARKERS.sub("", CHAT_TEMPLATE))
    expected = encode_chat(tokenizer, chat, tools)
    assert sum(expected[1]) > 10
    assert learned_chats(bare, chat, tools) == [expected] == learned_chats(tokenizer, chat, tools)


def test_a_template_that_merges_turns(tokenizer: Tokenizer) -> None:
    merging = (
        LOOP + "{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
        "{{ '<|' + m.role + '|>' }}{% endif %}{{ m.content }}"
        "{% if loop.last or m.role != messages[loop.index].role %}<|end|>{% endif %}{% endfor %}"
        + PROMPT
    )
    chat = [CHAT[0], CHAT[2], CHAT[1], CHAT[3]]
    assert learned(merging, chat, tokenizer) == [
        "<|user|>qr<|end|><|assistant|>[a<|end|>]",
        "<|user|>qr<|end|><|assistant|>a[b<|end|>]",
    ]


def test_where_it_is_not_well_defined_the_turn_is_named(tokenizer: Tokenizer) -> None:
    reverse = "{% for m in messages[::-1] %}" + TURN + "{% endfor %}" + PROMPT
    with pytest.raises(DataError, match=r"turn 2: .* not well defined") as info:
        learned(reverse, CHAT, tokenizer)
    assert info.value.hint
    with pytest.raises(DataError, match="turn 1: the chat begins with the assistant"):
        learned(FAMILIES["chatml"][0], CHAT[1:], tokenizer)
    silent = LOOP + "{% if m.role == 'user' %}" + TURN + "{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="turn 2: the chat template renders nothing of the answer"):
        learned(silent, CHAT[:2], tokenizer)


def test_turns_of_weight_zero_are_context(tokenizer: Tokenizer) -> None:
    other = with_template(tokenizer, FAMILIES["chatml"][0])
    ((ids, mask),) = learned_chats(other, CHAT, weights=[0, 1])
    assert bracketed(other, ids, mask).count("[") == 1 and "a[" not in bracketed(other, ids, mask)
    assert bracketed(other, ids, mask).endswith("[b<|end|>]\n")


def test_several_texts_of_a_chat_are_held_out_together(tokenizer: Tokenizer) -> None:
    name = "qwen3, thoughts in the last turn alone"
    other = with_template(tokenizer, FAMILIES[name][0])
    line = json.dumps({"messages": CHAT}).encode()
    batch = RawBatch(Path("x.jsonl"), 1, [line])
    encoded = encode_records(PieceEncoder(other), batch, "sft")
    assert len(encoded.lengths) == 2 and encoded.n_bytes.tolist() == [7, 0]
    first, second = encoded.hashes
    assert first[:8].tolist() == second[:8].tolist() and first.tolist() != second.tolist()
