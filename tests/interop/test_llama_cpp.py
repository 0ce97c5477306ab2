"""What we export, read by llama.cpp itself: the same token ids and the same logits.

Runs when KHAOSZ_LLAMA_CPP names a python that has llama-cpp-python; it needs nothing of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_tokenizers import FOREIGN
from tiny_models import tiny_model

from khaosz.config import RopeScaling
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.interop.families.gemma3 import gemma3_layers
from khaosz.interop.gguf.model import load_gguf, save_gguf
from khaosz.interop.models import open_tokenizer
from khaosz.model import Transformer

PYTHON = os.environ.get("KHAOSZ_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="KHAOSZ_LLAMA_CPP names no python with llama-cpp-python"),
]
torch.set_num_threads(1)

# The fp32 cache (0 is GGML_TYPE_F32) takes away a rounding that is llama.cpp's, not the file's.
READER = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, job, out = sys.argv[1:]
job = json.load(open(job, encoding="utf-8"))
llama = Llama(path, n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
tokenised = [llama.tokenize(t.encode(), add_bos=False, special=False) for t in job["texts"]]
with_bos = llama.tokenize(b"x", add_bos=True, special=False)
llama.eval(job["ids"])
np.save(out, np.array(llama.scores[: len(job["ids"])], dtype=np.float32))
json.dump({
    "ids": tokenised,
    "with_bos": with_bos,
    "eos": llama.token_eos(),
    "end_of_turn": llama._model.token_eot(),
    "template": llama.metadata.get("tokenizer.chat_template"),
}, sys.stdout)
"""
TEXTS = [
    "Hello, world! I'm 2024 years old. they'LL",
    "  leading, trailing  \n\n\t\tblank lines \r\n and tabs",
    "你好，世界。这是一个测试：“引号”、（括号）！",
    "naïve café Ω≈ç√ 🙂👩‍💻 x==1;{'quoted'}",
    "<|end|> is text here, 1234567890",
]


def texts() -> list[str]:
    sample = Path(__file__).parents[2] / "khaosz" / "data" / "sample"
    english = (sample / "state_of_the_union_2024.txt").read_text(encoding="utf-8")
    chinese = (sample / "statutes_zh.jsonl").read_text(encoding="utf-8").splitlines()
    return [english[:20_000], *(json.loads(line)["text"] for line in chinese[:40])]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(texts()), 900)


def random_model(vocab_size: int, changes: dict[str, Any]) -> Transformer:
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 192,
        "head_dim": 32,
    }
    fields |= {"num_hidden_layers": 3, "max_position_embeddings": 256}
    return tiny_model(0.1, **{**fields, **changes})


def read_by_llama_cpp(path: Path, ids: list[int]) -> tuple[dict[str, Any], np.ndarray]:
    job, out = path.with_suffix(".json"), path.with_suffix(".npy")
    job.write_text(json.dumps({"texts": TEXTS + texts(), "ids": ids}), encoding="utf-8")
    arguments = [PYTHON, "-c", READER, str(path), str(job), str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), np.load(out)


LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
# llama.cpp takes the long factors where its context is beyond the original one.
LONGROPE = RopeScaling(
    rope_type="longrope",
    factor=4.0,
    original_max_position_embeddings=64,
    short_factor=(1.0,) * 12,
    long_factor=tuple(1.0 + i / 4 for i in range(12)),
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False},
    "llama, linear": {"rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    "llama, llama3": {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 64},
    "qwen3, yarn": {"qk_norm": True, "rope_scaling": YARN},
    "hunyuan": {"qk_norm": True, "qk_norm_after_rotary": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": (1, 1, 1, 0)},
    "ernie": {"rope_interleaved": True},
    "granite": {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "phi3": {"partial_rotary_factor": 0.75},
    "phi3, longrope": {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE},
    "ministral3": {
        "query_scaling": 0.1, "rope_scaling": YARN.updated(attention_factor=1.0)
    },
    "gemma3": {
        "num_hidden_layers": 7, "layer_types": gemma3_layers(7), "sliding_window": 50,
        "rope_theta": 1e6, "rope_local_theta": 1e4, "qk_norm": True, "output_norms": True,
        "hidden_act": "gelu_pytorch_tanh", "embedding_multiplier": 128**0.5,
    },
    # Blocks of Q4_K and Q6_K have 256 columns.
    "llama, wide": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "qwen3, wide": {
        "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "qk_norm": True,
    },
}  # fmt: skip
# Root mean square of the difference of logits, in units of their spread; other weights altogether
# give 1.4. F32: two orders of fp32 sums. F16: llama.cpp rounds activations to 11 bits. Quantised:
# it rounds them to 8 bits in groups of 32 (K types: 256), by up to 1/254 of the largest, in each of
# 21 products.
APART = {"F32": 1e-4, "F16": 0.004, "Q8_0": 0.08, "Q4_0": 0.08, "Q4_1": 0.08}
APART |= {"Q4_K_M": 0.08, "Q6_K": 0.08}
CASES = [(name, "F32") for name in MODELS] + [
    (name, kind) for name in ("llama", "qwen2", "qwen3") for kind in ("F16", "Q8_0", "Q4_0", "Q4_1")
]
CASES += [(name, kind) for name in ("llama, wide", "qwen3, wide") for kind in ("Q4_K_M", "Q6_K")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_llama_cpp_computes_equal_logits(
    tmp_path: Path, tokenizer: Tokenizer, name: str, kind: str
) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(random_model(1024, MODELS[name]), tokenizer, path, kind)  # rows beyond the tokens
    ours = load_gguf(path)
    ids = [tokenizer.bos_id, *tokenizer.encode("".join(texts()[1:6]))[:199]]
    result, theirs = read_by_llama_cpp(path, ids)
    with torch.no_grad():
        logits = ours.logits(ours(torch.tensor([ids])))[0].numpy()
    apart = np.sqrt(np.square(theirs - logits).mean()) / logits.std()
    agreement = (theirs.argmax(axis=1) == logits.argmax(axis=1)).mean()
    print(f"{name} {kind}: apart {apart:.1e} of the spread, same top token {agreement:.1%}")
    # llama.cpp looks GELU up in a table of fp16.
    assert apart < max(APART[kind], 0.004 if name == "gemma3" else 0.0)
    again = open_tokenizer(path)
    for text, seen in zip(TEXTS + texts(), result["ids"], strict=True):
        assert tokenizer.encode(text) == seen == again.encode(text), text[:80]
    assert result["with_bos"] == [tokenizer.bos_id, *tokenizer.encode("x")]
    assert result["eos"] == tokenizer.eos_id and result["end_of_turn"] == tokenizer.end_id
    assert result["template"] and "generation %}" not in result["template"]


@pytest.mark.parametrize("name", FOREIGN)
def test_llama_cpp_tokenizes_equally(tmp_path: Path, name: str) -> None:
    """Tokenizers of other projects, by the name we give to their pre-tokenizer."""
    tokenizer = FOREIGN[name](texts=texts())
    path = tmp_path / "model.gguf"
    save_gguf(random_model(tokenizer.vocab_size, {}), tokenizer, path)
    result, _ = read_by_llama_cpp(path, tokenizer.encode("x"))
    again = open_tokenizer(path)
    for text, seen in zip(TEXTS + texts(), result["ids"], strict=True):
        assert again.encode(text) == seen, text[:80]
