"""The planned micro-batch is the largest one that a stage makes of the same examples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from strategies import CPU

from khaosz.config import PreferenceConfig, TrainConfig, preset
from khaosz.data.batches.batch import IGNORE, padded
from khaosz.data.batches.sequences import SequenceBatch, TokenSequence
from khaosz.data.records.pairs import TextEncoder, load_text_pairs
from khaosz.data.records.preference import load_pairs, load_prompts
from khaosz.data.tokenizer import Tokenizer
from khaosz.memory.training import Packed
from khaosz.trainer.calibration import compiler_problem
from khaosz.trainer.memory import training_plan
from khaosz.trainer.stages.dpo import DPOStrategy
from khaosz.trainer.stages.embed import EmbedStrategy
from khaosz.trainer.stages.lengths import input_bytes, largest_micro_batch
from khaosz.trainer.stages.pairs import PairSet
from khaosz.trainer.strategy import BatchLayout

Recipe = Callable[..., TrainConfig]


def largest(batches: list[SequenceBatch], *, scored: bool = True) -> Packed:
    counts = [padded(int((batch.labels != IGNORE).sum())) if scored else 0 for batch in batches]
    longest = max(int(batch.positions[batch.doc_ids >= 0].max()) + 1 for batch in batches)
    sizes = {batch.ids.numel() for batch in batches}
    shapes = len(sizes), len({*counts})
    return Packed(max(sizes), max(counts), longest, several=len(batches) > 1, shapes=shapes)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_pairs(align: Recipe, tokenizer: Tokenizer, rows: int) -> None:
    config = align("dpo", batch_pairs=16)
    pairs = load_pairs([config.data], tokenizer, 128).train
    layout = BatchLayout(16, 128, rows, tokenizer.pad_id, 0)
    strategy = DPOStrategy(PairSet(pairs), PairSet([]), layout, CPU, config=PreferenceConfig())
    planned = largest_micro_batch(config, tokenizer, CPU, rows)
    assert planned == largest(strategy.micro_batches(0))


def test_pairs_of_one_shape(align: Recipe, tokenizer: Tokenizer) -> None:
    if compiler_problem(CPU.device):
        pytest.skip("no compiler, so rows keep their own lengths")
    planned = largest_micro_batch(align("dpo", compile="auto"), tokenizer, CPU, 3)
    assert planned is not None and planned.tokens == 3 * 128


@pytest.mark.parametrize("rows", [1, 4])
def test_rollouts_have_answers_of_full_length(
    align: Recipe, tokenizer: Tokenizer, rows: int
) -> None:
    config = align("grpo")
    config = config.updated(
        rollout={"prompts": 8, "group": 2, "minibatches": 1, "max_new_tokens": 40}
    )
    prompts = load_prompts([config.data], tokenizer, 128).train
    sequences = [
        TokenSequence([*prompt.prompt_ids.tolist(), *[5] * 40], len(prompt.prompt_ids))
        for prompt in prompts
        for _ in range(2)
    ]
    layout = BatchLayout(8, 128, rows, tokenizer.pad_id, 0)
    packed = [batch for _, batch in layout.pack(sequences)]
    assert largest_micro_batch(config, tokenizer, CPU, rows) == largest(packed)


@pytest.mark.parametrize("rows", [1, 4])
def test_texts(embedder: Recipe, tokenizer: Tokenizer, rows: int) -> None:
    config = embedder(batch_pairs=40)
    encoder = TextEncoder(tokenizer, 48, "q: ", "p: ")
    data, held_out, _ = load_text_pairs([config.data], encoder)
    layout = BatchLayout(40, 64, rows, tokenizer.pad_id, 0)
    strategy = EmbedStrategy(data, held_out, layout, CPU, config.embed)
    packed = [one.packed for one in strategy.micro_batches(0)]
    assert largest_micro_batch(config, tokenizer, CPU, rows) == largest(packed, scored=False)


@pytest.mark.parametrize("data", ["nowhere.jsonl", "empty.jsonl", "other.jsonl"])
def test_nothing_is_known_of_data_that_cannot_be_read(
    align: Recipe, tokenizer: Tokenizer, tmp_path: Path, data: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\nnot JSON\n')
    config = align("dpo", data=tmp_path / data)
    assert largest_micro_batch(config, tokenizer, CPU, 2) is None


def test_bytes_of_the_records(align: Recipe, tmp_path: Path) -> None:
    config = align("dpo")
    size = config.data.stat().st_size
    assert input_bytes(config) == size
    copied = shutil.copy(config.data, tmp_path / "val.jsonl")
    assert input_bytes(align("dpo", val=copied, val_fraction=0.0)) == 2 * size
    assert input_bytes(align("dpo", data=tmp_path / "nowhere.jsonl")) == 0
    plan = training_plan(config.updated(batch_tokens=256), preset("nano").model, CPU)
    assert plan.memory(0).parts["records"] == 5 * size
