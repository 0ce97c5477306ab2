"""Text models inside models that see images: read alone, as transformers computes text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_tests import COMMON, close, ids, logits_of
from safetensors.torch import load_file, save_file
from tiny_models import randomised

from khaosz.interop.huggingface import WEIGHTS, load_model
from khaosz.interop.huggingface_config import config_from_hf, model_type

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
GEMMA4 = {
    "sliding_window": 9, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 276,
    "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16,
}  # fmt: skip


def older_name(name: str) -> str:
    if name == "lm_head.weight":
        return f"language_model.{name}"
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("model.vision", "vision").replace("model.multi", "multi")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("outer", "inner", "more"),
    [
        ("gemma3", "gemma3_text", {"sliding_window": 9}),
        ("mistral3", "ministral3", {"rope_parameters": YARN}),
        ("gemma4", "gemma4_text", GEMMA4),
    ],
)
def test_text_model_is_read_alone(
    tmp_path: Path, outer: str, inner: str, more: dict[str, Any], older: bool
) -> None:
    tied = outer.startswith("gemma")
    text = {**COMMON, **more, "model_type": inner, "tie_word_embeddings": tied}
    kinds = {"gemma3": "siglip_vision_model", "mistral3": "pixtral", "gemma4": "gemma4_vision"}
    vision = {**VISION, "model_type": kinds[outer]}
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision}
    if outer == "gemma4":
        vision |= {"head_dim": 16, "num_key_value_heads": 2}
        parts["audio_config"] = {
            "model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "output_proj_dims": 32,
        }  # fmt: skip
    config = transformers.AutoConfig.for_model(outer, **parts, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForImageTextToText.from_config(config)
    randomised(theirs, 0.2)
    theirs.save_pretrained(tmp_path)
    if older:  # as published: the text model with a head of its own
        tensors = load_file(tmp_path / WEIGHTS)
        renamed = {older_name(name): tensor for name, tensor in tensors.items()}
        save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    ours = load_model(tmp_path)
    assert model_type(ours.config) == inner
    with torch.no_grad():
        close(logits_of(ours, ids()), theirs.eval()(ids()).logits)


def test_published_gemma_leaves_out_what_is_usual() -> None:
    text = {
        "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    config = config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    theirs = transformers.Gemma3TextConfig(**text)
    assert config.vocab_size == theirs.vocab_size and config.tie_word_embeddings
    assert config.num_attention_heads == theirs.num_attention_heads
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 8.0
    assert config.layer_types == tuple(theirs.layer_types)
