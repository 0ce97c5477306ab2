"""Leaving out the oldest turns of a conversation that does not fit into the model's context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from khaosz.errors import ContextLengthError
from khaosz.inference.generator import Generator
from khaosz.serve.messages import Message
from khaosz.serve.schema import DEFAULT_MAX_TOKENS, ChatRequest
from khaosz.serve.tools import add_tools


def truncated(request: ChatRequest, generator: Generator) -> tuple[ChatRequest, int]:
    """The request with as many of its last turns as leave the answer its tokens, but no more than a
    quarter of the context; and how many messages are left out. With a knowledge base, half of the
    context is left for passages. Nothing is left out unless the request has `truncation: auto`."""
    if request.truncation != "auto":
        return request, 0
    room = prompt_room(request.token_limit, generator)
    if request.knowledge_base is not None:
        room = min(room, generator.context // 2)
    kwargs = request.template_kwargs(generator.thinking)
    kept, left_out = last_turns(request.messages, room, generator, request.allowed_tools, kwargs)
    return request.model_copy(update={"messages": kept}), left_out


def prompt_room(max_tokens: int | None, generator: Generator) -> int:
    """Tokens that a prompt may have where old turns are left out."""
    answer = max_tokens or DEFAULT_MAX_TOKENS
    return generator.context - min(answer, generator.context // 4)


def last_turns(
    messages: Sequence[Message],
    room: int,
    generator: Generator,
    tools: Sequence[dict[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Message], int]:
    """The leading system messages, and the last turns that fit into `room` tokens with them; and
    how many messages are left out. A turn starts at a user message; the last one always remains.

    Of many turns, several are left out at once: a prompt that loses one turn per question would
    never start like the one before, and the prefix cache could not be used."""
    head = next(
        (i for i, each in enumerate(messages) if each.role not in ("system", "developer")),
        len(messages),
    )
    cuts = [i for i, each in enumerate(messages) if each.role == "user"]
    if not cuts or cuts[0] > head:
        cuts.insert(0, head)

    def fits(cut: int) -> bool:
        rest = [each.for_template() for each in (*messages[:head], *messages[cut:])]
        prompt = add_tools(rest, tools, generator.tokenizer)
        try:
            ids = generator.chat_ids(*prompt, template_kwargs=template_kwargs, limit=room)
            return len(ids) <= room
        except ContextLengthError:
            return False

    first = _first(cuts[:-1], fits)
    step = _power_of_two((len(cuts) - first) // 4)
    cut = cuts[min(-(-first // step) * step, len(cuts) - 1)]
    return [*messages[:head], *messages[cut:]], cut - head


def _first(cuts: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Index of the first cut that fits, or their number. Most conversations fit as they are."""
    return 0 if cuts and fits(cuts[0]) else bisect_left(cuts, True, lo=min(1, len(cuts)), key=fits)


def _power_of_two(limit: int) -> int:
    return 1 << max(0, limit.bit_length() - 1)
