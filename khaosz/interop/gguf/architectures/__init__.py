"""Architectures of GGUF files, by `general.architecture`."""

from __future__ import annotations

from khaosz.interop.gguf.architectures.architecture import RERANK_HEAD, Architecture
from khaosz.interop.gguf.architectures.gemma3 import GEMMA3, GEMMA_EMBEDDING
from khaosz.interop.gguf.architectures.gemma4 import GEMMA4
from khaosz.interop.gguf.architectures.granite import GRANITE
from khaosz.interop.gguf.architectures.lfm2 import LFM2
from khaosz.interop.gguf.architectures.mistral3 import MISTRAL3
from khaosz.interop.gguf.architectures.mixtures import GRANITE_MOE, QWEN3_MOE
from khaosz.interop.gguf.architectures.phi3 import PHI3
from khaosz.interop.gguf.architectures.qwen35 import QWEN35
from khaosz.interop.gguf.architectures.smollm3 import SMOLLM3

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", paired=True),
    "qwen2": Architecture("qwen2", read=lambda _: {"qkv_bias": True}),
    # Qwen3-Reranker has the rows of "yes" and "no" as `cls.output`.
    "qwen3": Architecture("qwen3", read=lambda _: {"qk_norm": True}, own=frozenset({RERANK_HEAD})),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense", read=lambda _: {"qk_norm": True, "qk_norm_after_rotary": True}
    ),
    "smollm3": SMOLLM3,
    # Rotated in pairs by both, so that its rows are stored as they are.
    "ernie4_5": Architecture("ernie4_5", read=lambda _: {"rope_interleaved": True}),
    "granite": GRANITE,
    "phi3": PHI3,
    "mistral3": MISTRAL3,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "qwen35": QWEN35,
    "gemma-embedding": GEMMA_EMBEDDING,
    "lfm2": LFM2,
    "qwen3moe": QWEN3_MOE,
    "granitemoe": GRANITE_MOE,
}
ENCODER = "bert"  # and XLM-R: read by `interop/gguf/encoder.py`
READABLE = frozenset({*ARCHITECTURES, ENCODER})
