"""Renders a chat by its template and encodes it as ids and a loss mask.

The template is one Jinja string, stored in tokenizer_config.json and read by transformers, vLLM and
llama.cpp; `{% generation %}` marks the assistant's text (transformers' convention for
`return_assistant_tokens_mask`). Templates of other models are untrusted code: they run in a sandbox
with limits on time and size (sandbox.py).

Control tokens come from the template alone. One written inside a message is text: it is replaced by
a random marker before rendering, and restored after the template's own have got their aliases
(control.py). The chat is then encoded in one piece, so its ids are those of transformers wherever
no message holds the name of a control token.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from khaosz.data.tokenizer.chat_template import OWN_TEMPLATES
from khaosz.data.tokenizer.messages import (
    Forms,
    Message,
    Tools,
    check_messages,
    for_template,
    probe,
    tools_for_template,
)
from khaosz.data.tokenizer.sandbox import MAX_TEMPLATE, MAX_TEXT, Sandbox, charge, time_limit
from khaosz.data.tokenizer.training_text import refuse_surrogates
from khaosz.errors import ContextLengthError, DataError

if TYPE_CHECKING:
    from khaosz.data.tokenizer.tokenizer import Tokenizer


# Template variables that callers cannot set: those that the chat itself sets, and transformers'
# own arguments.
RESERVED = frozenset(
    ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template",
     "conversation", "tokenize", "raise_exception", "strftime_now")
)  # fmt: skip
# Template variables that `{% generation %}` prints around its body; undefined prints nothing.
_START, _END = "khaosz_generation_start", "khaosz_generation_end"


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the body between two marks, in its scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start = nodes.Output([nodes.Name(_START, "load")])
        end = nodes.Output([nodes.Name(_END, "load")])
        return nodes.Scope([start, *body, end]).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON as transformers renders it; Jinja's own filter escapes for HTML."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    charge(indent if isinstance(indent, int) else len(indent or ""))
    parts = []
    for part in encoder.iterencode(value):
        charge(len(part))
        parts.append(part)
    return "".join(parts)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"\d{3}", pattern):
        raise jinja2.TemplateError("a format of time that is too long")
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise DataError(
            f"the chat template has {len(template):,} characters, over {MAX_TEMPLATE:,}"
        )
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        with time_limit():  # constant expressions are computed here
            return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja, line {error.lineno}: {error.message}",
            hint="see chat_template in tokenizer_config.json",
        ) from error
    except Exception as error:  # nesting too deep for Jinja or Python, a limit of the sandbox
        raise DataError(
            f"the chat template cannot be compiled: {str(error) or type(error).__name__}",
            hint="see chat_template in tokenizer_config.json",
        ) from error


def reserved_name(template_kwargs: Mapping[str, Any]) -> str | None:
    """The first name that is not a caller's to set, such as messages or bos_token."""
    taken = (
        name for name in template_kwargs
        if name in RESERVED or name.endswith("_token") or name in (_START, _END)
    )  # fmt: skip
    return next(taken, None)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    start_mark: str = "",
    end_mark: str = "",
) -> str:
    """The chat as the model reads it. `template_kwargs`: variables of the template, such as
    enable_thinking. Raises DataError for a chat that the template rejects, and for a variable that
    is not the caller's."""
    template = tokenizer.chat_template_for(tools)
    if template is None:
        raise DataError(
            "this tokenizer has no chat template",
            hint="use a chat model, or add chat_template to its tokenizer_config.json",
        )
    check_messages(messages)
    if (name := reserved_name(template_kwargs or {})) is not None:
        raise DataError(f"chat_template_kwargs: {name} is set by the chat itself")
    variables = tokenizer.template_variables

    def forms() -> Forms:
        return _forms(template, tuple(variables.items()))

    return _render(
        template,
        for_template(messages, forms),
        None if tools is None else tools_for_template(tools, forms),
        add_generation_prompt,
        {**(template_kwargs or {}), **variables, _START: start_mark, _END: end_mark},
    )


def render_template(
    template: str,
    messages: list[Message],
    add_generation_prompt: bool,
    variables: dict[str, Any],
) -> str:
    """A chat by a template alone, to learn what the template does. Raises DataError."""
    return _render(template, messages, None, add_generation_prompt, variables)


def _render(
    template: str,
    messages: list[Message],
    tools: Tools,
    add_generation_prompt: bool,
    variables: dict[str, Any],
) -> str:
    compiled = _compile(template)
    # Our own template is trusted, and `data prepare` renders it a million times.
    limit = nullcontext() if template in OWN_TEMPLATES else time_limit()
    try:
        with limit:
            parts, size = [], 0
            context = {
                "documents": None,
                **variables,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
            for part in compiled.generate(context):
                parts.append(part)
                size += len(part)
                if size > MAX_TEXT:
                    raise DataError(f"the chat template renders more than {MAX_TEXT:,} characters")
            return "".join(parts)
    except DataError:
        raise
    # A template raises TemplateError or OverflowError for rejected chats, undefined names and
    # sandbox limits, and any of Python's errors for values of a shape that it does not expect.
    except Exception as error:
        raise DataError(
            f"the chat template refuses this chat: {str(error) or type(error).__name__}"
        ) from error


@lru_cache(maxsize=8)
def _forms(template: str, variables: tuple[tuple[str, str], ...]) -> Forms:
    return probe(lambda messages, tools: _render(template, messages, tools, False, dict(variables)))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a chat, both of the same length. The mask is 1 on what the template
    marks with `{% generation %}`: the assistant's text, its tool calls and the end of its turn. Of
    templates without marks, `learned_chats` finds these.

    Special tokens written inside messages and `template_kwargs` are text. Raises DataError for a
    bad chat; ContextLengthError early for a long chat that has more than `limit` tokens.
    """
    text, spans = chat_text(tokenizer, messages, tools, add_generation_prompt, template_kwargs)
    if limit is not None and tokenizer.control_encoder.exceeds(text, limit):
        raise ContextLengthError(limit)
    return encode_spans(tokenizer, text, spans)


Spans = list[tuple[int, int]]


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, Spans]:
    """The chat as the model reads it, with the aliases of the template's control tokens, and the
    character ranges that the template marks. Raises DataError for a bad chat."""
    check_messages(messages)
    nonce = secrets.token_hex(16)
    pattern = tokenizer.special_pattern
    rendered, literals = _render_marked(
        tokenizer, messages, tools, add_generation_prompt, template_kwargs or {}, nonce
    )
    encoder = tokenizer.control_encoder
    text = ""
    spans: Spans = []
    generated_from: int | None = None  # start of the open generation block
    position = 0
    for match in _marks(pattern.pattern).finditer(rendered):
        control = match[0] in encoder.aliases
        if not control and not match[0].startswith(nonce):
            continue  # text that looks like a mark
        text += rendered[position : match.start()]
        position = match.end()
        kind = match[0].removeprefix(nonce)
        if control:  # of the template
            text += encoder.aliases[match[0]]
        elif kind == "S":
            generated_from = len(text)
        elif kind == "E":
            if generated_from is not None:
                spans.append((generated_from, len(text)))
            generated_from = None
        else:
            text += literals[int(kind[1:-1])]
    text += rendered[position:]
    if generated_from is not None:
        spans.append((generated_from, len(text)))
    refuse_surrogates(text)
    return text, spans


def encode_spans(tokenizer: Tokenizer, text: str, spans: Spans) -> tuple[list[int], list[int]]:
    """Ids of a text of `chat_text`, and a mask that is 1 on tokens which overlap a span, as in
    transformers."""
    generated = bytearray(len(text))
    for start, end in spans:
        generated[start:end] = b"\1" * (end - start)
    ids, offsets = tokenizer.control_encoder.encode(text)
    return ids, [int(generated.find(1, start, max(end, start + 1)) >= 0) for start, end in offsets]


def encode_control(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a template's own text: the names of control tokens in it are those tokens."""
    encoder = tokenizer.control_encoder
    aliased = tokenizer.special_pattern.sub(lambda match: encoder.aliases[match[0]], text)
    return encoder.encode(aliased)[0]


def _render_marked(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
    nonce: str,
) -> tuple[str, list[str]]:
    """The chat with marks around what is generated and in place of every name of a control token
    that a message holds; and these names.

    A template may look for such names, as for "</think>": it sees them, and those that it kept are
    found by a mark behind each in a second rendering. If its logic depends on the marks, so that
    the renderings have other names, it sees marks instead.
    """
    literals: list[str] = []
    pattern = tokenizer.special_pattern

    def render(mark: Any) -> str:
        literals.clear()

        def change(value: Any) -> Any:
            return _replace_strings(value, pattern, mark)

        return render_chat(
            tokenizer,
            [change(message) for message in messages],
            None if tools is None else [change(tool) for tool in tools],
            add_generation_prompt,
            template_kwargs={name: change(value) for name, value in template_kwargs.items()},
            start_mark=f"{nonce}S",
            end_mark=f"{nonce}E",
        )

    def replaced(match: re.Match[str]) -> str:
        literals.append(match[0])
        return f"{nonce}L{len(literals) - 1}."

    def followed(match: re.Match[str]) -> str:
        return match[0] + replaced(match)

    tagged = render(followed)
    if not literals:
        return tagged, literals
    of_message = re.compile(rf"({pattern.pattern})({nonce}L\d+\.)?")
    names = [(match[1], match[2]) for match in of_message.finditer(tagged)]
    plain = render(lambda match: match[0])
    if [name for name, _ in names] != pattern.findall(plain):
        return render(replaced), literals
    marks = iter(names)

    def restored(match: re.Match[str]) -> str:
        if next(marks)[1] is None:
            return match[0]
        return replaced(match)

    return pattern.sub(restored, plain), literals


@lru_cache(maxsize=4)
def _marks(special: str) -> re.Pattern[str]:
    """Control tokens and the marks of any nonce: compiled once, not for every chat. A mark after
    other hexadecimal digits is found too: it is exactly 32 of them before a letter that is not
    one."""
    return re.compile(rf"[0-9a-f]{{32}}(?:S|E|L\d+\.)|{special}")


def _replace_strings(value: Any, pattern: re.Pattern[str], mark: Any) -> Any:
    """`value` with every special-token name in its strings, keys included, replaced by a mark."""
    if isinstance(value, str):
        return pattern.sub(mark, value)
    if isinstance(value, dict):
        return {
            _replace_strings(key, pattern, mark): _replace_strings(item, pattern, mark)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replace_strings(item, pattern, mark) for item in value]
    return value
