"""Families of models in Hugging Face directories, by `model_type` in config.json.

A configuration that several can express is written as the first of them.
"""

from __future__ import annotations

from khaosz.interop.families.ernie import ERNIE
from khaosz.interop.families.family import Family
from khaosz.interop.families.gemma3 import GEMMA3
from khaosz.interop.families.gemma4 import GEMMA4
from khaosz.interop.families.granite import GRANITE, GRANITE_MOE
from khaosz.interop.families.hunyuan import HUNYUAN
from khaosz.interop.families.lfm2 import LFM2
from khaosz.interop.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from khaosz.interop.families.ministral3 import MINISTRAL3
from khaosz.interop.families.mixtures import QWEN3_MOE
from khaosz.interop.families.phi3 import PHI3
from khaosz.interop.families.qwen35 import QWEN35
from khaosz.interop.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "hunyuan_v1_dense": HUNYUAN,
    "smollm3": SMOLLM3,
    "ernie4_5": ERNIE,
    "granite": GRANITE,
    "phi3": PHI3,
    "ministral3": MINISTRAL3,
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "qwen3_5_text": QWEN35,
    "lfm2": LFM2,
    "qwen3_moe": QWEN3_MOE,
    "granitemoe": GRANITE_MOE,
}
# Models that also see images or hear: their text model, in `text_config`, is read alone.
WITH_IMAGES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "ministral3",
    "qwen3_5": "qwen3_5_text",
}
