"""What fine-tuning learns of a chat, with any chat template.

Where the template has `{% generation %}` markers, they say it. Otherwise it is found by rendering
turn by turn: of the chat that ends with an assistant turn, learned is what follows the prompt that
the model would get for this turn, to the first token that ends a turn:

    render(messages[:i], add_generation_prompt)   the prompt
    render(messages[:i + 1])                      prompt, text, end of turn, and what may follow

A template may render a turn differently once others follow it: thoughts are removed from history,
tools stand before the last question. The model is asked for each turn with the history of its time,
so such a chat becomes several texts, each with the turns that it renders as they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from khaosz.data.records.chat import weighted_mask
from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import Spans, chat_text, encode_spans
from khaosz.data.tokenizer.messages import text_of_parts
from khaosz.errors import DataError

_HINT = "mark the assistant's text with {% generation %} and {% endgeneration %} in the template"


@dataclass
class _Text:
    text: str
    spans: Spans = field(default_factory=list)
    end: int = 0  # of its last turn, learned or not


def learned_chats(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    weights: list[int] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Ids and loss mask of each text that a chat becomes: one in most templates. `weights`: of each
    assistant turn, 0 for one that is not learned.

    Raises DataError for a chat that the template refuses, and with the number of the turn where it
    is not well defined what the assistant says.
    """
    whole, marked = chat_text(tokenizer, messages, tools, False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marked or not turns:
        ids, mask = encode_spans(tokenizer, whole, marked)
        return [(ids, weighted_mask(mask, weights))]
    texts: list[_Text] = []
    for i, weight in zip(turns, weights or [1] * len(turns), strict=True):
        text, span = _turn(tokenizer, messages, tools, i, whole)
        if texts and text.startswith(texts[-1].text[: texts[-1].end]):
            texts[-1].text = text
        else:  # the turns before are no longer rendered as they were asked for
            texts.append(_Text(text))
        texts[-1].end = span[1]
        texts[-1].spans += [span] * weight
    return [encode_spans(tokenizer, each.text, each.spans) for each in texts if each.spans]


def _turn(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    i: int,
    whole: str,
) -> tuple[str, tuple[int, int]]:
    """The chat to the end of turn `i`, and the character range of what the assistant says there."""
    if not i:
        raise DataError("turn 1: the chat begins with the assistant's answer", hint=_HINT)
    if i < len(messages) - 1:
        whole = chat_text(tokenizer, messages[: i + 1], tools, False)[0]
    prompt = chat_text(tokenizer, messages[:i], tools, True)[0]
    start = _shared(prompt, whole)
    if start < len(prompt):
        # The prompt says more than history does ("<think>"), or the template merges turns: the two
        # must part where the text begins.
        said = text_of_parts(messages[i].get("content")).strip()
        if not said or not whole[start:].lstrip().startswith(said):
            raise DataError(
                f"turn {i + 1}: the chat template renders what stands before the answer otherwise"
                " than the prompt for it, so what the assistant says is not well defined",
                hint=_HINT,
            )
    end = _end_of_turn(tokenizer, whole, start)
    if end == start:
        raise DataError(f"turn {i + 1}: the chat template renders nothing of the answer")
    return whole, (start, end)


def _shared(one: str, other: str) -> int:
    """Characters at the start that two texts have in common."""
    if other.startswith(one):
        return len(one)
    return next(i for i, char in enumerate(one) if other[i : i + 1] != char)


def _end_of_turn(tokenizer: Tokenizer, text: str, start: int) -> int:
    """Behind the first token of the template from `start` on that ends a turn; the end of the text
    where there is none."""
    aliases = tokenizer.control_encoder.aliases
    ends = [aliases[n] for n, i in tokenizer.special_ids.items() if i in tokenizer.end_ids]
    places = [at + len(end) for end in ends if (at := text.find(end, start)) >= 0]
    return min(places, default=len(text))
