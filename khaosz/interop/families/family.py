"""What a file format says of a family of models: its features, its keys, its names of parameters.

A family is an entry of the table in `__init__.py` here (config.json and safetensors) and one of
the table of GGUF architectures; what it computes follows from `ModelConfig` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from khaosz.config import ModelConfig

Values = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A parameter that is stored as another number: `read` of a stored tensor is ours."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


ONE_PLUS = Change(lambda weight: weight + 1, lambda weight: weight - 1)


@dataclass(frozen=True)
class Stored:
    """Where a parameter is: in `count` rows of a tensor from row `first` on. `experts`: of how
    many the tensor holds as many rows, as its first axis; 0 without that axis."""

    name: str
    first: int
    count: int
    change: Change | None = None
    experts: int = 0


_EXPERT = re.compile(r"mlp\.experts\.(?P<number>\d+)\.(?P<layer>\w+)")
_SHARED = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")


@dataclass(frozen=True)
class Layout:
    """Names of parameters in a format.

    top        of those outside blocks, by ours without ".weight"
    block      the prefix of a block's, with its number
    parts      of those in a block, by ours without ".weight" or else in full; a name that is left
               out is the same
    fused      tensors that hold several of ours, one below the other
    stacked    the same of linear layers of an expert, for all experts: (experts, rows, columns)
    changes    of parts that are stored as other numbers; "norm" for the last norm
    """

    top: Mapping[str, str]
    block: str
    parts: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)

    def stored(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
        """The place of each parameter, by our names."""
        return {name: self._place(name, shapes) for name in shapes}

    def unread(self, config: ModelConfig) -> set[str]:
        """Tensors that a file may have of layers that read the keys and values of others."""
        layers = [i for i in range(config.num_hidden_layers) if config.kv_layer(i) != i]
        parts = [self.parts.get(name, name) for name in _SHARED]
        return {f"{self.block.format(i)}.{part}.weight" for i in layers for part in parts}

    def _place(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Stored:
        stem, _, kind = name.rpartition(".")
        rows = shapes[name][0]
        if not stem.startswith("layers."):
            return Stored(f"{self.top.get(stem, stem)}.{kind}", 0, rows, self.changes.get(stem))
        _, index, whole = name.split(".", 2)
        part = whole.removesuffix(f".{kind}")
        prefix, change = self.block.format(index), self.changes.get(part, self.changes.get(whole))
        if whole in self.parts:
            return Stored(f"{prefix}.{self.parts[whole]}", 0, rows, change)
        if self.stacked and (match := _EXPERT.fullmatch(part)):
            return self._stacked(index, int(match["number"]), match["layer"], shapes)
        for tensor, members in self.fused.items():
            if part in members:
                before = members[: members.index(part)]
                first = sum(shapes[f"layers.{index}.{other}.{kind}"][0] for other in before)
                return Stored(f"{prefix}.{tensor}.{kind}", first, rows, change)
        return Stored(f"{prefix}.{self.parts.get(part, part)}.{kind}", 0, rows, change)

    def _stacked(
        self, index: str, expert: int, layer: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> Stored:
        experts = shapes[f"layers.{index}.mlp.gate.weight"][0]
        prefix = f"layers.{index}.mlp.experts.{expert}"
        [(tensor, members)] = [item for item in self.stacked.items() if layer in item[1]]
        rows = [shapes[f"{prefix}.{other}.weight"][0] for other in members]
        place = members.index(layer)
        first = expert * sum(rows) + sum(rows[:place])
        name = f"{self.block.format(index)}.{tensor}.weight"
        return Stored(name, first, rows[place], experts=experts)


def stored_shape(
    stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> tuple[int, ...]:
    """The shape of a tensor that holds parameters, by our names."""
    rows, experts = sum(stored[name].count for name in names), stored[names[0]].experts
    first = (experts, rows // experts) if experts else (rows,)
    return *first, *shapes[names[0]][1:]


def tensors(stored: Mapping[str, Stored]) -> dict[str, list[str]]:
    """Our parameters in each tensor of a file, in the order of their rows."""
    groups: dict[str, list[str]] = {}
    for name, place in stored.items():
        groups.setdefault(place.name, []).append(name)
    return {tensor: sorted(n, key=lambda name: stored[name].first) for tensor, n in groups.items()}


@dataclass(frozen=True)
class Family:
    """A family in Hugging Face directories: its class in transformers, and what differs there.

    always, sometimes   the features of `ModelConfig` that it has
    defaults            what transformers takes for keys that are missing
    extra               keys that are written and mean nothing here
    read                fields of `ModelConfig` from config.json, named as its source; removes the
                        keys that it used
    write               adds keys of config.json for fields that have no common key
    suits               whether the features have values that the family can have
    left_out            beginnings of names of tensors that are not read
    """

    name: str
    always: frozenset[str] = frozenset()
    sometimes: frozenset[str] = frozenset()
    defaults: Values = field(default_factory=dict)
    extra: Values = field(default_factory=dict)
    read: Callable[[Values, str], Values] = lambda _values, _source: {}
    write: Callable[[ModelConfig, Values], None] = lambda _config, _values: None
    suits: Callable[[ModelConfig], bool] = lambda _: True
    layout: Layout = field(default_factory=lambda: hf_layout())
    left_out: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return f"{self.name}ForCausalLM"

    @property
    def reward_architecture(self) -> str:
        return f"{self.name}ForSequenceClassification"

    def has(self, config: ModelConfig) -> bool:
        """Whether the family computes what a configuration says."""
        known = self.always <= config.features <= self.always | self.sometimes
        return known and self.suits(config)


def hf_layout(
    parts: Mapping[str, str] | None = None,
    fused: Mapping[str, tuple[str, ...]] | None = None,
    changes: Mapping[str, Change] | None = None,
    top: Mapping[str, str] | None = None,
    stacked: Mapping[str, tuple[str, ...]] | None = None,
) -> Layout:
    names = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", **(top or {})}
    return Layout(names, "model.layers.{}", parts or {}, fused or {}, stacked or {}, changes or {})
