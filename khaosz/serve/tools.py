"""Tools: described to the model, by its template or in the system message, and forced by a
grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.messages import text_of_parts
from khaosz.errors import GenerationError
from khaosz.inference.grammar import check_schema
from khaosz.inference.parts import CALL, CALLED, FUNCTION, Calls
from khaosz.inference.xml_grammar import Form, function_rules

MAX_CALLS = 8  # of one answer that must call: a weak model would continue to its last token
# The space between JSON's tokens, bounded for the same reason.
_LAYOUT = {"whitespace_pattern": r"[ \n]{0,8}"}

# What Hermes models were trained with, for templates without tools
# (https://github.com/NousResearch/Hermes-Function-Calling).
_INTRODUCTION = """\
You may call one or more functions. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
For each call, return a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def call_format(tokenizer: Tokenizer) -> Calls:
    """How this model writes tool calls."""
    template = tokenizer.chat_template_for(tools=True) or ""
    if FUNCTION in template:
        return "functions"
    return "bare" if "tools" in template and CALL not in template else "marked"


def add_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools for the chat template. A template without tools would silently ignore
    them, so they become part of the system message, and earlier calls and their results become
    texts of the roles that every template has."""
    template = tokenizer.chat_template_for(tools or None) or ""
    if "tools" in template or (not tools and "tool_calls" in template):
        return list(messages), list(tools) or None
    turns = [_plain(message) for message in messages]
    if not tools:
        return turns, None
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines)
    if turns and turns[0]["role"] == "system":
        text = f"{text_of_parts(turns.pop(0)['content'])}\n\n{text}"
    return [{"role": "system", "content": text}, *turns], None


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        text = f"<tool_response>\n{text_of_parts(message['content'])}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    content = text_of_parts(message.get("content"))
    texts = [content] if content else []
    texts += [f"{CALL}\n{json.dumps(call, ensure_ascii=False)}\n{CALLED}" for call in calls]
    return {"role": "assistant", "content": "\n".join(texts)}


def call_grammar(
    tools: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    several: bool,
    or_else: str | None = None,
) -> str:
    """A Lark grammar, in llguidance's dialect, of calls of these tools and nothing else, unless the
    model may also answer with JSON of the schema `or_else`. Raises `GenerationError` for a schema
    that it cannot hold."""
    template, bare = tokenizer.chat_template_for(tools=True) or "", call_format(tokenizer) == "bare"
    attributes = FUNCTION in template
    xml = attributes or ("<function=" in template and not bare)
    form = Form(tags=not attributes, quote=lambda text: _quoted(text, tokenizer))
    key = "parameters" if bare else "arguments"
    json_bodies, xml_bodies, rules = [], [], []
    for i, tool in enumerate(tools):
        function, written = tool["function"], None
        schema = {"type": "object", **(function.get("parameters") or {})}
        try:
            if schema["type"] != "object":
                raise GenerationError("cannot be used: their type is not object")
            held = check_schema(schema, "lark")
            if xml:
                written = function_rules(f"f{i}", function["name"], schema, form, _LAYOUT)
        except GenerationError as error:
            if or_else is None:
                why = f"with the parameters of {function['name']!r} {error.reason}"
                raise GenerationError(why, param="lark", hint=error.hint) from None
            held = {"type": "object"}  # no call was asked for: as without a grammar
        if written is None:
            opening = f'{{"name": {json.dumps(function["name"])}, "{key}": '
            written = [
                f'f{i}: {json.dumps(opening)} a{i} "}}"',
                f"a{i}: %json {json.dumps({**held, 'x-guidance': _LAYOUT})}",
            ]
            json_bodies.append(f"f{i}")
        else:
            xml_bodies.append(f"f{i}")
        rules += written
    marked = json_bodies + ([] if attributes else xml_bodies)
    calls = xml_bodies if attributes else []
    if bare:
        calls = json_bodies
    elif marked:
        body = f"( {' | '.join(marked)} )"
        calls = [*calls, f'{form.quote(CALL)} "\\n" {body} "\\n" {form.quote(CALLED)}']
    gap = "" if attributes else '"\\n" '
    more = "" if bare or not several else f" ({gap}call){{0,{MAX_CALLS - 1}}}"
    start = [f"call{more}"]
    if or_else is not None:
        schema = check_schema(json.loads(or_else), "json_schema")
        # Some models forget the markers, and would be left with the text.
        start += [*([] if bare else json_bodies), "text"]
        rules.append(f"text: %json {json.dumps({**schema, 'x-guidance': _LAYOUT})}")
    return "\n".join([f"start: {' | '.join(start)}", f"call: {' | '.join(calls)}", *rules]) + "\n"


def _quoted(text: str, tokenizer: Tokenizer) -> str:
    """A text as grammar. A special token in it is written as that token only."""
    special = [name for name in tokenizer.special_ids if name in text]
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    parts = re.split(f"({names})", text) if special else [text]
    return " ".join(
        json.dumps(part) if part not in special else f"<[{tokenizer.special_ids[part]}]>"
        for part in parts
        if part
    )
