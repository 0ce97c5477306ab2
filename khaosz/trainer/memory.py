"""What a stage will need of memory, and its refusal before any work."""

from __future__ import annotations

from functools import partial

import torch

from khaosz.config import PAIR_STAGES, ROLLOUT_STAGES, ModelConfig, TrainConfig
from khaosz.memory.machine import memory_limits, resident_memory
from khaosz.memory.parts import Memory, check_memory
from khaosz.memory.training import TrainingPlan
from khaosz.parallel import ParallelContext
from khaosz.trainer.calibration import rows_per_step


def training_plan(
    config: TrainConfig, shape: ModelConfig, parallel: ParallelContext
) -> TrainingPlan:
    """The plan of a stage whose open numbers are filled in."""
    assert config.window is not None
    rows, micro = rows_per_step(config, parallel, shape.hidden_size)
    mine, text = -(-rows // parallel.world), config.stage in ("pt", "sft")
    rollouts = config.stage in ROLLOUT_STAGES
    # Calibration tries both types.
    names = ["fp32", "bf16"] if config.dtype == "auto" and not rollouts else [config.dtype]
    frozen = int(rollouts and (config.lora is None or config.reference is not None))
    return TrainingPlan(
        shape,
        micro,
        config.window,
        several=not text or mine > micro,
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
    )


def check_stage_memory(
    config: TrainConfig, shape: ModelConfig, parallel: ParallelContext
) -> str | None:
    """The sum of a stage in one line, None where it is not known: on other devices than a CPU and
    CUDA. Raises `NotEnoughMemoryError` for a stage that cannot fit, unless memory_check=false."""
    limits, base = memory_limits(parallel.device), resident_memory()
    if parallel.device.type not in ("cpu", "cuda"):
        return None
    plan = training_plan(config, shape, parallel)
    memory: Memory = plan.memory(base)
    if config.memory_check:
        smaller = [(words, partial(one.memory, base)) for words, one in plan.smaller()]
        what = f"training {shape.parameters() / 1e6:,.1f}M parameters"
        check_memory(memory, limits, what, smaller, override="memory_check=false")
    return memory.line(limits, base)
