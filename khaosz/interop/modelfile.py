"""Write an Ollama Modelfile for an exported .gguf: `ollama create NAME -f Modelfile`.

Formats: https://docs.ollama.com/modelfile and https://docs.ollama.com/template
"""

from __future__ import annotations

from pathlib import Path

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat_template import OWN_TEMPLATES
from khaosz.files import write_atomic

# Go templates for CHAT_TEMPLATE and ChatML, without tools. Ollama adds the begin token itself and
# joins the `system` messages into .System (template/template.go, `collate`).
_TEMPLATE = (
    "{{- if .System }}<|system|>{{ .System }}<|end|>{{ end }}"
    "{{- range .Messages }}"
    '{{- if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
    '{{- else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>'
    "{{- end }}{{- end }}<|assistant|>"
)
_CHATML = (
    "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    '{{- range .Messages }}{{- if ne .Role "system" }}'
    "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"
    "<|im_start|>assistant\n"
)


def write_modelfile(gguf: Path, tokenizer: Tokenizer, context: int) -> Path | None:
    """Write `Modelfile` next to `gguf` for our template or ChatML. For others, which Ollama reads
    from the .gguf, nothing is written and None is returned."""
    template = tokenizer.chat_template
    if template in OWN_TEMPLATES:
        go = _TEMPLATE
    elif template is not None and "<|im_start|>" in template:
        go = _CHATML
    else:
        return None
    names = [name for name, i in tokenizer.special_ids.items() if i in tokenizer.end_ids]
    lines = [
        f"FROM ./{gguf.name}",
        f'TEMPLATE """{go}"""',
        f"PARAMETER num_ctx {context}",
        *(f'PARAMETER stop "{name}"' for name in sorted(names)),
    ]
    path = gguf.with_name("Modelfile")
    write_atomic(path, [f"{line}\n".encode() for line in lines])
    return path
