"""Tools: described to the model, by its template or in the system message, and forced by a
grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.messages import text_of_parts
from khaosz.errors import GenerationError
from khaosz.inference.grammar import check_schema
from khaosz.inference.parts import CALL, CALLED, FUNCTION, Calls

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
    bare = call_format(tokenizer) == "bare"
    key = "parameters" if bare else "arguments"
    start = "call" if bare or not several else f'call ("\\n" call){{0,{MAX_CALLS - 1}}}'
    body = " | ".join(f"f{i}" for i in range(len(tools)))
    markers = _marker(CALL, tokenizer), _marker(CALLED, tokenizer)
    call = "body" if bare else f'{markers[0]} "\\n" body "\\n" {markers[1]}'
    rules = [f"start: {start}", f"call: {call}", f"body: {body}"]
    if or_else is not None:
        schema = check_schema(json.loads(or_else), "json_schema")
        # Some models forget the markers, and would be left with the text.
        rules[0] += " | text" if bare else " | body | text"
        rules.append(f"text: %json {json.dumps({**schema, 'x-guidance': _LAYOUT})}")
    for i, tool in enumerate(tools):
        function = tool["function"]
        opening = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        schema = {"type": "object", **(function.get("parameters") or {})}
        try:
            if schema["type"] != "object":
                raise GenerationError("cannot be used: their type is not object")
            schema = check_schema(schema, "lark")
        except GenerationError as error:
            if or_else is None:
                why = f"with the parameters of {function['name']!r} {error.reason}"
                raise GenerationError(why, param="lark", hint=error.hint) from None
            schema = {"type": "object"}  # no call was asked for: as without a grammar
        schema = {**schema, "x-guidance": _LAYOUT}
        rules.append(f'f{i}: {json.dumps(opening)} a{i} "}}"')
        rules.append(f"a{i}: %json {json.dumps(schema)}")
    return "\n".join(rules) + "\n"


def _marker(text: str, tokenizer: Tokenizer) -> str:
    """A marker that is a token of its own is written as that token only."""
    token = tokenizer.special_ids.get(text)
    return json.dumps(text) if token is None else f"<[{token}]>"
