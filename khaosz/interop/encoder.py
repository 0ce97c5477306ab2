"""Load encoders of the BERT family from local directories in the layout of transformers and
sentence-transformers: `config.json`, `model.safetensors`. Other features raise `ModelError`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from khaosz.data.tokenizer.files import read_directory
from khaosz.errors import ModelError, quoted
from khaosz.interop.huggingface import weight_files
from khaosz.interop.huggingface_config import read_json, same_value
from khaosz.interop.tensor_file import DTYPES, TensorFile
from khaosz.model.encoder import Encoder, EncoderConfig

_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
_CLASSES = {"xlm-roberta": "XLMRobertaTokenizer"}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                "relu": "relu", "silu": "silu", "swish": "silu"}  # fmt: skip
_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Tensors that many files contain and that are not used here.
_UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "classifier.")


def is_encoder(directory: str | Path) -> bool:
    """Whether the config.json of a directory names a supported family."""
    try:
        return read_json(Path(directory) / "config.json").get("model_type") in _FAMILIES
    except ModelError:
        return False


def check_config(directory: str | Path) -> None:
    """Raises `ModelError` for an unsupported feature in config.json."""
    path = Path(directory) / "config.json"
    _config(read_json(path), str(path), head=False)


def encoder_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """As transformers builds it. Raises `ModelError`, `TokenizerError`."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{path} is missing")
    try:
        made = tokenizers.Tokenizer.from_buffer(read_directory(directory)[0])
    except ValueError as error:
        raise ModelError(f"{path} is broken ({error})") from None
    config = directory / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    _check_case(directory, made.normalizer, settings.get("do_lower_case"))
    named = settings.get("tokenizer_class")
    if named is None and is_encoder(directory):
        named = _CLASSES.get(read_json(directory / "config.json")["model_type"])
    if str(named).removesuffix("Fast") == "XLMRobertaTokenizer":
        _as_xlm_roberta(made)
    return made


def _check_case(folder: Path, normalizer: Any, lower: Any) -> None:
    """Raises `ModelError` where tokenizer_config.json contradicts tokenizer.json, of which
    transformers reads one or the other, by the class of the tokenizer."""
    bert = isinstance(normalizer, normalizers.BertNormalizer)
    if bert and lower is not None and lower != normalizer.lowercase:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: do_lower_case={lower} contradicts"
            f" lowercase={normalizer.lowercase} in the normalizer of tokenizer.json",
            hint="write the value that the model was trained with in both files",
        )


def _as_xlm_roberta(made: tokenizers.Tokenizer) -> None:
    """transformers 5 splits at whitespace, where tokenizer.json of some models does not."""
    steps = json.loads(made.to_str())
    normalizer = steps["normalizer"] or {}
    steps = normalizer.get("normalizers") or [normalizer]
    charsmap = [step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"]
    if isinstance(made.model, models.Unigram):
        if charsmap:
            made.normalizer = normalizers.Precompiled(base64.b64decode(charsmap[0]))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )


def is_cross_encoder(directory: str | Path) -> bool:
    """Whether an encoder has a classification head."""
    if not is_encoder(directory):
        return False
    architectures = read_json(Path(directory) / "config.json").get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def load_encoder(
    directory: str | Path, *, device: str | torch.device = "cpu", head: bool = False
) -> Encoder:
    """An fp32 `Encoder` in evaluation mode, with `head` including its classification head.

    Raises `ModelError` for a missing or broken file, an unsupported feature, a missing or
    misshapen tensor, and a missing head.
    """
    directory = Path(directory)
    values = read_json(directory / "config.json")
    config = _config(values, str(directory / "config.json"), head)
    with torch.device("meta"):
        model = Encoder(config)
    names = {_theirs(name, config.pooler): name for name in model.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for path in weight_files(directory):
        file = TensorFile(path)
        for name, entry in file.entries.items():
            plain = _plain(name)
            if plain in names:
                if entry.type not in DTYPES:
                    raise ModelError(
                        f"{path}: tensor {quoted(name)} is {quoted(entry.type_name)[1:-1]}"
                    )
                loaded[names[plain]] = file.read(name, torch.float32, device)
            elif not plain.startswith(_UNUSED):
                raise ModelError(f"{path}: unexpected tensor {quoted(name)}")
    for theirs, name in names.items():
        if name not in loaded:
            raise ModelError(f"{directory}: tensor '{theirs}' is missing")
        if (shape := tuple(loaded[name].shape)) != shapes[name]:
            raise ModelError(f"{directory}: tensor '{theirs}' is {shape}, expected {shapes[name]}")
    model.load_state_dict(loaded, assign=True)
    return model.requires_grad_(False).eval()


def _config(values: dict[str, Any], source: str, head: bool) -> EncoderConfig:
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ModelError(
            f"{source}: model_type {quoted(family)} is not a supported encoder",
            hint=f"supported: {', '.join(_FAMILIES)}; or the address of a server that runs it",
        )
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError(f"{source}: only absolute positions are supported")
    if (activation := values.get("hidden_act", "gelu")) not in _ACTIVATIONS:
        raise ModelError(f"{source}: hidden_act {quoted(activation)} is not supported")
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise ModelError(f"{source}: decoders of the BERT family are not supported")
    architecture = (values.get("architectures") or [""])[0]
    classifies = str(architecture).endswith("ForSequenceClassification")
    if head and not classifies:
        raise ModelError(
            f"{source}: {quoted(architecture)} has no classification head",
            hint="a reranker is a ...ForSequenceClassification",
        )
    sizes: dict[str, int] = {}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "intermediate_size", "max_position_embeddings", "type_vocab_size"):  # fmt: skip
        size = values.get(name)
        if not isinstance(size, int) or not 0 < size < 2**31:
            raise ModelError(f"{source}: {name} is {quoted(size)}")
        sizes[name] = size
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ModelError(
            f"{source}: {sizes['num_attention_heads']} heads do not divide hidden_size"
        )
    # transformers starts RoBERTa's positions at the padding id + 1.
    padding = values.get("pad_token_id")
    first = 0 if family == "bert" else (1 if padding is None else int(padding)) + 1
    names = values.get("id2label")
    places = {
        "num_labels": values.get("num_labels"),
        "id2label": None if names is None else len(names),
    }
    labels = same_value(places, source) if head else 0
    return EncoderConfig(
        **sizes,
        layer_norm_eps=float(values.get("layer_norm_eps", 1e-12)),
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        first_position=first,
        labels=2 if labels is None else labels,
        pooler=family == "bert",
    )


def _theirs(name: str, pooler: bool) -> str:
    """The name of one of our parameters in transformers."""
    part, _, kind = name.rpartition(".")
    match part.split("."):
        case ["layers", index, own]:
            return f"encoder.layer.{index}.{_LAYER[own]}.{kind}"
        case ["dense"]:
            return f"pooler.dense.{kind}" if pooler else f"classifier.dense.{kind}"
        case ["classes"]:
            return f"classifier.{kind}" if pooler else f"classifier.out_proj.{kind}"
        case ["norm"]:
            return f"embeddings.LayerNorm.{kind}"
    table = {"words": "word", "positions": "position", "types": "token_type"}[part]
    return f"embeddings.{table}_embeddings.{kind}"


def _plain(name: str) -> str:
    """A tensor name without the family prefix, in the spelling of newer files."""
    for family in ("bert.", "roberta."):
        name = name.removeprefix(family)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
