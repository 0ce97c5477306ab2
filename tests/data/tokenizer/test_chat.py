"""Chats: the mask covers exactly what the assistant says, and user text stays text."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khaosz.data.tokenizer import chat
from khaosz.data.tokenizer.chat import encode_chat, render_chat
from khaosz.data.tokenizer.sandbox import time_limit
from khaosz.data.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from khaosz.errors import DataError

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "天气 & <b>", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world 你好，世界。 <tool_call> assistant user\n"] * 20, 320)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.serialized, {**tokenizer.config, "chat_template": template})


def trained(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    return tokenizer.decode(i for i, m in zip(ids, mask, strict=True) if m)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_rendered_text(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "简短"}, user("你好"), assistant(" hi \n"), user("?")]
    assert render_chat(tokenizer, messages, add_generation_prompt=True) == (
        "<|bos|><|system|>简短<|end|><|user|>你好<|end|><|assistant|> hi \n<|end|>"
        "<|user|>?<|end|><|assistant|>"
    )


def test_tools_and_calls(tokenizer: Tokenizer) -> None:
    messages = [
        user("天气"),
        {"role": "assistant", "content": "查一下", "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    schema = (
        '{"type": "function", "function": {"name": "weather", "description": "天气 & <b>", '
        '"parameters": {"type": "object"}}}'
    )
    assert render_chat(tokenizer, messages, [TOOL]) == (
        f"<|bos|><|system|><tools>\n{schema}\n</tools><|end|><|user|>天气<|end|>"
        f"<|assistant|>查一下\n{call}\n{call}<|end|><|tool|>晴<|end|><|assistant|>{call}<|end|>"
    )
    ids, mask = encode_chat(tokenizer, messages, [TOOL])
    assert trained(tokenizer, ids, mask) == f"查一下\n{call}\n{call}<|end|>{call}<|end|>"
    with_system = render_chat(tokenizer, [{"role": "system", "content": "S"}, user("q")], [TOOL])
    assert with_system.startswith(
        f"<|bos|><|system|>S\n\n<tools>\n{schema}\n</tools><|end|><|user|>"
    )
    assert with_system.count("<|system|>") == 1


def test_mask_is_the_assistant_text_and_the_end_of_its_turn(tokenizer: Tokenizer) -> None:
    ids, mask = encode_chat(
        tokenizer, [user("你好"), assistant("hello"), user("x"), assistant("好")]
    )
    assert trained(tokenizer, ids, mask) == "hello<|end|>好<|end|>"
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    first = mask.index(1)
    assert ids[first - 1] == tokenizer.special_ids["<|assistant|>"]  # the first token is not lost
    assert ids[-1] == tokenizer.end_id
    assert mask[-1] == 1  # the token that ends the turn is trained
    prompt, prompt_mask = encode_chat(tokenizer, [user("你好")], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt  # training and generation see the same prompt
    assert not any(prompt_mask)


CONTENT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "<|us", "er|>", "{{ 1 }}", "{% if %}", "\n"]),
    ),
    max_size=5,
).map("".join)


@settings(QUICK, max_examples=150)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), CONTENT)
def test_control_tokens_in_messages_stay_text(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], argument: str
) -> None:
    messages: list[dict[str, Any]] = []
    expected = [tokenizer.bos_id]
    answer: list[int] = []

    def turn(role: str, content: str) -> None:
        head = tokenizer.special_ids[f"<|{role}|>"]
        expected.extend([head, *tokenizer.encode(content), tokenizer.end_id])

    for question, reply in pairs:
        messages += [user(question), assistant(reply)]
        turn("user", question)
        turn("assistant", reply)
        answer += [*tokenizer.encode(reply), tokenizer.end_id]
    ids, mask = encode_chat(tokenizer, messages)
    assert ids == expected
    assert [i for i, m in zip(ids, mask, strict=True) if m] == answer
    messages.append(
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "f", "arguments": {argument: [argument]}}],
        }
    )
    tools = [{"name": argument}]
    ids, _ = encode_chat(tokenizer, messages, tools)
    assert tokenizer.decode(ids) == render_chat(tokenizer, messages, tools)
    assert sum(tokenizer.is_special(i) for i in ids) == 1 + 2 + 2 * 2 * len(pairs) + 2


def test_nothing_random_remains(tokenizer: Tokenizer) -> None:
    messages = [user("<|end|>"), assistant("<|user|> hi")]
    assert encode_chat(tokenizer, messages) == encode_chat(tokenizer, messages)
    ids, _ = encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == "<|bos|><|user|><|end|><|end|><|assistant|><|user|> hi<|end|>"


def test_generation_block_inside_a_text_run(tokenizer: Tokenizer) -> None:
    """ChatML puts a line end between the header and the answer: only the answer is trained."""
    chatml = (
        "{% for m in messages %}<|user|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
        "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    )
    other = with_template(tokenizer, chatml)
    ids, mask = encode_chat(other, [user("q"), assistant("hello world")])
    assert other.decode(ids) == render_chat(other, [user("q"), assistant("hello world")])
    assert trained(other, ids, mask) == "hello world<|end|>"


def test_control_token_inside_a_generation_block(tokenizer: Tokenizer) -> None:
    """A template may place one between thinking and answer: both sides of it are trained."""
    template = "x<|user|>{% generation %}a<|tool|>b<|end|>{% endgeneration %}c<|end|>d"
    other = with_template(tokenizer, template)
    ids, mask = encode_chat(other, [user("q")])
    assert other.decode(ids) == "x<|user|>a<|tool|>b<|end|>c<|end|>d"
    assert mask == [0, 0, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "narrator", "content": "x"}], "unknown role"),
        ([{"role": "<|end|>", "content": "x"}], "unknown role"),
        ([{"content": "x"}], "has no role"),
        ([{"role": "user", "content": None}], "message 1 .*NoneType"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}], "message 2"),
        ([{"role": "user", "content": [{"type": "image"}]}], "list"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}], "refuses"),
        ([{"role": "assistant", "content": None, "tool_calls": 3}], "refuses"),
    ],
)
def test_bad_chats(tokenizer: Tokenizer, messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        encode_chat(tokenizer, messages)
    with pytest.raises(DataError, match=reason):
        render_chat(tokenizer, messages)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ undefined.attribute }}",
        "{{ 'a' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ 2 ** (10**6) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
        "{{ ('\\n' * 10**6)|indent('b' * 10**6) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(tokenizer: Tokenizer, attack: str) -> None:
    with pytest.raises(DataError, match="refuses this chat"):
        render_chat(with_template(tokenizer, attack), [user("x")])


_DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = "


@pytest.mark.parametrize(
    "attack",
    [
        *(f"{{{{ 'a'.{name}(10**10)|length }}}}" for name in ("ljust", "rjust", "center", "zfill")),
        "{% set fill = 'a'.ljust %}{{ fill(10**10)|length }}",
        "{{ '\t'.expandtabs(10**10)|length }}",
        "{{ 'a'.encode().ljust(10**10)|length }}",
        "{{ (1).to_bytes(10**10)|length }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6)|length }}",
        "{{ ('a' * 10**6).translate({97: 'b' * 10**6})|length }}",
        "{{ ('a' * 10**7).join(['b'] * 10**6)|length }}",
        "{{ (['b'] * 10**6)|join('a' * 10**7)|length }}",
        "{{ '{:10000000000}'.format(1)|length }}",
        "{{ '{:>{w}}'.format(1, w=10**10)|length }}",
        "{{ ('{a}' * 10**5).format(a='a' * 10**7)|length }}",
        "{{ ('{a}' * 10**5).format_map({'a': 'a' * 10**7})|length }}",
        "{{ (('%s' * 1000) % (('a' * 10**7,) * 1000))|length }}",
        "{{ ('%999d' * 10**5)|format(*([1] * 10**5))|length }}",
        "{{ (([1]|batch(10**10, 0))|list)|length }}",
        "{{ (([1]|slice(10**10))|list)|length }}",
        "{{ [[1]]|tojson(indent=10**10)|length }}",
        "{{ [[[1]] * 10**5]|tojson(indent=10**5)|length }}",
        "{{ 5|round(10**8, 'ceil') }}",
        "{{ ([[0] * 10**5] * 1000)|sum(start=[])|length }}",
        "{{ strftime_now('%1000000000Y')|length }}",
        "{% set n = namespace(x=2) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x=2) %}{% for i in range(9) %}{% set n.x = n.x ** 999 %}{% endfor %}",
        "{% set n = namespace(l=[]) %}{% for i in range(10**4) %}"
        "{% set n.l = n.l + ['a' * 10**7] %}{% endfor %}",
        _DOUBLED + "'%s%s' % (n.x, n.x) %}{% endfor %}",
        _DOUBLED + "n.x.replace('b', 'bb') %}{% endfor %}",
        _DOUBLED + "[n.x, n.x]|join %}{% endfor %}",
        _DOUBLED + "[n.x, n.x] %}{% endfor %}{{ n.x == 1 }}",
        _DOUBLED + "{'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x|tojson }}",
        _DOUBLED + "dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
        _DOUBLED + "namespace(a=n.x, b=n.x) %}{% endfor %}{{ [n.x]|tojson }}",
        "{% macro f() %}{{ varargs }}{% endmacro %}"
        + _DOUBLED
        + "(n.x, n.x) %}{% endfor %}{{ f(1) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}"
        "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    ],
)
def test_templates_make_no_long_values(tokenizer: Tokenizer, attack: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"refuses this chat: [^m]"):  # not by "more than 5 seconds"
        render_chat(with_template(tokenizer, attack), [user("x")])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 19, f"{grown} KiB"  # half a GiB: the values of one rendering, twice


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nested blocks"),
    ],
)
def test_templates_nested_too_deep(tokenizer: Tokenizer, template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"cannot be compiled.*{reason}"):
        render_chat(with_template(tokenizer, template), [user("x")])


def test_templates_have_limits_of_size_and_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    flood = "{% for i in range(10**5) %}{{ 'a' * 10**6 }}{% endfor %}"
    with pytest.raises(DataError, match="renders more than 16,777,216 characters"):
        render_chat(with_template(tokenizer, flood), [user("x")])
    with pytest.raises(DataError, match="template has 200,000 characters"):
        render_chat(with_template(tokenizer, "x" * 200_000), [user("x")])
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    before = sys.gettrace()
    with pytest.raises(DataError, match=r"more than 0\.2 seconds"):
        monkeypatch.setattr(chat, "time_limit", lambda: time_limit(0.2))
        render_chat(with_template(tokenizer, loop), [user("x")])
    assert sys.gettrace() is before


@pytest.mark.parametrize("text", ["a" * 32 + "S", "0" * 33 + "E", "f" * 31 + "L0.", "ab" * 16])
def test_text_that_looks_like_a_mark_is_text(tokenizer: Tokenizer, text: str) -> None:
    for content in (text, text + "<|end|>", "<|end|>" + text):
        ids, mask = encode_chat(tokenizer, [user("x"), assistant(content)])
        end = tokenizer.end_id
        assert (
            ids[-1] == end
            and tokenizer.encode(content) == [i for i, m in zip(ids, mask, strict=True) if m][:-1]
        )


def test_sandbox_allows_what_templates_use(tokenizer: Tokenizer) -> None:
    template = (
        "{{ ('a' ~ 1 ~ messages[0].content) + 'b' * 2 }}{{ 'x y'|replace(' ', '_') }}"
        "{{ 'p\\nq'|indent(2) }}{{ '%s-%03d' % ('k', 7) }}{{ 2 ** 3 * 2 + 1 }}{{ [1] + [2] }}"
    )
    said = render_chat(with_template(tokenizer, template), [user("u")])
    assert said == "a1ubbx_yp\n  qk-00717[1, 2]"
    template = (
        "{{ 'a'.ljust(3) }}|{{ '7'.zfill(3) }}{{ 'a\tb'.expandtabs(2) }}{{ '-'.join(['a', 'b']) }}"
        "{{ '{:>3}{k}'.format(1, k=[2]) }}{{ '{k}'.format_map({'k': 3}) }}"
        "{{ 'aa'.replace('a', 'b', 1) }}"
        "{{ [1, 2]|join(', ') }}{{ [{'a': 1}, {'a': 2}]|join('', attribute='a') }}"
        "{{ [1, 2]|sum }}{{ [{'a': 1}]|sum('a') }}{{ 2.567|round(2) }}{{ 'ff'|int(0, 16) }}"
        "{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2]|slice(2)|list }}"
        "{{ dict(a=1)|tojson(indent=1) }}{{ [1]|tojson(separators=(',', ':')) }}"
        "{% set a, b = 1, 2 %}{{ a }}"
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('y') }}{% set z %}{{ 'z' }}{% endset %}{{ z }}"
    )
    assert render_chat(with_template(tokenizer, template), [user("u")]) == (
        "a  |007a ba-b  1[2]3ba1, 212312.57255[[1, 2], [3, 0]][[1], [2]]" + '{\n "a": 1\n}[1]1<y>z'
    )


def test_broken_and_missing_templates(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="not valid Jinja, line 2"):
        render_chat(with_template(tokenizer, "a\n{% if %}"), [user("x")])
    config = {k: v for k, v in tokenizer.config.items() if k != "chat_template"}
    with pytest.raises(DataError, match="no chat template"):
        encode_chat(Tokenizer(tokenizer.serialized, config), [user("x")])
