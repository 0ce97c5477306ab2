"""Model families: one table for each format, and their names nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiny_models import random_model

import khaosz
from khaosz.errors import ModelError
from khaosz.interop.families import FAMILIES
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.interop.gguf.config import architecture_of
from khaosz.interop.huggingface_config import config_from_hf, config_to_hf, model_type

PACKAGE = Path(khaosz.__file__).parent
# The last: of pre-tokenizers, whose names in GGUF files are those of families.
TABLES = ("interop/families/", "interop/gguf/architectures/", "interop/gguf/tokenizer.py")


@pytest.mark.parametrize(
    ("switches", "name"),
    [({}, "llama"), ({"qkv_bias": True}, "qwen2"), ({"qk_norm": True}, "qwen3")],
)
def test_family_follows_from_the_switches(switches: dict[str, bool], name: str) -> None:
    config = random_model(31, **{"qk_norm": False, **switches}).config
    assert model_type(config) == architecture_of(config) == name
    assert config_from_hf(config_to_hf(config)) == config


def test_families_are_named_in_their_tables_only() -> None:
    assert {kind.family for kind in ARCHITECTURES.values()} <= FAMILIES.keys()
    places = []
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        places += [where for text in texts if text in FAMILIES and not where.startswith(TABLES)]
    assert places == []


def test_features_that_no_family_has_together_are_named() -> None:
    config = random_model(31, qk_norm=True, rope_interleaved=True).config
    with pytest.raises(ModelError, match="has the features qk_norm, rope_interleaved together"):
        config_to_hf(config)
