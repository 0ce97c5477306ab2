"""Tools: told to a model that may know no place for them, and forced by a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.inference.parts import CALL, CALLED, Calls

MAX_CALLS = 8  # of one answer that must call: a weak model would go on to its last token
_SPACE = r"[ \n]{0,8}"  # between JSON's tokens, bounded for the same reason

# What Hermes models were trained with, for templates without a place of their own for tools
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


def calls_of(tokenizer: Tokenizer) -> Calls:
    """How this model writes calls."""
    template = tokenizer.chat_template or ""
    return "bare" if "tools" in template and CALL not in template else "marked"


def introduced(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools for the chat template. One that knows no tools would leave them out in
    silence: there they are a part of the system message, and earlier calls and their answers are
    texts of the roles that every template has."""
    if not tools or "tools" in (tokenizer.chat_template or ""):
        return list(messages), list(tools) or None
    shown = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=shown)
    turns = [_plain(message) for message in messages]
    if turns and turns[0]["role"] == "system":
        text = f"{turns.pop(0)['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *turns], None


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    shown = [f"{CALL}\n{json.dumps(call, ensure_ascii=False)}\n{CALLED}" for call in calls]
    said = [message["content"]] if message["content"] else []
    return {"role": "assistant", "content": "\n".join([*said, *shown])}


def call_grammar(tools: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, several: bool) -> str:
    """A Lark grammar, as llguidance has it, of calls of these tools and nothing else."""
    bare = calls_of(tokenizer) == "bare"
    key = "parameters" if bare else "arguments"
    start = "call" if bare or not several else f'call ("\\n" call){{0,{MAX_CALLS - 1}}}'
    body = " | ".join(f"f{i}" for i in range(len(tools)))
    marks = _mark(CALL, tokenizer), _mark(CALLED, tokenizer)
    call = "body" if bare else f'{marks[0]} "\\n" body "\\n" {marks[1]}'
    rules = [f"start: {start}", f"call: {call}", f"body: {body}"]
    for i, tool in enumerate(tools):
        function = tool["function"]
        opening = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        schema = function.get("parameters") or {}
        form = {"type": "object", "x-guidance": {"whitespace_pattern": _SPACE}, **schema}
        rules.append(f'f{i}: {json.dumps(opening)} a{i} "}}"')
        rules.append(f"a{i}: %json {json.dumps(form)}")
    return "\n".join(rules) + "\n"


def _mark(text: str, tokenizer: Tokenizer) -> str:
    """A mark that is a token of its own is not spelled by others."""
    token = tokenizer.special_ids.get(text)
    return json.dumps(text) if token is None else f"<[{token}]>"
