"""`config.json` of Hugging Face model directories, in and out.

A feature that is not supported is rejected by name, never ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from khaosz.config import ModelConfig, RopeScaling
from khaosz.config.model_config import FEATURES
from khaosz.errors import ConfigError, ModelError, one_line, quoted
from khaosz.interop.families import FAMILIES, WITH_IMAGES
from khaosz.interop.families.family import Family
from khaosz.model.rotary import rotary_frequencies

# Names of one setting. transformers takes the first that is given, and for some of them a default.
_SPELLINGS = (("dtype", "torch_dtype"), ("hidden_act", "hidden_activation"))


def read_family(directory: Path) -> Family:
    """The family that a directory's config.json names."""
    return FAMILIES[text_values(read_json(directory / "config.json"))["model_type"]]


def text_values(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of the text model in a config.json."""
    name, text = values.get("model_type"), values.get("text_config")
    if not isinstance(name, str) or name not in WITH_IMAGES or not isinstance(text, dict):
        return values
    tied = "tie_word_embeddings"
    outer = {tied: values[tied]} if tied in values else {}
    return {"model_type": WITH_IMAGES[name], **text, **outer}


def load_config(directory: Path) -> ModelConfig:
    """The `ModelConfig` in a directory's config.json; raises `ModelError`."""
    path = directory / "config.json"
    if not path.exists():
        what = "model directory not found" if not directory.exists() else "no config.json"
        raise ModelError(f"{directory}: {what}", hint="name a directory that training wrote")
    return config_from_hf(read_json(path), str(path))


def read_json(path: Path, kind: type = dict) -> Any:
    """The value in a JSON file. Raises `ModelError` unless it is a `kind`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, too
        raise ModelError(f"{path}: not valid JSON: {one_line(str(error))}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(value, kind):
        expected = "list" if kind is list else "JSON object"
        raise ModelError(f"{path}: holds a {type(value).__name__}, not a {expected}")
    return value


def check_rotary(config: ModelConfig, source: str) -> None:
    """Raises `ModelError` for rotary settings, each in its range, that are invalid together."""
    try:
        frequencies, amplitude = rotary_frequencies(config)
    except (ArithmeticError, ValueError) as error:
        raise ModelError(f"{source}: its rotary settings cannot be computed: {error}") from None
    if not torch.isfinite(frequencies * amplitude).all():
        raise ModelError(f"{source}: its rotary settings give frequencies that are not finite")


def model_type(config: ModelConfig) -> str:
    """The family of a model, by its name in config.json, such as "llama". Raises `ModelError` where
    no family has all of its features."""
    for name, family in FAMILIES.items():
        if family.has(config):
            return name
    features = ", ".join(sorted(config.features))
    raise ModelError(f"no model family of transformers has the features {features} together")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a `ModelConfig`; raises `ModelError` as `model_type` does."""
    name = model_type(config)
    family = FAMILIES[name]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    values |= family.extra
    if config.rope_scaling is not None:
        # Readers before transformers 5 look for `rope_scaling`; later ones take it too.
        values["rope_scaling"] = _scaling_to_hf(config.rope_scaling)
    values |= config.model_dump(exclude={*FEATURES, "sliding_window", "rope_scaling"})
    family.write(config, values)
    return values


def config_from_hf(values: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """`ModelConfig` of a config.json; raises `ModelError` for what is not supported."""
    values = text_values(values)
    name = values.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError(
            f"{source}: model_type {quoted(name)} is not supported",
            hint=f"supported: {', '.join(FAMILIES)}",
        )
    values = {**family.defaults, **values}
    try:
        own = family.read(values, source)
    except (ArithmeticError, TypeError) as error:  # numbers out of range, a text for a table
        raise ModelError(f"{source}: not settings of {name}: {one_line(str(error))}") from None
    for names in _SPELLINGS:
        same_value({name: values.get(name) for name in names}, source)
    for key, harmless in {
        "hidden_act": ("silu", "swish"),
        "hidden_activation": (None, "silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "text_config": (None,),
    }.items():
        if values.get(key, harmless[0]) not in harmless:
            raise ModelError(f"{source}: {key}={quoted(values[key])} is not supported")
    layers = values.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ModelError(f"{source}: layer_types other than full_attention are not supported")
    context = values.get("max_position_embeddings")
    heads, head_dim = values.get("num_attention_heads"), values.get("head_dim")
    if head_dim is None:
        head_dim = family.defaults.get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(values.get("hidden_size"), int):
        head_dim = values["hidden_size"] // max(1, heads)
    groups = values.get("num_key_value_heads")
    theta, part, scaling = _read_rope(values, context, source)
    if part != 1.0 and "partial_rotary_factor" not in family.always | family.sometimes:
        raise ModelError(f"{source}: partial_rotary_factor={quoted(part)} is not supported")
    try:
        if scaling is not None:
            scaling = RopeScaling.parse(scaling, source=f"{source}: rope_scaling")
        return ModelConfig.parse(
            {
                "vocab_size": values.get("vocab_size"),
                "hidden_size": values.get("hidden_size"),
                "intermediate_size": values.get("intermediate_size"),
                "num_hidden_layers": values.get("num_hidden_layers"),
                "num_attention_heads": heads,
                "num_key_value_heads": heads if groups is None else groups,
                "head_dim": head_dim,
                "max_position_embeddings": context,
                "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
                "rope_theta": theta,
                "rope_scaling": scaling,
                "tie_word_embeddings": values.get("tie_word_embeddings", False),
                "partial_rotary_factor": part,
                "initializer_range": values.get("initializer_range", 0.02),
                **own,
            },
            source=source,
        )
    except ConfigError as error:
        raise ModelError(one_line(str(error)), hint=error.hint) from None


def _read_rope(values: dict[str, Any], context: Any, source: str) -> tuple[Any, Any, Any]:
    """The base, the part of a head that is rotated, and the keys of the scaling, None if there is
    none.

    They stand in `rope_parameters` (transformers 5), `rope_scaling` (before) or beside them, the
    type as "rope_type" or "type". Of two tables transformers reads `rope_scaling` alone, so
    `rope_parameters` may hold nothing that is not there. Raises `ModelError` for a contradiction,
    naming both places, and for a scaling that is not supported or only in part given.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        table = values.get(name) or {}
        if not isinstance(table, dict):
            raise ModelError(f"{source}: {name}={quoted(table)} is not a table")
        given = {f"{name}.{key}": value for key, value in table.items() if value is not None}
        kind = same_value(
            {key: given.pop(key, None) for key in (f"{name}.rope_type", f"{name}.type")}, source
        )
        given = {key.partition(".")[2]: value for key, value in given.items()}
        if given or kind is not None:
            tables[name] = {"rope_type": "default" if kind is None else kind, **given}
    rope = dict(next(iter(tables.values()), {"rope_type": "default"}))
    if len(tables) == 2:
        older, newer = tables["rope_scaling"], dict(tables["rope_parameters"])
        if newer["rope_type"] == "default":  # as transformers 5 writes it
            newer.pop("rope_type")
        theta = values.get("rope_theta")
        used = {"rope_theta": 10_000.0 if theta is None else theta, **older}
        for key, value in newer.items():
            same_value(
                {f"rope_scaling.{key}": older.get(key), f"rope_parameters.{key}": value}, source
            )
            if used.get(key) != value:
                raise ModelError(
                    f"{source}: rope_parameters.{one_line(key)}={quoted(value)} is absent from"
                    " rope_scaling, and of the two transformers reads rope_scaling alone",
                    hint=f"write {one_line(key)} into rope_scaling as well",
                )
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        places = {
            f"{next(iter(tables), 'rope_parameters')}.{key}": rope.get(key),
            key: values.get(key),
        }
        if (value := same_value(places, source)) is not None:
            rope[key] = value
    theta, part = rope.pop("rope_theta", 10_000.0), rope.pop("partial_rotary_factor", 1.0)
    kind = rope["rope_type"]
    if kind == "default":
        rope = {key: value for key, value in rope.items() if (key, value) != ("factor", 1.0)}
        left = sorted(rope.keys() - {"rope_type", "original_max_position_embeddings"})
        if left:
            raise ModelError(
                f"{source}: {one_line(left[0])}={quoted(rope[left[0]])} without a rope_type",
                hint="name the kind of scaling as rope_type: linear, llama3 or yarn",
            )
        return theta, part, None
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", context)
        if not {"low_freq_factor", "high_freq_factor"} <= rope.keys():
            what = "llama3 scaling requires low_freq_factor and high_freq_factor"
            raise ModelError(f"{source}: {what}")
    return theta, part, rope


def same_value(places: dict[str, Any], source: str) -> Any:
    """The value of a setting that may stand in several places; None if it stands in none. Raises
    `ModelError` where they contradict each other."""
    given = [(place, value) for place, value in places.items() if value is not None]
    for place, value in given[1:]:
        if value != given[0][1]:
            raise ModelError(
                f"{source}: {one_line(given[0][0])}={quoted(given[0][1])} contradicts"
                f" {one_line(place)}={quoted(value)}",
                hint="write the setting once, or the same value in both places",
            )
    return given[0][1] if given else None


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """The keys of one scaling, defaults included: transformers has none for llama3's."""
    names = {"rope_type", "factor"}
    if scaling.rope_type != "linear":
        names.add("original_max_position_embeddings")
    if scaling.rope_type == "llama3":
        names |= {"low_freq_factor", "high_freq_factor"}
    elif scaling.rope_type == "yarn":
        names |= {"beta_fast", "beta_slow", "attention_factor", "truncate"}
    elif scaling.rope_type == "longrope":
        names |= {"short_factor", "long_factor", "attention_factor"}
    return scaling.model_dump(include=names, exclude_none=True)
