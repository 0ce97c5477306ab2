"""Tiny random encoders as transformers saves them, and the same as llama.cpp's converter would
write them: names and keys are those of gguf-py (constants.py, tensor_mapping.py)."""

from __future__ import annotations

import base64
import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import nn

from khaosz.interop.gguf.blocks import quantize
from khaosz.interop.gguf.file import TensorToWrite, write_gguf

transformers = pytest.importorskip("transformers")

TEXTS = [
    "the cat sat", "北京是首都，the cat", "a", "The Dogs run\n and cats sleep", " 北　京 Ａ the ",
    "naïve ﬁt", "都atttt",
]  # fmt: skip
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
LONGEST = 40
# SentencePiece's compiled rules "Ａ" -> "A", "ﬁ" -> "fi" and U+3000 -> " ".
_RULES = (
    "eNod02WQlgUQAOB3PmCGoZGhG+mQ7jxESWmlu5XuUu4UEAmlBaVLJKW7u0HphqM7DkSlns+deWZ3Zn/sj90NYgdB"
    "MCJWEJ0gFETGJn0QjsglcUNBVJwg0I4MMVsdXyMeCXk8NhQklhORlCQk4wOSszkmFKSUU5CaVKQlDeER6chIBjKT"
    "iQ/JQjaykoPs5CInechNPvKSn48oSAEKU4iiFKE4xShJCUpTirKUoTzliKACH1ORT6hEZT6lKlWoTjU+owa1qEkd"
    "alOPunxOfRrwBY1oSBMa04ymtKA5rWhJG1rTjrZ0oD2d6MhXfEkXOtONrvSgO73oSR9604++DKA/gxjI1wxmCN8Q"
    "FV443/EtwxjK9wznh/CJMIqRjGE0P/Ej4xjLBMYziYn8zGSmMoVf+YXpTGMmM5jNLOYyh/nM4zcW8DsLWcwilrKE"
    "5SxjBX+wipWsYTXrWMsG1rOJjWwJ3yfb2MoOtrOLnexhN/vYywH2c4iDHOEwxzjKCY7zF39yipOc4TTnOMsFznOJ"
    "i1zhMte4SjTXuckNbnOLu9zhPvd4yIPwD/KIpzzhOc94QQx/85J/eMV//MsbXvOOt///XkTQvlPwHgFViaI="
)
CHARSMAP = zlib.decompress(base64.b64decode(_RULES))
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "##s",
    "sat",
    "北",
    "京",
    "是",
    "首",
    "都",
    ",",
    "，",
    "a",
    "dog",
    "run",
    "and",
    "sleep",
    "na",
    "##ive",
    "fi",
    "##t",
]
PIECES = [
    ("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁the", -4.0),
    ("▁cat", -5.0), ("cat", -6.5), ("s", -5.5), ("北京", -7.0), ("北", -8.0), ("京", -8.25),
    ("▁a", -5.0), ("是", -6.0), ("▁sat", -6.0), ("A", -7.5), ("fi", -6.0), ("t", -7.0),
    ("都a", -8.0), ("atttt", -3.0),
    ("<mask>", 0.0),
]  # fmt: skip


def random_values(model: Any) -> Any:
    """With random biases and norms: initially they are zero and one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def save_bert(path: Path, labels: int = 0) -> Any:
    """With WordPiece, as bge-small-zh."""
    made = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.add_special_tokens(WORDS[:5])
    config = transformers.BertConfig(
        **SIZES, vocab_size=len(WORDS), max_position_embeddings=LONGEST,
        **({"num_labels": labels} if labels else {}),
    )  # fmt: skip
    kind = transformers.BertForSequenceClassification if labels else transformers.BertModel
    return _saved(kind(config), made, path, "BertTokenizer", cls="[CLS]", sep="[SEP]")


def save_xlm_roberta(path: Path, labels: int = 0) -> Any:
    """With Unigram, as bge-m3; tokenizer.json does not split at whitespace, as some do not."""
    made = tokenizers.Tokenizer(models.Unigram(PIECES, 3, False))
    made.normalizer = normalizers.Precompiled(CHARSMAP)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    config = transformers.XLMRobertaConfig(
        **SIZES, vocab_size=len(PIECES) + 1, max_position_embeddings=LONGEST + 2, type_vocab_size=1,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
        **({"num_labels": labels} if labels else {}),
    )  # fmt: skip
    head = transformers.XLMRobertaForSequenceClassification
    model = (head if labels else transformers.XLMRobertaModel)(config)
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>"}
    return _saved(model, made, path, "XLMRobertaTokenizer", **names)


def _saved(model: Any, made: Any, path: Path, kind: str, **names: str) -> Any:
    random_values(model).save_pretrained(path)
    made.save(str(path / "tokenizer.json"))
    config = {f"{key}_token": name for key, name in names.items()}
    config |= {"tokenizer_class": kind, "model_max_length": LONGEST}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return model


def save_modules(path: Path, pooling: str, *dense: nn.Linear, **prompts: str) -> None:
    """The files of sentence-transformers; `pooling` in its spelling."""
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), "Normalize"]
    folders = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    kind_of = "sentence_transformers.models.{}"
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": kind_of.format(kind)}
        for i, (folder, kind) in enumerate(zip(folders, kinds, strict=True))
    ]
    written: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": SIZES["hidden_size"],
            f"pooling_mode_{pooling}": True,
        },
    }
    if prompts:
        written["config_sentence_transformers.json"] = {"prompts": prompts}
    for i, layer in enumerate(dense, start=2):
        written[f"{i}_Dense/config.json"] = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    for name, values in written.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(values))
    from safetensors.torch import save_file

    for i, layer in enumerate(dense, start=2):
        save_file({"linear.weight": layer.weight.data}, path / f"{i}_Dense/model.safetensors")


def write_tensors(
    path: Path, metadata: dict[str, Any], tensors: dict[str, Any], kind: str = "F32"
) -> None:
    """`kind` of matrices; vectors are F32."""

    def rows(values: np.ndarray, kind: str) -> list[np.ndarray]:
        return [quantize(values if values.ndim > 1 else values[None], kind)]

    entries = []
    for name, tensor in tensors.items():
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        stored = kind if values.ndim > 1 else "F32"
        entries.append(TensorToWrite(name, stored, values.shape, partial(rows, values, stored)))
    write_gguf(path, metadata, entries)


_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "classifier.dense": "cls",
    "classifier.out_proj": "cls.output",
}


def bert_tensors(model: Any, labels: int) -> dict[str, torch.Tensor]:
    """As the converter writes them: without the pooler, positions from the first one."""
    offset = 0 if model.config.model_type == "bert" else model.config.pad_token_id + 1
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("bert.").removeprefix("roberta.")
        stem, _, kind = name.rpartition(".")
        if stem.startswith("pooler") or kind == "position_ids":
            continue
        if stem == "classifier":
            stem = "classifier.out_proj"
        if stem == "embeddings.position_embeddings":
            tensor = tensor[offset:]
        prefix = ""
        if stem.startswith("encoder.layer."):
            _, _, index, stem = stem.split(".", 3)
            prefix = f"blk.{index}."
        tensors[f"{prefix}{_NAMES[stem]}.{kind}"] = tensor
    assert labels == 0 or "cls.output.weight" in tensors
    return tensors


def bert_gguf(
    model: Any, path: Path, pooling: int | None, labels: int = 0, kind: str = "F32"
) -> None:
    wordpiece = model.config.model_type == "bert"
    metadata: dict[str, Any] = {
        "general.architecture": "bert",
        "general.name": "tiny",
        "bert.context_length": LONGEST,
        "bert.embedding_length": 32,
        "bert.feed_forward_length": 64,
        "bert.block_count": 3,
        "bert.attention.head_count": 4,
        "bert.attention.layer_norm_epsilon": model.config.layer_norm_eps,
        "bert.attention.causal": False,
        "tokenizer.ggml.token_type_count": model.config.type_vocab_size,
    }
    if pooling is not None:
        metadata["bert.pooling_type"] = pooling
    if labels:
        metadata["bert.classifier.output_labels"] = ["LABEL_0"]
    if wordpiece:  # spaces before words, nothing before what continues them
        special = WORDS[:5]
        tokens = [w if w in special else w[2:] if w[:2] == "##" else f"▁{w}" for w in WORDS]
        metadata |= {
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array([3] * 5 + [1] * (len(WORDS) - 5), np.int32),
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.seperator_token_id": 3,
            "tokenizer.ggml.unknown_token_id": 1,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.mask_token_id": 4,
        }
    else:
        types = [{"<": 3}.get(piece[0], 1) for piece, _ in PIECES] + [5]
        types[3] = 2
        unused = (f"[PAD{len(PIECES)}]", -10_000.0)  # of rows beyond the vocabulary
        metadata |= {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [piece for piece, _ in [*PIECES, unused]],
            "tokenizer.ggml.scores": np.array([s for _, s in [*PIECES, unused]], np.float32),
            "tokenizer.ggml.token_type": np.array(types, np.int32),
            "tokenizer.ggml.add_space_prefix": True,
            "tokenizer.ggml.remove_extra_whitespaces": True,
            "tokenizer.ggml.precompiled_charsmap": np.frombuffer(CHARSMAP, np.uint8),
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 3,
            "tokenizer.ggml.padding_token_id": 1,
            "tokenizer.ggml.seperator_token_id": 2,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": True,
        }
    write_tensors(path, metadata, bert_tensors(model, labels), kind)
