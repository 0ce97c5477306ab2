"""Templates see the values that transformers hands them. Each template here has the constructs of a
public family."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import tokenizers

from khaosz.data.records.chat import to_messages
from khaosz.data.tokenizer.chat import encode_chat, render_chat
from khaosz.data.tokenizer.tokenizer import Tokenizer, train_tokenizer
from khaosz.errors import DataError

transformers = pytest.importorskip("transformers")

HEADER = "{{- '<|im_start|>' + m.role + '\\n' }}"
LOOP = "{%- for m in messages %}"
END = "{{- '<|im_end|>\\n' }}{%- endfor %}"
TEMPLATES = {
    # Prints the content whatever it is.
    "zephyr": "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' }}{{ m['content'] }}"
    "{{ eos_token }}\n{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    "\n{% endfor %}",
    "yi": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}",
    "llama3": "{{- bos_token }}{%- if date is not defined %}{%- set date = '26 Jul 2024' %}"
    "{%- endif %}{%- if tools is not none %}{{- date }}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}{%- for m in messages %}"
    "{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}"
    "{{- m['content'] | trim }}{%- elif 'tool_calls' in m %}"
    "{%- if not m.tool_calls | length == 1 %}{{- raise_exception('one call only') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}{{- '{\"name\": \"' + call.name + '\", ' }}"
    "{{- '\"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}{%- else %}"
    "{%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}{%- else %}"
    "{{- m.content }}{%- endif %}{%- endif %}{{- '<|eot|>' }}{%- endfor %}",
    "qwen2.5": "{%- if tools %}{%- for t in tools %}{{- '\\n' }}{{- t | tojson }}{%- endfor %}"
    "{%- endif %}" + LOOP + HEADER + "{%- if m.content %}{{- m.content }}{%- endif %}"
    "{%- for c in m.tool_calls %}{%- if c.function is defined %}{%- set c = c.function %}{%- endif"
    " %}{{- '\\n<tool_call>{\"name\": \"' + c.name + '\", \"arguments\": ' }}{{- c.arguments |"
    " tojson }}{{- '}</tool_call>' }}{%- endfor %}" + END,
    "qwen3": LOOP + HEADER + "{%- if m.content is string %}{%- set content = m.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}{%- if m.reasoning_content is string %}"
    "{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{%- elif '</think>' in content %}{%- set content = content.split('</think>')[-1] %}"
    "{%- endif %}{{- content.lstrip('\\n') }}{%- if m.tool_calls %}{%- for c in m.tool_calls %}"
    "{%- if c.function %}{%- set c = c.function %}{%- endif %}{%- if c.arguments is string %}"
    "{{- c.arguments }}{%- else %}{{- c.arguments | tojson }}{%- endif %}{%- endfor %}{%- endif %}"
    + END,
    "mistral": "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- elif m.tool_calls is defined and"
    " m.tool_calls is not none and m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls"
    " %}{%- set out = c.function | tojson %}{{- out[:-1] }}{%- if not c.id is defined or"
    " c.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}"
    "{{- ', \"id\": \"' + c.id + '\"}' }}{{- ', ' if not loop.last else ']' + eos_token }}"
    "{%- endfor %}{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' +"
    " m.content | string + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}{%- else %}"
    "{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}",
    "hermes": "{%- if tools %}{%- for t in tools %}{%- if t.function is defined %}"
    "{%- set t = t.function %}{%- endif %}{{- t.name + ': ' + t.description + '(' }}"
    "{%- for name, f in t.parameters.properties | items %}{{- name + ': ' + f.type }}{%- endfor %}"
    "{{- ')\\n' }}{%- endfor %}{%- endif %}" + LOOP + HEADER + "{{- m.content }}"
    "{%- for c in m.tool_calls or [] %}{{- c.function.arguments | tojson }}{%- endfor %}" + END,
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System"
    " role not supported') }}{% endif %}{% for m in messages %}{% set role = 'model' if m.role =="
    " 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim }}"
    "{% endfor %}",
    "gemma3": LOOP + "{%- if m.content is string %}{{ m.content | trim }}{%- elif m.content is"
    " iterable %}{%- for part in m.content %}{%- if part.type == 'text' %}{{ part.text | trim }}"
    "{%- endif %}{%- endfor %}{%- else %}{{ raise_exception('Invalid content type') }}{%- endif %}"
    + END,
    # Tests for null, and concatenates arguments.
    "deepseek": "{% set ns = namespace(first=true) %}{% for m in messages %}{%- if m.role == 'user'"
    " %}{{ '<|User|>' + m['content'] }}{%- endif %}{%- if m.role == 'assistant' and m['content'] is"
    " none %}{%- for c in m['tool_calls'] %}{{ c['function']['name'] + '\n```json\n' +"
    " c['function']['arguments'] + '\n```' }}{%- endfor %}{%- endif %}{%- if m.role == 'assistant'"
    " and m['content'] is not none %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content }}"
    "{%- endif %}{%- if m.role == 'tool' %}{{ '<output>' + m['content'] }}{%- endif %}{% endfor %}",
    "glm": LOOP + HEADER + "{%- set content = m.content %}{%- if content is string %}{{- content }}"
    "{%- elif content is iterable %}{%- for part in content %}{{- part.text }}{%- endfor %}"
    "{%- endif %}{%- for c in m.tool_calls %}{%- for k, v in c.function.arguments.items() %}"
    "{{- '<arg_key>' + k + '</arg_key><arg_value>' }}{{- v | tojson if v is not string else v }}"
    "{%- endfor %}{%- endfor %}" + END,
    "phi": "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is"
    " not none %}{{ '<|tool|>' + m['tools'] }}{% endif %}{{ '<|' + m['role'] + '|>' +"
    " m['content'] + '<|end|>' }}{% endfor %}",
    "command": LOOP + "{%- if m.tool_calls %}{%- for c in m.tool_calls %}{{- '{\"tool_name\": ' +"
    " c.function.name | tojson + ', \"parameters\": ' + c.function.arguments | tojson(indent=2) +"
    " '}' }}{%- endfor %}{%- elif m.role | lower == 'tool' %}{{- m.content | tojson }}{%- else %}"
    "{{- m.content }}{%- endif %}" + END,
    "gpt-oss": LOOP + "{%- if m.thinking is defined and m.content is defined and m.content %}"
    "{{- '<|channel|>analysis' + m.thinking }}{%- endif %}{%- if 'content' in m %}{{- m.content }}"
    "{%- endif %}{%- if 'tool_calls' in m %}{{- m.tool_calls[0].function.arguments | tojson }}"
    "{%- endif %}{{- m.name }}" + END,
    # Made for arguments that are a string: an object prints as Python writes it.
    "raw": LOOP + "{{- m.content or '' }}{%- for c in m.tool_calls %}{{- '\"arguments\": ' ~"
    " c.function.arguments }}{%- endfor %}" + END,
}  # fmt: skip
ARGUMENTS = {"city": "北京", "days": 2, "note": None, "exact": True}
CALL = {"id": "abcdefghi", "type": "function"}
FUNCTION = {"name": "get_weather", "arguments": ARGUMENTS}
TOOL = {
    "type": "function",
    "function": {
        "description": "天气 <b>&'</b>",
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "default": None}},
        },
        "strict": True,
    },
}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def call(arguments: Any = ARGUMENTS, **more: Any) -> dict[str, Any]:
    return {**CALL, "function": {"name": "get_weather", "arguments": arguments}, **more}


RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "晴"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [user(" 你好\n"), assistant(content="b "), user("c")],
    "system": [{"role": "system", "content": "<b>S</b>"}, user("q")],
    "developer": [{"role": "developer", "content": "S"}, user("q")],
    "empty texts": [{"role": "system", "content": ""}, user(""), assistant(content="")],
    "null content beside calls": [user("q"), assistant(content=None, tool_calls=[call()]), RESULT],
    "absent content beside calls": [user("q"), assistant(tool_calls=[call()]), RESULT],
    "empty content beside calls": [user("q"), assistant(content="", tool_calls=[call()]), RESULT],
    "text beside calls": [user("q"), assistant(content="t", tool_calls=[call()]), RESULT],
    "two calls": [user("q"), assistant(content="", tool_calls=[call(), call({})]), RESULT],
    "flat call": [user("q"), assistant(content="", tool_calls=[FUNCTION]), RESULT],
    "null fields": [
        user("q", name=None),
        assistant(content="a", tool_calls=None, refusal=None, function_call=None, name=None),
        user("r"),
    ],
    "no calls": [user("q"), assistant(content="a", tool_calls=[]), user("r")],
    "reasoning": [user("q"), assistant(content="a", reasoning_content="t"), user("r")],
    "reasoning by another name": [user("q"), assistant(content="a", reasoning="t"), user("r")],
    "thinking": [user("q"), assistant(content="a", thinking="t"), user("r")],
    "reasoning in the text": [user("q"), assistant(content="<think>\nt\n</think>\n\na")],
    "reasoning before a call": [
        user("q"),
        assistant(content=None, reasoning_content="t", tool_calls=[call()]),
        RESULT,
    ],
    "reasoning alone": [user("q"), assistant(content=None, reasoning_content="t"), user("r")],
    "names": [user("q", name="Ann"), assistant(content="a", name="Bob"), user("r")],
    "unknown fields": [user("q", weight=0, meta={"a": [1]}), assistant(content="a")],
    "tools in a message": [{"role": "system", "content": "s", "tools": "[]"}, user("q")],
    "result without id": [user("q"), assistant(content="", tool_calls=[call()]), user("晴")],
    "result as object": [
        user("q"),
        assistant(content="", tool_calls=[call()]),
        {**RESULT, "content": {"sky": "晴"}},
    ],
    "other roles": [user("q"), {"role": "ipython", "content": "1"}, user("r")],
    "old function calls": [
        user("q"),
        assistant(content=None, function_call={"name": "f", "arguments": "{}"}),
        {"role": "function", "name": "f", "content": "1"},
    ],
}


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    return train_tokenizer(["hello world 你好\n"] * 20, 300)


@pytest.fixture(scope="module")
def theirs(base: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_buffer(base.serialized),
        **{key: base.config[key] for key in ("bos_token", "eos_token", "pad_token")},
    )


def ours(base: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(base.serialized, {**base.config, "chat_template": template})


def rendered(theirs: Any, template: str, messages: Any, tools: Any = None) -> str | None:
    """By transformers; None where the template raises an exception."""
    theirs.chat_template = template
    try:
        return str(theirs.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:  # of any kind: the template's own
        return None


@pytest.mark.parametrize("family", TEMPLATES)
def test_same_renderings_as_transformers(base: Tokenizer, theirs: Any, family: str) -> None:
    template = TEMPLATES[family]
    tokenizer = ours(base, template)
    compared = 0
    for name, messages in CHATS.items():
        for tools in (None, [], [TOOL]):
            before = copy.deepcopy(messages)
            expected = rendered(theirs, template, messages, tools)
            if expected is None or "{'city': " in expected:
                continue  # see test_arguments_take_the_form_that_the_template_reads
            assert render_chat(tokenizer, messages, tools) == expected, (name, tools)
            assert messages == before
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("family", [name for name in TEMPLATES if "call" in TEMPLATES[name]])
def test_arguments_take_the_form_that_the_template_reads(
    base: Tokenizer, theirs: Any, family: str
) -> None:
    """OpenAI's API writes them as a JSON string, transformers' guide as an object."""
    template = TEMPLATES[family]
    as_string = family in ("deepseek", "raw")
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    wanted = text if as_string else ARGUMENTS

    def chat(arguments: Any) -> list[dict[str, Any]]:
        return [user("q"), assistant(content=None, tool_calls=[call(arguments)]), RESULT]

    if family == "deepseek":  # transformers drops the null that the template tests for
        expected: str | None = f"<|User|>qget_weather\n```json\n{text}\n```<output>晴"
    else:
        expected = rendered(theirs, template, chat(wanted))
    assert expected is not None and "北京" in expected
    for arguments in (ARGUMENTS, text):
        assert render_chat(ours(base, template), chat(arguments)) == expected


def test_arguments_that_are_not_json_and_none(base: Tokenizer) -> None:
    tokenizer = ours(base, TEMPLATES["llama3"])
    for arguments, expected in (("", "{}"), (" ", "{}"), ("{broken", '"{broken"'), ("[1]", "[1]")):
        text = render_chat(tokenizer, [user("q"), assistant(tool_calls=[call(arguments)])])
        assert f'"parameters": {expected}}}' in text
    # A template that takes either gets what the caller wrote.
    tokenizer = ours(base, TEMPLATES["qwen3"])
    assert '{"a":1}' in render_chat(tokenizer, [user("q"), assistant(tool_calls=[call('{"a":1}')])])


def test_content_keeps_its_parts_where_the_template_reads_them(base: Tokenizer) -> None:
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": " b "}]
    for family, expected in (("gemma3", "ab"), ("glm", " a  b "), ("qwen3", " a  b "),
                             ("zephyr", " a  b "), ("yi", " a  b ")):  # fmt: skip
        for role in ("system", "user", "assistant"):
            chat = [user("q"), {"role": role, "content": parts}]
            text = render_chat(ours(base, TEMPLATES[family]), chat)
            plain = render_chat(
                ours(base, TEMPLATES[family]), [user("q"), {**chat[1], "content": "@"}]
            )
            assert text == plain.replace("@", expected)
    picture = [user([{"type": "text", "text": "x"}, {"type": "image", "url": "y"}])]
    with pytest.raises(DataError, match="content is list, not text"):
        render_chat(ours(base, TEMPLATES["glm"]), picture)


def test_tools_without_description_and_parameters(base: Tokenizer, theirs: Any) -> None:
    """OpenAI's API makes both optional; a template that needs them gets empty ones."""
    bare = {"type": "function", "function": {"name": "now"}}
    for family in ("llama3", "qwen2.5"):
        expected = rendered(theirs, TEMPLATES[family], [user("q")], [bare])
        assert render_chat(ours(base, TEMPLATES[family]), [user("q")], [bare]) == expected
    for tool in (bare, {"name": "now"}):
        text = render_chat(ours(base, TEMPLATES["hermes"]), [user("q")], [tool, TOOL])
        assert text.startswith("now: ()\nget_weather: 天气 <b>&'</b>(city: string)\n")


@pytest.mark.parametrize(
    "template",
    [
        "{{ {'b': '<&>\"北', 'a': [1.0, none, true]} | tojson }}",
        "{{ {'b': 1, 'a': {'c': '北'}} | tojson(indent=2, sort_keys=true) }}",
        "{{ '北' | tojson(ensure_ascii=true) }}{{ {'a': 1} | tojson(separators=(',', ':')) }}",
        "{{ 'a\r\nb\n\nc\n' | indent(3) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent("
        "'> ', blank=true) }}",
        "{{ 'a-1-1' | replace(1, 2) }}{{ 'aaa' | replace('a', 'b', 2) }}{{ nothing | replace('a',"
        " 'b') }}",
        "{{ 'In 2024, %s had %05d%%' % ('x', 7) }}{{ '%s in 2024' | format('y') }}",
        "{{ '%(a)s %(b)-4d|' | format(a=1, b=2) }}{{ '%.3f' % 1.5 }}",
        "  {% for i in range(9) %}\n  {% if i == 2 %}{% continue %}{% endif %}\n{{ i }}\n"
        "  {%- if i == 4 %}{% break %}{% endif %}\n  {% endfor %}\nend\n",
        "{{ unknown }}{{ unknown is defined }}{{ documents is none }}{{ tools is none }}"
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ messages | map(attribute='role') | join(',') }}{{ messages[::-1][0].role }}",
        "{% macro f(x, y='z') %}{{ x ~ y }}{% endmacro %}{{ f(1) | upper }}{{ dict(a=1).items() |"
        " list }}{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ messages[0] | tojson }}{{ messages[0].keys() | list }}{{ strftime_now('%Y') }}",
        "{{ 'a,b'.split(',') | last }}{{ 'x'.startswith('x') }}{{ [3, 1] | sort | first }}",
    ],
)
def test_same_environment_as_transformers(base: Tokenizer, theirs: Any, template: str) -> None:
    expected = rendered(theirs, template, CHATS["text"])
    assert expected is not None
    assert render_chat(ours(base, template), CHATS["text"]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | dictsort }}",
        "{{ messages[0].content | items | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%1000d' % 1 }}",
        "{{ '%*d' | format(9000, 1) }}",
        "{{ messages[0].content.encode('no') }}",
    ],
)
def test_any_fault_in_a_template_is_a_data_error(base: Tokenizer, template: str) -> None:
    with pytest.raises(DataError, match="refuses this chat"):
        render_chat(ours(base, template), [user("x")])


def test_assistant_without_any_field_is_refused(base: Tokenizer) -> None:
    for message in (assistant(), assistant(content=None, name="x"), user(None), user({"a": 1})):
        with pytest.raises(DataError, match=r"message 2 .*, not text"):
            render_chat(ours(base, TEMPLATES["qwen3"]), [user("q"), message])


def test_templates_see_names_of_control_tokens_in_messages(base: Tokenizer, theirs: Any) -> None:
    """The template decides by "</think>", which some tokenizers have as a special token; what it
    keeps is text all the same."""
    spec = json.loads(base.serialized)
    for token in spec["added_tokens"]:
        token["content"] = {"<|reserved_0|>": "</think>"}.get(token["content"], token["content"])
    spec["model"]["vocab"] = {
        {"<|reserved_0|>": "</think>"}.get(name, name): i
        for name, i in spec["model"]["vocab"].items()
    }
    config = {**base.config, "chat_template": TEMPLATES["qwen3"]}
    tokenizer = Tokenizer(json.dumps(spec).encode(), config)
    assert "</think>" in tokenizer.special_ids
    chat = [user("<|end|> </think>"), assistant(content="<think>\nt\n</think>\n\na <|user|>b")]
    ids, _ = encode_chat(tokenizer, chat)
    assert tokenizer.decode(ids) == rendered(theirs, TEMPLATES["qwen3"], chat)
    assert not any(map(tokenizer.is_special, ids))


def test_records_render_as_requests_do(base: Tokenizer) -> None:
    messages = [
        user("q", name="Ann"),
        assistant(content=None, reasoning_content="t", tool_calls=[call(json.dumps(ARGUMENTS))]),
        RESULT,
        assistant(content="a"),
    ]
    chat = to_messages({"messages": messages, "tools": [TOOL]})
    assert chat.messages[1]["tool_calls"] == [call()] and "content" not in chat.messages[1]
    for template in TEMPLATES.values():
        if rendered_by_us(base, template, messages) is not None:
            assert render_chat(ours(base, template), chat.messages, chat.tools) == render_chat(
                ours(base, template),
                [{**m, "tool_calls": [call()]} if "tool_calls" in m else m for m in messages],
                [TOOL],
            )
    empty = to_messages({"messages": [user("q"), assistant(content=None, tool_calls=[call("")])]})
    assert empty.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def rendered_by_us(base: Tokenizer, template: str, messages: Any) -> str | None:
    try:
        return render_chat(ours(base, template), messages, [TOOL])
    except DataError:
        return None
