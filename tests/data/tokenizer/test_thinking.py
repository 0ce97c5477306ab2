"""What a template does about thoughts. Each template here has the constructs of a public family."""

from __future__ import annotations

import pytest
from tiny_models import tokenizer

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_chat, encode_control, render_chat
from khaosz.data.tokenizer.thinking import thinking_of
from khaosz.errors import DataError

LOOP = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
KEPT = "{%- if m.reasoning_content %}{{- '<think>\\n' + m.reasoning_content + CLOSE }}{%- endif %}"
OFF = "{%- if enable_thinking is defined and enable_thinking is false %}"
EMPTY = "{{- '<think>\\n\\n</think>\\n\\n' }}"
PLAIN = LOOP + "{{- m.content + '<|im_end|>\\n' }}" + PROMPT + "{%- endif %}"
BODY = KEPT.replace("CLOSE", "'\\n</think>\\n\\n'") + "{{- m.content + '<|im_end|>\\n' }}"
TEMPLATES = {
    # Thoughts by default, which the model opens by itself.
    "qwen3": LOOP + BODY + PROMPT + OFF + EMPTY + "{%- endif %}{%- endif %}",
    # None by default; the prompt opens them, and earlier ones are dropped.
    "qwen3.5": LOOP + "{{- m.content + '<|im_end|>\\n' }}" + PROMPT
    + "{%- if enable_thinking is defined and enable_thinking is true %}{{- '<think>\\n' }}"
    + "{%- else %}" + EMPTY + "{%- endif %}{%- endif %}",
    # A word in the system message says it too.
    "smollm3": "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}"
    "{%- endif %}{{- '<|im_start|>system\\nReasoning Mode: ' }}"
    "{{- '/think' if enable_thinking else '/no_think' }}{{- '<|im_end|>\\n' }}"
    + LOOP + "{{- m.content + '<|im_end|>\\n' }}" + PROMPT
    + "{%- if not enable_thinking %}" + EMPTY + "{%- endif %}{%- endif %}",
    "granite": LOOP + BODY + PROMPT + "{%- if thinking %}{{- 'Think first.' }}"
    "{%- endif %}{%- endif %}",
    "r1": LOOP + "{{- m.content }}" + PROMPT + "{{- '<think>\\n' }}{%- endif %}",
    "effort": LOOP + KEPT.replace("CLOSE", "'</think>\\n'") + "{{- m.content }}" + PROMPT
    + "{{- 'Effort: ' + (reasoning_effort or 'medium') }}{%- endif %}",
    "qwen2.5": PLAIN,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "switch", "close"),
    [
        ("qwen3", "switch_on", "enable_thinking", "\n</think>\n\n"),
        ("qwen3.5", "switch_off", "enable_thinking", "\n</think>\n\n"),
        ("smollm3", "switch_on", "enable_thinking", "\n</think>\n\n"),
        ("granite", "switch_off", "thinking", "\n</think>\n\n"),
        ("r1", "always", None, "\n</think>\n\n"),
        ("effort", "none", None, "</think>\n"),
        ("qwen2.5", "none", None, "\n</think>\n\n"),
    ],
)
def test_what_a_template_does(name: str, kind: str, switch: str | None, close: str) -> None:
    thinking = thinking_of(TEMPLATES[name], {})
    assert (thinking.kind, thinking.switch, thinking.close) == (kind, switch, close)
    assert thinking.efforts == (name == "effort")


def test_a_broken_template_is_none() -> None:
    assert thinking_of("{{- raise_exception('no') }}{{ enable_thinking }}", {}).kind == "none"
    assert thinking_of("{% broken", {}).kind == thinking_of(None, {}).kind == "none"


def test_the_switch_has_the_templates_name() -> None:
    granite = thinking_of(TEMPLATES["granite"], {})
    assert granite.template_kwargs(None, True) == {"thinking": True}
    asked = {"enable_thinking": False, "documents": []}
    assert granite.template_kwargs(asked, True) == {**asked, "thinking": False}
    assert granite.template_kwargs(None, None) == {}


@pytest.fixture
def ours() -> Tokenizer:
    return tokenizer()


def _with(template: str, by: Tokenizer) -> Tokenizer:
    return Tokenizer(by.serialized, {**by.config, "chat_template": template})


def test_variables_reach_the_template(ours: Tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}]
    by = _with(TEMPLATES["qwen3"], ours)
    on = render_chat(by, chat, None, True)
    off = render_chat(by, chat, None, True, template_kwargs={"enable_thinking": False})
    assert off == on + "<think>\n\n</think>\n\n"
    ids, _ = encode_chat(by, chat, None, True, template_kwargs={"enable_thinking": False})
    assert by.decode(ids) == off


def test_reserved_variables_are_refused(ours: Tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}]
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "chat_template"):
        with pytest.raises(DataError, match=f"chat_template_kwargs: {name} is set by the chat"):
            render_chat(ours, chat, template_kwargs={name: "x"})


def test_control_tokens_in_variables_are_text(ours: Tokenizer) -> None:
    """A caller cannot write a turn of its own through a variable that the template prints."""
    by = _with("{{- note }}{%- for m in messages %}{{- m.content }}{%- endfor %}", ours)
    end = by.special_ids["<|end|>"]
    ids, _ = encode_chat(
        by, [{"role": "user", "content": "x"}], template_kwargs={"note": "<|end|>"}
    )
    assert end not in ids and by.decode(ids) == "<|end|>x"
    assert encode_control(by, "<|end|>x")[0] == end
