"""Read and write LoRA adapters in PEFT's layout: adapter_config.json, adapter_model.safetensors.

PEFT loads what we write. Of its own options (https://huggingface.co/docs/peft, `LoraConfig`) we
load plain LoRA on the linear layers; an unsupported option is rejected by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from khaosz.config import EXPERT_TARGETS, LoRAConfig, ModelConfig
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ConfigError, ModelError, one_line, quoted
from khaosz.files import atomic_path, sync, write_json
from khaosz.interop.families import FAMILIES
from khaosz.interop.families.family import tensors as stored_tensors
from khaosz.interop.huggingface_config import read_json
from khaosz.interop.models import ModelSource, open_model, open_tokenizer, write_served
from khaosz.interop.sampling import recommended_sampling
from khaosz.model import RewardModel, Transformer, parameter_shapes, parameters_fingerprint
from khaosz.model.lora import adapter_state, add_lora, merged_weight, named_adapters, target_of

LoRABase = Literal["fp32", "int8", "file"]
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base_model.json"
_PREFIX = "base_model.model.model."  # PEFT's two wrappers, then transformers' own "model."
_OURS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
# Options that are read, or have no effect after initialisation; every other option must be off.
_READ = {*_OURS, "peft_type", "target_modules", "base_model_name_or_path", "revision"}
_READ |= {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size"}
_ALLOWED = {
    "task_type": ("CAUSAL_LM", "SEQ_CLS", None),
    "bias": ("none",),
    # Other initialisations, such as PiSSA, change the weights of the base model.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def save_adapter(
    model: Transformer,
    directory: Path,
    base: Path | str,
    *,
    base_weights: str | None = None,
    base_tokenizer: str | None = None,
) -> None:
    """Write the model's adapters; `base` is the model that they belong to. The fingerprints of its
    weights and of its tokenizer go into a file that other readers ignore.

    Both files are on the disk before they take their names, the old configuration gone first: a
    crash in between leaves what is refused, never old weights with a new scale. Raises
    `ModelError` when the disk refuses, and what was there stays.
    """
    config = next(iter(named_adapters(model).values())).config
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(model, RewardModel) else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        **{theirs: getattr(config, ours) for theirs, ours in _OURS.items()},
        "target_modules": _targets(model, config),
        "bias": "none",
    }
    origin = {"base_weights": base_weights, "base_tokenizer": base_tokenizer}
    known = {name: value for name, value in origin.items() if value is not None}
    state = adapter_state(model).items()
    theirs = _peft_names(model.config)
    tensors = {_stored_name(name, theirs): tensor.cpu() for name, tensor in state}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (
            atomic_path(directory / CONFIG) as settings,  # published last
            atomic_path(directory / WEIGHTS) as weights,
        ):
            save_file(tensors, str(weights), metadata={"format": "pt"})
            write_json(settings, values)
            sync(weights)
            (directory / CONFIG).unlink(missing_ok=True)
            (directory / BASE).unlink(missing_ok=True)
            if known:
                write_json(directory / BASE, known)
    except (OSError, SafetensorError) as error:
        what = f"{directory}: cannot write the adapter ({one_line(str(error))})"
        raise ModelError(what, hint="free some space, or choose another directory") from None


def load_adapter(model: Transformer, directory: Path, *, base: LoRABase = "fp32") -> LoRAConfig:
    """Add the adapters in `directory` to a plain model, in place, and return their configuration.

    `base` is the type of the frozen matrices, which the files do not contain. Raises `ModelError`
    (missing or broken file, unsupported option, tensor that is missing, unexpected or misshapen,
    each by name) and leaves the model unchanged.
    """
    values = _read_values(directory / CONFIG)
    if values.get("task_type") == "SEQ_CLS" and not isinstance(model, RewardModel):
        raise ModelError(
            f"{directory / CONFIG}: task_type='SEQ_CLS' is not supported by a language model",
            hint="the adapter belongs to a reward model",
        )
    config, tensors = read_adapter(model.config, directory, base=base)
    add_lora(model, config, torch.Generator())  # leaves torch's global generator alone
    for name, matrix in adapter_state(model).items():
        matrix.copy_(tensors[name])
    return config


def adapter_of(path: str | Path) -> tuple[Path, Path] | None:
    """The base model and the adapter of a directory that holds an adapter, itself or in `adapter`
    of a checkpoint without weights; None for another path. Raises `ModelError` where the base model
    is not on this machine."""
    directory = Path(path)
    if not (directory / CONFIG).exists():
        directory = directory / "adapter"
        if not (directory / CONFIG).exists() or (directory.parent / "config.json").exists():
            return None
    return base_of(directory), directory


def base_of(directory: Path) -> Path:
    """The model that an adapter names. Raises `ModelError` where it is not on this machine."""
    name = _read_values(directory / CONFIG).get("base_model_name_or_path")
    base = Path(str(name or ""))
    if not name or not base.exists():
        raise ModelError(
            f"{directory}: base model {quoted(name)} not found on this machine",
            hint="give it with --base MODEL",
        )
    return base


def read_adapter(
    model: ModelConfig, directory: Path, *, base: LoRABase = "fp32"
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The configuration and the matrices of an adapter, by names such as
    `layers.0.mlp.up_proj.lora_A`: A (r, inputs) and B (outputs, r). Raises `ModelError` as
    `load_adapter` does."""
    theirs = _peft_names(model)
    config = _read_config(directory, base, theirs)
    path = directory / WEIGHTS
    if not path.exists():
        pickled = (directory / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle and is not read: load it with PEFT and save it again"
        raise ModelError(f"{directory}: {WEIGHTS} not found", hint=hint if pickled else None)
    loaded: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            renamed = [name for ours, name in theirs.items() if name != ours]
            if not any(f"{_PREFIX}{layer}.lora_A.weight" in names for layer in renamed):
                theirs = {layer: layer for layer in theirs}  # an earlier version wrote our names
                config = _read_config(directory, base, theirs)
            if any(".experts." in name for name in names):
                config = _with_experts(config)
            shapes = _shapes(model, config)
            stored = {_stored_name(name, theirs): name for name in shapes}
            for name in sorted(names - stored.keys()):
                raise ModelError(f"{path}: unexpected tensor {quoted(name)}")
            for name, own in stored.items():
                shape = tuple(file.get_slice(name).get_shape()) if name in names else "missing"
                if shape != shapes[own]:
                    raise ModelError(f"{path}: tensor '{name}' is {shape}, expected {shapes[own]}")
                loaded[own] = file.get_tensor(name)
                if not loaded[own].dtype.is_floating_point:
                    raise ModelError(f"{path}: tensor '{name}' is {loaded[own].dtype}")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: broken or cut short ({one_line(str(error))})") from None
    return config, loaded


def _peft_names(model: ModelConfig) -> dict[str, str]:
    """Linear layers as transformers' class names them, from which PEFT takes its names, by ours.
    Those that are a part of a tensor there keep ours, and PEFT does not find them."""
    shapes = parameter_shapes(model)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    names = {name.removesuffix(".weight"): name.removesuffix(".weight") for name in matrices}
    family = next((family for family in FAMILIES.values() if family.has(model)), None)
    if family is not None:
        for tensor, members in stored_tensors(family.layout.stored(shapes)).items():
            ours = members[0].removesuffix(".weight")
            if len(members) == 1 and ours in names and ours.startswith("layers."):
                names[ours] = tensor.removeprefix("model.").removesuffix(".weight")
    return names


def _stored_name(name: str, theirs: dict[str, str]) -> str:
    """Of a matrix such as "layers.0.mlp.up_proj.lora_A"."""
    layer, _, matrix = name.rpartition(".")
    return f"{_PREFIX}{theirs[layer]}.{matrix}.weight"


def _targets(model: Transformer, config: LoRAConfig) -> list[str]:
    """`target_modules` for PEFT, which takes every layer whose name ends so."""
    theirs = _peft_names(model.config)
    if all(ours == name for ours, name in theirs.items()):
        return list(config.target_modules)
    adapted = {theirs[name] for name in named_adapters(model)}
    # With the part of the block where another part has a layer of the same name.
    others = {name.rpartition(".")[2] for name in theirs.values() if name not in adapted}
    kinds = {name.split(".", 2)[2] for name in adapted}
    ends = {kind: kind.rpartition(".")[2] for kind in sorted(kinds)}
    return [*dict.fromkeys(kind if end in others else end for kind, end in ends.items())]


def _with_experts(config: LoRAConfig) -> LoRAConfig:
    """In PEFT "up_proj" means that of experts too, where experts are layers; only tensors tell."""
    named = [f"experts.{name}" for name in config.target_modules]
    targets = dict.fromkeys([*config.target_modules, *(n for n in named if n in EXPERT_TARGETS)])
    return config.updated(target_modules=list(targets))


def _shapes(model: ModelConfig, config: LoRAConfig) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for name, weight in parameter_shapes(model).items():
        layer = name.rpartition(".")[0]
        if len(weight) == 2 and target_of(layer) in config.target_modules:
            shapes[f"{layer}.lora_A"] = (config.rank, weight[1])
            shapes[f"{layer}.lora_B"] = (weight[0], config.rank)
    return shapes


def merge_adapter(
    directory: Path, out: Path, *, base: Path | None = None, any_base: bool = False
) -> Path:
    """Merge the adapter into its base model and write it to `out`, with the base's tokenizer.

    `base` is by default the one that adapter_config.json names. Raises `ModelError`, also if `out`
    exists, and unless `any_base` for another model than the adapter was trained on, where it says.
    """
    if out.exists():
        raise ModelError(f"{out} exists", hint="choose another output, or remove it")
    values = _read_values(directory / CONFIG)
    if values.get("task_type") == "SEQ_CLS":
        raise ModelError(
            f"{directory} is the adapter of a reward model and lacks its head",
            hint="the checkpoint that contains it is the merged reward model",
        )
    if base is None:
        base = base_of(directory)
    model, tokenizer = open_model(base), open_tokenizer(base)
    if not any_base:
        _require_base(directory, base, model, tokenizer)
    lora, tensors = read_adapter(model.config, directory)

    def merged(name: str) -> Tensor:
        weight, layer = model.read(name, torch.float32), name.removesuffix(".weight")
        if f"{layer}.lora_A" not in tensors:
            return weight
        a, b = (tensors[f"{layer}.{part}"].float() for part in ("lora_A", "lora_B"))
        return merged_weight(weight, a, b, lora)

    write_served(out, model.config, merged, tokenizer, recommended_sampling(base))
    return out


def _require_base(directory: Path, base: Path, model: ModelSource, tokenizer: Tokenizer) -> None:
    known = read_json(directory / BASE) if (directory / BASE).exists() else {}
    wrong = None
    if known.get("base_tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        wrong = "its tokenizer differs"
    if "base_weights" in known and known["base_weights"] != base_fingerprint(model):
        wrong = "its weights differ"
    if wrong is not None:
        raise ModelError(
            f"{base} is another model than {directory} was trained on: {wrong}",
            hint="name the right one with --base, or merge all the same with --any-base",
        )


def base_fingerprint(model: ModelSource) -> str:
    """`weights_fingerprint` of a model that is not loaded; one parameter is in memory."""
    names = parameter_shapes(model.config)
    return parameters_fingerprint(names, lambda name: model.read(name, torch.float32), threads=1)


def _read_values(path: Path) -> dict[str, Any]:
    if not path.exists():
        hint = f"an adapter is a directory with {CONFIG} and {WEIGHTS}"
        raise ModelError(f"{path.parent}: {CONFIG} not found", hint=hint)
    return read_json(path)


def _read_config(directory: Path, base: LoRABase, theirs: dict[str, str]) -> LoRAConfig:
    """`theirs`: names of the model's layers in PEFT, by ours."""
    path = directory / CONFIG
    values = _read_values(path)
    if (kind := values.get("peft_type")) != "LORA":
        raise ModelError(f"{path}: peft_type {quoted(kind)} is not supported", hint="only LORA is")
    for key in sorted(values.keys() - _READ):
        value = values[key]
        if value not in _ALLOWED[key] if key in _ALLOWED else value:
            raise ModelError(f"{path}: {one_line(key)}={quoted(value)} is not supported")
    if not isinstance(targets := values.get("target_modules"), list):
        raise ModelError(f"{path}: target_modules={quoted(targets)} is not a list of names")
    # PEFT matches the end of a name: "self_attn.q_proj" means every q_proj. Names of experts are
    # our own.
    names = []
    for target in map(str, targets):
        layers = [ours for ours, name in theirs.items() if f".{name}".endswith(f".{target}")]
        kinds = {target_of(layer) for layer in layers}
        kinds = kinds if target in EXPERT_TARGETS else kinds.difference(EXPERT_TARGETS)
        names += sorted(kinds) or [
            target if target in EXPERT_TARGETS else target.rpartition(".")[2]
        ]
    keys = {"target_modules": names, "base": base}
    # A missing value is 0: off for dropout and rsLoRA, rejected for the rank and alpha.
    keys |= {ours: values.get(theirs, 0) for theirs, ours in _OURS.items()}
    try:
        return LoRAConfig.parse(keys, source=str(path))
    except ConfigError as error:
        raise ModelError(one_line(str(error)), hint=error.hint) from None
