"""Phi-3: fused tensors, a rotation of a part of each head, LongRoPE, windows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
from family_tests import LENGTH, FamilyTests, close, ids, logits_of
from torch import Tensor

from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.huggingface_config import config_from_hf
from khaosz.model import Transformer

SHORT, LONG = [1.0, 1.1, 1.3], [1.5, 3.0, 9.0]
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
    "partial_rotary_factor": 0.5, "rope_theta": 10_000.0,
}  # fmt: skip


class TestPhi3(FamilyTests):
    theirs = "phi3"
    architecture = "phi3"
    config: ClassVar[dict[str, Any]] = {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5
        },
        "sliding_window": 30,
        "head_dim": 8,
    }  # fmt: skip
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"rope_parameters": {**LONGROPE}}, "short_factor has 3 factors for 2 frequencies"),
        ({"rope_parameters": {**LONGROPE, "long_factor": None}}, "requires short_factor and long"),
        ({"rope_parameters": {**LONGROPE, "short_factor": [0.0, 1.0]}}, "must be above 0"),
    ]


def longrope(context: int) -> dict[str, Any]:
    """Settings of a model with this original context."""
    original = {"original_max_position_embeddings": context}
    return {"hidden_size": 48, "rope_parameters": {**LONGROPE, **original}, **original}


class TestLongRope(FamilyTests):
    """Sequences of 50 are within the original context."""

    theirs = "phi3"
    architecture = "phi3"
    config = longrope(64)
    wide: ClassVar[dict[str, Any]] = {"partial_rotary_factor": 0.375}


class TestBeyondTheBorder(TestLongRope):
    """Sequences of 50, taken as a whole, are beyond the original context."""

    config = longrope(20)
    document = 25

    @staticmethod
    def _run(runner: Runner, **settings: Any) -> Tensor:
        return runner.run([Chunk(ids()[0].tolist(), runner.new_cache(), LENGTH, **settings)])[0]

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("cuts", [[], [1, 2, 30], [7, 8, 9, 17, 40]])
    def test_cached_chunks_equal_the_whole(
        self, model: Transformer, expected: Tensor, cuts: list[int], deterministic: bool
    ) -> None:
        """The end of the whole sequence, after chunks before and behind the border."""
        runner = Runner.from_module(model, deterministic=deterministic)
        cache = runner.new_cache()
        for start, end in pairwise([0, *cuts, LENGTH]):
            [logits] = runner.run([Chunk(ids()[0, start:end].tolist(), cache)])
        close(logits[0], expected[0, -1])

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_a_sequence_passes_the_border(self, model: Transformer, deterministic: bool) -> None:
        """Token by token, each as the whole sequence until then; back and over again."""
        runner = Runner.from_module(model, deterministic=deterministic)
        row, cache = ids()[0, :26], runner.new_cache()
        for length in range(1, 27):
            logits = runner.run([Chunk([int(row[length - 1])], cache)])[0]
            close(logits[0], logits_of(model, row[None, :length])[0, -1])
        cache.truncate(12)
        logits = runner.run([Chunk(row[12:15].tolist(), cache)])[0]
        close(logits[0], logits_of(model, row[None, :15])[0, -1])

    def test_drafts_across_the_border(self, model: Transformer) -> None:
        """Logits of several new positions are those of one by one; neighbours are not touched."""
        runner = Runner.from_module(model)
        rows, caches = ids()[:, :26], [runner.new_cache(), runner.new_cache()]
        runner.run(
            [Chunk(r[:n].tolist(), c) for r, c, n in zip(rows, caches, (17, 4), strict=True)]
        )
        one, other = runner.run(
            [
                Chunk(rows[0, 17:24].tolist(), caches[0], 7),
                Chunk(rows[1, 4:6].tolist(), caches[1], 2),
            ]
        )
        for position, logits in zip(range(17, 24), one, strict=True):
            expected = logits_of(model, rows[:1, : position + 1])[0, -1]
            # After the border a chunk is rotated as a whole.
            close(logits, expected)
        close(other, logits_of(model, rows[1:, :6])[0, 4:])
        assert (caches[0].long, caches[1].long) == (True, False)


def test_older_names() -> None:
    values = {
        "model_type": "phi3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75, "rope_theta": 500.0,
        "sliding_window": 262_144,
        "rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG},
    }  # fmt: skip
    config = config_from_hf(values)
    assert config.rope_border == 32 and config.rotary_dim == 6 and config.layer_types is None
    assert config.rope_scaling is not None and config.rope_scaling.factor == 4.0
