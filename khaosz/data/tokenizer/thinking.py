"""Whether a model's answers may begin with thoughts, by its chat template, and how to switch them.

A template is asked by rendering short chats with and without the variables that templates use:
`enable_thinking` (Qwen3, Qwen3.5, SmolLM3, MiniCPM5, Hunyuan, Gemma 4) or `thinking` (Granite,
DeepSeek), and `reasoning_effort`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from khaosz.data.tokenizer.chat import render_template
from khaosz.errors import DataError

THINK, THOUGHT = "<think>", "</think>"
SWITCHES = ("enable_thinking", "thinking")
ThinkingKind = Literal["switch_on", "switch_off", "always", "none"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_USER = {"role": "user", "content": "?"}
_INSIDE, _AFTER = "zq7thoughts", "zq7answer"
_CLOSE = f"\n{THOUGHT}\n\n"


@dataclass(frozen=True)
class Thinking:
    """`kind`: thoughts can be switched, and are on or off by default; every answer has them; or
    the template knows none. `switch`: the variable, None where there is none. `efforts`: whether
    the template reads reasoning_effort. `close`: what it writes between thoughts and answer."""

    kind: ThinkingKind = "none"
    switch: str | None = None
    efforts: bool = False
    close: str = _CLOSE

    def template_kwargs(
        self, given: Mapping[str, Any] | None, enable: bool | None, effort: str | None = None
    ) -> dict[str, Any]:
        """Variables for the template: those that are `given`, which win, and the switch in this
        template's own name. `enable` and `effort` are None where the request does not say."""
        kwargs = dict(given or {})
        for name in SWITCHES:
            if isinstance(kwargs.get(name), bool):
                enable = kwargs[name]
        if enable is not None:
            kwargs.setdefault(self.switch or SWITCHES[0], enable)
        if effort is not None and effort != "none":
            kwargs.setdefault("reasoning_effort", effort)
        return kwargs


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends by opening the reasoning, as with some templates."""
    return prompt.rstrip().endswith(THINK)


def thinking_of(template: str | None, variables: Mapping[str, str]) -> Thinking:
    """What a template does; `variables` are `Tokenizer.template_variables`."""
    if template is None:
        return Thinking()
    return _thinking_of(template, tuple(sorted(variables.items())))


@lru_cache(maxsize=16)
def _thinking_of(template: str, variables: tuple[tuple[str, str], ...]) -> Thinking:
    def prompt(**kwargs: Any) -> str | None:
        try:
            return render_template(template, [_USER], True, {**dict(variables), **kwargs})
        except DataError:
            return None

    efforts = "reasoning_effort" in template
    plain = prompt()
    for switch in SWITCHES:
        if switch not in template:
            continue
        on, off = prompt(**{switch: True}), prompt(**{switch: False})
        if on is None or off is None or on == off:
            continue
        kind: ThinkingKind = "switch_off" if plain == off else "switch_on"
        return Thinking(kind, switch, efforts, _closing(template, variables, on, off))
    if plain is not None and opens_thought(plain):
        return Thinking("always", None, efforts, _closing(template, variables, plain, plain))
    return Thinking("none", None, efforts, _closing(template, variables, "", ""))


def _closing(template: str, variables: tuple[tuple[str, str], ...], on: str, off: str) -> str:
    """The text between thoughts and answer: that of an earlier answer or, with templates that drop
    earlier thoughts, of a prompt that has none."""
    turn = {"role": "assistant", "reasoning_content": _INSIDE, "thinking": _INSIDE}
    messages = [_USER, {**turn, "content": _AFTER}]
    try:
        text = render_template(template, messages, False, dict(variables))
    except DataError:
        text = ""
    start, end = text.find(_INSIDE), text.find(_AFTER)
    candidates = [text[start + len(_INSIDE) : end]] if 0 <= start < end else []
    if opens_thought(on) and off.startswith(on):
        candidates.append(off.removeprefix(on))
    candidates.append(off.rpartition(THINK)[2].removeprefix("\n"))  # that follows the marker
    return next((each for each in candidates if THOUGHT in each), _CLOSE)
