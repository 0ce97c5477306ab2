"""Encoders of the BERT family in GGUF files: `general.architecture` "bert", which stands for
XLM-RoBERTa too. Its table of positions begins at position 0: converters cut the rows before it off
(conversion/bert.py of llama.cpp).

Tokenizers are WordPiece ("bert") and Unigram ("t5"). They are written as tokenizer.json, as
transformers builds those of the same models.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from khaosz.data.tokenizer.files import template_processing
from khaosz.errors import ModelError, quoted
from khaosz.interop.gguf.architectures import ENCODER
from khaosz.interop.gguf.architectures.architecture import RERANK_HEAD, Keys
from khaosz.interop.gguf.blocks import read_array
from khaosz.interop.gguf.file import GgufFile
from khaosz.interop.gguf.sentencepiece import SPACE
from khaosz.model.encoder import Encoder, EncoderConfig

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_TOP = {
    "words": "token_embd",
    "positions": "position_embd",
    "types": "token_types",
    "norm": "token_embd_norm",
    "dense": "cls",
    "classes": RERANK_HEAD.removesuffix(".weight"),
}
_LAYER = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "attention_norm": "attn_output_norm",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_norm": "layer_output_norm",
}


def read_encoder(file: GgufFile, *, head: bool = False) -> Encoder:
    """An fp32 `Encoder` in evaluation mode, with `head` including its classification head.

    Raises `ModelError` for a missing key, a missing, unexpected or misshapen tensor, and a head
    that is missing or incomplete.
    """
    config = encoder_config(file, head=head)
    with torch.device("meta"):
        model = Encoder(config)
    names = {_stored(name): name for name in model.state_dict()}
    unused = {"cls.weight", "cls.bias", RERANK_HEAD, "cls.output.bias"}
    for name in sorted(file.tensors.keys() - names.keys() - unused):
        raise ModelError(f"{file.source}: unexpected tensor {quoted(name)}")
    loaded: dict[str, Tensor] = {}
    for stored, (name, tensor) in zip(names, model.state_dict().items(), strict=True):
        loaded[name] = torch.from_numpy(read_array(file, stored, tuple(tensor.shape)))
    model.load_state_dict(loaded, assign=True)
    return model.requires_grad_(False).eval()


def encoder_config(file: GgufFile, *, head: bool = False) -> EncoderConfig:
    """Raises `ModelError` as `read_encoder` does, but for tensors."""
    keys, shapes = Keys(file, ENCODER), {name: t.shape for name, t in file.tensors.items()}
    if keys.value("attention.causal", bool, False):
        raise ModelError(f"{file.source}: causal attention of BERT is not supported")
    width, heads, layers = (
        keys.count(name) for name in ("embedding_length", "attention.head_count", "block_count")
    )
    if heads < 1 or width % heads or not 0 < layers <= len(shapes):
        raise ModelError(
            f"{file.source}: {layers} blocks of {heads} heads and width {width} in"
            f" {len(shapes)} tensors"
        )
    rows = {}
    for name in ("token_embd", "position_embd", "token_types"):
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) != 2:
            raise ModelError(f"{file.source}: tensor '{name}.weight' is missing")
        rows[name] = shape[0]
    labels = 0
    if head:
        if RERANK_HEAD not in shapes:
            raise ModelError(
                f"{file.source}: tensor '{RERANK_HEAD}' is missing: it is not a reranker"
            )
        if "cls.weight" not in shapes:
            raise ModelError(
                f"{file.source}: tensor 'cls.weight' is missing: llama.cpp's converter leaves"
                " BERT's pooler out, and its scores cannot be computed without it",
                hint="use the safetensors directory of this reranker",
            )
        labels = shapes[RERANK_HEAD][0]
    return EncoderConfig(
        rows["token_embd"],
        width,
        layers,
        heads,
        keys.count("feed_forward_length"),
        rows["position_embd"],
        type_vocab_size=rows["token_types"],
        layer_norm_eps=keys.number("attention.layer_norm_epsilon"),
        labels=labels,
    )


def _stored(name: str) -> str:
    """The name of one of our parameters in a file."""
    match name.split("."):
        case ["layers", index, part, kind]:
            return f"blk.{index}.{_LAYER[part]}.{kind}"
        case [part, kind]:
            return f"{_TOP[part]}.{kind}"
    raise AssertionError(name)


def encoder_tokenizer(file: GgufFile) -> bytes:
    """tokenizer.json. Raises `ModelError` for a tokenizer that is not supported."""
    metadata, source = file.metadata, file.source
    keys = Keys(file, "tokenizer.ggml")
    kind = keys.value("model", str)
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{source}: tokenizer.ggml.tokens is missing")
    types = np.full(len(tokens), _NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ModelError(f"{source}: tokenizer.ggml.token_type is not one number for each token")
    if kind == "bert":
        names = [_word_piece(token, kind) for token, kind in zip(tokens, types, strict=True)]
        spec = _word_pieces(names, keys)
        around = {"cls": ("cls", "bos", "[CLS]"), "sep": ("seperator", "eos", "[SEP]")}
    elif kind == "t5":
        names = tokens
        spec = _unigram(names, types, keys)
        around = {"bos": ("bos", "cls", "<s>"), "eos": ("eos", "seperator", "</s>")}
    else:
        raise ModelError(
            f"{source}: tokenizer {quoted(kind)} of an encoder is not supported",
            hint="WordPiece ('bert') and Unigram ('t5') are",
        )
    begin, finish = (_id_of(names, keys, *places) for places in around.values())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = sorted({begin, finish, *np.flatnonzero(types == _CONTROL).tolist()})
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **flags, "special": True} for i in special],
        **spec,
    }
    return _with_pairs(spec, (begin, finish), roberta=kind == "t5")


def _word_piece(token: str, kind: int) -> str:
    """A token of BERT's vocabulary. In GGUF those that begin a word begin with a space, and those
    that continue one have no mark."""
    if kind == _CONTROL or (token.startswith("[") and token.endswith("]") and len(token) > 2):
        return token
    return token[1:] if token.startswith(SPACE) and len(token) > 1 else f"##{token}"


def _word_pieces(names: list[str], keys: Keys) -> dict[str, Any]:
    lower = keys.value("normalizer.lowercase", bool, True)
    vocab: dict[str, int] = {}
    for i, name in enumerate(names):
        vocab.setdefault(name, i)
    unknown = names[_id_of(names, keys, "unknown", "unknown", "[UNK]")]
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": keys.value("normalizer.strip_accents", bool, lower),
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def _unigram(names: list[str], types: np.ndarray, keys: Keys) -> dict[str, Any]:
    scores = keys.file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(names):
        raise ModelError(f"{keys.source}: tokenizer.ggml.scores is not one number for each token")
    # Unused rows have far lower scores, and an unknown character costs 10 more than the lowest.
    used = types != _UNUSED
    scores = np.where(used, scores, scores[used].min(initial=0.0))
    prefix = keys.value("add_space_prefix", bool, True)
    metaspace = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": True,
    }
    charsmap = keys.file.metadata.get("tokenizer.ggml.precompiled_charsmap")
    normalizer = None
    if charsmap is not None:
        if not isinstance(charsmap, np.ndarray) or charsmap.dtype.itemsize != 1:
            raise ModelError(f"{keys.source}: precompiled_charsmap is not an array of bytes")
        text = base64.b64encode(charsmap.tobytes()).decode()
        normalizer = {"type": "Precompiled", "precompiled_charsmap": text}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": _id_of(names, keys, "unknown", "unknown", "<unk>"),
            "vocab": [[n, s] for n, s in zip(names, scores.tolist(), strict=True)],
            "byte_fallback": False,
        },
    }


def _id_of(names: list[str], keys: Keys, key: str, other: str, name: str) -> int:
    """The id of a special token by either key, else by its name."""
    for place in (key, other):
        i = keys.value(f"{place}_token_id", int, -1)
        if i != -1:
            if not 0 <= i < len(names):
                raise ModelError(f"{keys.source}: {place}_token_id {i} is not in the vocabulary")
            return i
    if name not in names:
        raise ModelError(f"{keys.source}: tokenizer.ggml.{key}_token_id is missing")
    return names.index(name)


def _with_pairs(spec: dict[str, Any], ids: tuple[int, int], *, roberta: bool) -> bytes:
    """tokenizer.json with the tokens around a text and, for cross-encoders, a pair of texts: BERT's
    second text is of another type, RoBERTa's follows two tokens."""
    names = {token["id"]: token["content"] for token in spec["added_tokens"]}
    begin, finish = ((names[i], i) for i in ids)
    processor = template_processing([begin], [finish])
    assert processor is not None

    def mark(token: tuple[str, int], kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": token[0], "type_id": kind}}

    kind = 0 if roberta else 1
    processor["pair"] = [
        mark(begin),
        {"Sequence": {"id": "A", "type_id": 0}},
        *[mark(finish)] * (2 if roberta else 1),
        {"Sequence": {"id": "B", "type_id": kind}},
        mark(finish, kind),
    ]
    spec["post_processor"] = processor
    return json.dumps(spec, ensure_ascii=False).encode()
