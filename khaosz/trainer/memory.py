"""What a stage will need of memory, and its refusal before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch

from khaosz.config import (
    PAIR_STAGES,
    ROLLOUT_STAGES,
    SIZES,
    ModelConfig,
    TrainConfig,
    overridden,
    preset,
)
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ConfigError
from khaosz.interop.models import model_files
from khaosz.memory.machine import Limit, memory_limits, resident_memory
from khaosz.memory.parts import Memory, check_memory
from khaosz.memory.training import TrainingPlan
from khaosz.parallel import ParallelContext
from khaosz.trainer.calibration import rows_per_step
from khaosz.trainer.open_run import new_shape, with_training_numbers
from khaosz.trainer.stages.lengths import input_bytes, largest_micro_batch

_LEAST = "micro_batch=1 gradient_checkpointing=true"
# Encoded pairs, prompts and texts stay in memory, 5 bytes for one of UTF-8 JSON: ids of 4 bytes
# twice, once as a key, and a Python object for each of 20 tokens or so.
_RECORDS = 5
_SHORTEST = 128  # tokens of a window that is proposed


def training_plan(
    config: TrainConfig,
    shape: ModelConfig,
    parallel: ParallelContext,
    tokenizer: Tokenizer | None = None,
) -> TrainingPlan:
    """The plan of a stage whose open numbers are filled in. With a tokenizer, the lengths of its
    first records are measured where rows may stay partly empty."""
    assert config.window is not None
    rows, micro = rows_per_step(config, parallel, shape.hidden_size)
    mine, text = -(-rows // parallel.world), config.stage in ("pt", "sft")
    rollouts = config.stage in ROLLOUT_STAGES
    # Calibration tries both types.
    names = ["fp32", "bf16"] if config.dtype == "auto" and not rollouts else [config.dtype]
    frozen = int(rollouts and (config.lora is None or config.reference is not None))
    packed = None
    if not text and tokenizer is not None:
        packed = largest_micro_batch(config, tokenizer, parallel, micro)
    return TrainingPlan(
        shape,
        micro,
        config.window,
        several=packed.several if packed else not text or mine > micro,
        dtypes=tuple(torch.bfloat16 if name == "bf16" else torch.float32 for name in names),
        optimizer=config.optimizer,
        lora=config.lora,
        gradient_checkpointing=config.gradient_checkpointing,
        loss_chunk=config.loss_chunk,
        head=config.stage not in ("rm", "embed"),
        frozen=frozen
        + int(config.reward_model is not None)
        + int(config.stage in PAIR_STAGES and config.reference is not None),
        critic=config.stage == "ppo",
        rollout=config.rollout.prompts * config.rollout.group // parallel.world if rollouts else 0,
        packed=packed,
        # Otherwise calibration times a micro-batch that is not compiled.
        compiled=config.compile == "on" and config.dtype != "auto",
        records=0 if text else _RECORDS * input_bytes(config),
        stored=stored_bytes(config),
    )


def stored_bytes(config: TrainConfig) -> int | None:
    """Bytes of a model's files where its matrices stay in them, else None."""
    if not config.keeps_file or config.init_from is None:
        return None
    path = config.init_from
    return sum(file.stat().st_size for file in model_files(path))


def check_stage_memory(
    recipe: TrainConfig,
    config: TrainConfig,
    shape: ModelConfig,
    parallel: ParallelContext,
    vocab_size: int | None,
    tokenizer: Tokenizer | None = None,
) -> str | None:
    """The sum of a stage in one line, None where it is not known: on other devices than a CPU and
    CUDA. Raises `NotEnoughMemoryError` for a stage that cannot fit, unless memory_check=false.

    `config` is the recipe with its open numbers filled in. `vocab_size`: of the tokenizer or the
    recipe, None where it follows from the size of a new model.
    """
    limits, base = memory_limits(parallel.device), resident_memory()
    if parallel.device.type not in ("cpu", "cuda"):
        return None
    memory = training_plan(config, shape, parallel, tokenizer).memory(base)

    def planned(words: str) -> tuple[ModelConfig, Memory] | None:
        """With these overrides, where the rest of the recipe allows them."""
        try:
            changed, its = _changed(recipe, words, config, shape, vocab_size)
            return its, training_plan(changed, its, parallel, tokenizer).memory(base)
        except ConfigError:
            return None

    if config.memory_check:
        what = f"training {shape.parameters() / 1e6:,.1f}M parameters"
        smaller = _smaller(config, shape, planned, limits)
        check_memory(memory, limits, what, smaller, override="memory_check=false")
    return memory.line(limits, base)


def _changed(
    recipe: TrainConfig,
    words: str,
    config: TrainConfig,
    shape: ModelConfig,
    vocab_size: int | None,
) -> tuple[TrainConfig, ModelConfig]:
    """The recipe with overrides, filled in, and its model. Another size stands for another initial
    model too. Raises `ConfigError`."""
    loaded = config.init_from is not None
    changed = overridden(recipe.updated(size=config.size), words.split())
    if not loaded or changed.size != config.size:
        shape = new_shape(changed, vocab_size or preset(str(changed.size)).model.vocab_size)
    filled, _ = with_training_numbers(changed, shape, shape.vocab_size, loaded=loaded)
    return filled, shape


def _smaller(
    config: TrainConfig,
    shape: ModelConfig,
    planned: Callable[[str], tuple[ModelConfig, Memory] | None],
    limits: Sequence[Limit],
) -> Iterator[tuple[str, Memory]]:
    """What would fit, in the words of overrides: the mildest settings for this model, adapters on
    it, the largest preset. If nothing does, the least that was tried."""
    loaded, window = config.init_from is not None, config.window or 0
    halves = [window >> i for i in range(1, window.bit_length()) if window >> i >= _SHORTEST]
    shorter = [f"window={half} {_LEAST}" for half in halves]

    def tried(*candidates: str) -> Iterator[tuple[str, Memory]]:
        for words in candidates:
            if (result := planned(words)) is not None:
                its, memory = result
                if loaded and words.startswith("size="):
                    size, _, rest = words.partition(" ")
                    words = f"a model of {its.parameters() / 1e6:,.1f}M parameters as with {size}"
                    words += f" and {rest}" if rest else ""
                yield words, memory

    def first(*candidates: str) -> list[tuple[str, Memory]]:
        results = (each for each in tried(*candidates) if each[1].exceeded(limits) is None)
        return [*islice(results, 1)]

    fitting = first("micro_batch=1", "gradient_checkpointing=true", _LEAST, *shorter)
    if loaded and config.lora is None:
        adapters = "lora.rank=16", "lora.rank=16 lora.base=int8"
        small = (f"{adapter} {each}" for adapter in adapters for each in (_LEAST, *shorter))
        fitting += first(adapters[0], *small)
    if not loaded or not fitting:
        count = shape.parameters()
        sizes = [size for size in reversed(SIZES) if preset(size).model.parameters() < count]
        fitting += first(
            *(f"size={size} {rest}".strip() for size in sizes for rest in ("", _LEAST))
        )
    # Where nothing fits, the least is named.
    yield from fitting or tried(f"size={SIZES[0]} window={_SHORTEST} {_LEAST}")
