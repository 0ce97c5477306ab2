"""The limit of a model's thoughts, of models that write a known text."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import bytewise, chain_model

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import GenerationError
from khaosz.inference.generator import Generator, generate
from khaosz.inference.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=60, temperature=0)
# Each token of the chain is another one: the letters of the marker are taken.
CLOSE = "|</think>|"
TEMPLATE = (
    "{%- for m in messages %}{%- if m.reasoning_content %}"
    "{{- '<think>' + m.reasoning_content + '|</think>|' }}{%- endif %}{{- m.content }}"
    "{%- endfor %}{%- if add_generation_prompt and enable_thinking is not false %}"
    "{{- '<think>' }}{%- endif %}{{- go }}"
)


@pytest.fixture(scope="module")
def thinker() -> Generator:
    """After ">" it counts ABC... for ever; after "|" it answers xyz and stops."""
    by = bytewise()
    by = Tokenizer(by.serialized, {**by.config, "chat_template": TEMPLATE})

    def ids(text: str) -> list[int]:
        return by.encode(text)

    thoughts = ids("ABCDEFGHIJ")
    model = chain_model(by, [*ids(">"), *thoughts])
    answer = [*ids("|xyz"), by.end_id]
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight[thoughts[0], thoughts[-1]] = 10.0
        for token, following in pairwise(answer):
            model.lm_head.weight[following, token] = 10.0
    return Generator(model, by)


CHAT = [{"role": "user", "content": "Q"}]


def test_thoughts_end_at_the_budget(thinker: Generator) -> None:
    """Then the template's own text closes them, and the answer follows."""
    assert thinker.generate(CHAT, GREEDY).text == ("ABCDEFGHIJ" * 6)
    for budget in (0, 1, 7):
        answer = thinker.generate(CHAT, GREEDY, thinking_budget=budget)
        assert answer.text == "ABCDEFGHIJ"[:budget] + CLOSE + "xyz"
        assert (answer.finish_reason, answer.tokens) == ("stop", budget + len(CLOSE) + 4)
    long = generate(thinker, CHAT, GREEDY, thinking_budget=100)
    assert long.text == "ABCDEFGHIJ" * 6 and long.finish_reason == "length"


def test_choices_drafts_and_penalties_keep_to_the_budget(thinker: Generator) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, n=2, thinking_budget=3, logprobs=0)
    both = thinker.generate_batch([CHAT], params)
    assert [each.text for each in both] == ["ABC" + CLOSE + "xyz"] * 2
    assert len(both[0].logprobs) == both[0].tokens
    drafted = Generator(thinker.engine.runner, thinker.tokenizer, prompt_lookup=True)
    chat = [{"role": "user", "content": "ABCDEFGHIJABCDEFGHIJ"}]
    assert drafted.generate(chat, GREEDY, thinking_budget=13).text == (
        "ABCDEFGHIJABC" + CLOSE + "xyz"
    )


def test_thoughts_that_the_answer_opens_count(thinker: Generator) -> None:
    """The prompt may leave that to the model, as Qwen3's does."""
    ids = thinker.tokenizer.encode("Q")
    by = thinker.tokenizer
    opening = chain_model(by, [*by.encode("Q<think>ABCDEFG"), by.end_id])
    answer = Generator(opening, by).generate(ids, GREEDY, thinking_budget=2)
    assert answer.text.startswith("<think>AB" + CLOSE)
    plain = chain_model(by, [*by.encode("QABCDEFG"), by.end_id])
    answer = Generator(plain, by).generate(ids, GREEDY, thinking_budget=2)
    assert answer.text == "ABCDEFG"  # no thoughts


def test_the_switch_reaches_the_prompt(thinker: Generator) -> None:
    off = {"enable_thinking": False, "go": "|"}
    assert thinker.chat(CHAT, GREEDY, chat_template_kwargs=off).text == "xyz"
    assert generate(thinker, CHAT, GREEDY, chat_template_kwargs=off).text == "xyz"
    with pytest.raises(GenerationError, match="chat_template_kwargs is for messages"):
        thinker.generate("Q", GREEDY, chat_template_kwargs=off)
    with pytest.raises(GenerationError, match="thinking_budget must be >= 0"):
        SamplingParams(thinking_budget=-1)
