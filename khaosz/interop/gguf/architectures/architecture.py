"""What llama.cpp says of a family: `general.architecture`, its keys, its names of tensors
(gguf-py/gguf/constants.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Change, Layout, Values
from khaosz.interop.gguf.file import GgufFile

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "attention_output_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp_output_norm": "post_ffw_norm",
}
# Of all experts of a layer.
_STACKED = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
}
# The class logits of rerankers.
RERANK_HEAD = "cls.output.weight"
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class Keys:
    """The metadata of one file under an architecture's prefix. Every method raises `ModelError` for
    a value of another kind, and for a key that is missing and has no default."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file, self.prefix, self.source = file, prefix, file.source

    def value(self, name: str, kind: type, default: Any = None) -> Any:
        entry = self.file.metadata.get(f"{self.prefix}.{name}", default)
        if entry is None:
            raise ModelError(f"{self.source}: key '{self.prefix}.{name}' is missing")
        # Integers may stand for floats; arrays, of one number per layer, are not supported.
        if type(entry) is not kind and (kind, type(entry)) != (float, int):
            what = _KINDS[kind]
            raise ModelError(f"{self.source}: {self.prefix}.{name} = {quoted(entry)} is not {what}")
        return entry

    def number(self, name: str, default: float | None = None) -> float:
        with np.errstate(over="ignore"):
            # Stored in fp32: 1e-6 must become 1e-6 again, not 9.99999997e-07.
            return float(str(np.float32(self.value(name, float, default))))

    def counts(self, name: str, length: int) -> list[int]:
        """One for each of `length` layers, or one for all."""
        entry = self.file.metadata.get(f"{self.prefix}.{name}")
        if not isinstance(entry, np.ndarray):
            return [self.count(name)] * length
        if len(entry) != length or entry.dtype.kind not in "iu":
            key = f"{self.prefix}.{name}"
            raise ModelError(f"{self.source}: {key} is not one whole number for each of {length}")
        return [int(count) for count in entry]

    def count(self, name: str, default: int | None = None) -> int:
        whole: int = self.value(name, int, default)
        return whole


def gguf_layout(
    fused: Mapping[str, tuple[str, ...]] | None = None,
    parts: Mapping[str, str] | None = None,
    changes: Mapping[str, Change] | None = None,
    top: Mapping[str, str] | None = None,
) -> Layout:
    return Layout(
        {**_TOP, **(top or {})},
        "blk.{}",
        {**PARTS, **(parts or {})},
        fused or {},
        _STACKED,
        changes or {},
    )


Order = tuple[np.ndarray | None, np.ndarray | None]  # of rows and of columns


@dataclass(frozen=True)
class Architecture:
    """A `general.architecture`.

    family     `model_type` of the models that it has
    paired     rows of queries and keys are stored in pairs (i, i + 1) for llama.cpp's rotation,
               where we have halves (i, i + H/2)
    read       fields of `ModelConfig` from its own keys, and the context before a scaling
    write      its own keys; raises `ModelError` for what they cannot say
    tensors    what its file has beside parameters
    own        keys and tensors that `read` takes, which would be refused otherwise
    left_out   beginnings of names of tensors that are not read
    order      where rows, or columns, of a parameter are stored in another order: for each of ours
               the number of the stored one
    """

    family: str
    paired: bool = False
    read: Callable[[Keys], Values] = lambda _: {}
    write: Callable[[ModelConfig], Values] = lambda _: {}
    tensors: Callable[[ModelConfig], dict[str, np.ndarray]] = lambda _: {}
    own: frozenset[str] = frozenset()
    left_out: Callable[[Keys], tuple[str, ...]] = lambda _: ()
    order: Callable[[str, ModelConfig], Order] = lambda _name, _config: (None, None)
    layout: Layout = field(default_factory=gguf_layout)

    def reordered(self, name: str, config: ModelConfig) -> Order:
        """`order` of a parameter, and that of rows which are stored in pairs."""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if not self.paired or not name.startswith("layers.") or name.split(".")[3] not in heads:
            return self.order(name, config)
        count = heads[name.split(".")[3]]
        pairs = np.arange(count * config.head_dim).reshape(count, -1, 2)
        return pairs.swapaxes(1, 2).ravel(), None
