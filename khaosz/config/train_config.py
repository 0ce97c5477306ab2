"""`TrainConfig` and its tables: the keys of a recipe. None: derived (see presets)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from khaosz.config.align_config import (
    LoRAConfig,
    PreferenceConfig,
    RewardConfig,
    RolloutConfig,
)
from khaosz.config.closed import MOST_TOKENS, Closed
from khaosz.config.columns_config import ColumnsConfig
from khaosz.config.embed_config import EmbedConfig
from khaosz.config.model_config import ModelConfig
from khaosz.config.names import meant_by
from khaosz.config.presets import SIZES
from khaosz.config.shipped import sample_data
from khaosz.config.stages import ROLLOUT_STAGES, STAGES, TEXT_STAGES, Stage
from khaosz.errors import did_you_mean

MOST_STEPS = 10**12
_LOG_RATIO = "a log-ratio compares two models, not two draws of a dropout mask; set it to 0"
# Stages in which adapters must not drop anything, and why.
_NO_DROPOUT = {
    "embed": "texts are embedded twice and must be the same both times; set it to 0",
    **dict.fromkeys(("dpo", "ppo", "grpo"), _LOG_RATIO),
}
_Beta = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Closed):
    """The learning rate over a run, as a factor of `TrainConfig.lr`.

    `cosine`: one half period down to `min_ratio` (Loshchilov & Hutter 2017, arXiv:1608.03983).
    `wsd`: warm-up, stable, then a linear decay over the last `decay_fraction` (MiniCPM, Hu et al.
    2024, arXiv:2404.06395). `sgdr`: cosine with `cycles` warm restarts, each `cycle_growth` times
    as long as the one before (arXiv:1608.03983). `constant`: warm-up, then 1.
    """

    name: Literal["cosine", "wsd", "sgdr", "constant"] = "wsd"
    warmup_steps: int | None = Field(default=None, ge=0, le=MOST_STEPS)
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    decay_fraction: float = Field(default=0.6, gt=0, le=1)
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    cycles: int = Field(default=4, ge=1, le=1000)
    cycle_growth: float = Field(default=1.0, ge=1, le=100)

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        warmup = self.warmup_fraction if self.warmup_steps is None else 0.0
        if self.name == "wsd" and warmup + self.decay_fraction > 1 + 1e-9:
            raise ValueError(
                f"warmup_fraction={warmup:g} and decay_fraction={self.decay_fraction:g} are more"
                " than the whole run together"
            )
        if self.cycles * math.log10(self.cycle_growth) > 12:
            raise ValueError(
                f"cycle_growth={self.cycle_growth:g} over {self.cycles} cycles leaves the first"
                " ones no step"
            )
        return self

    def check_steps(self, total: int) -> None:
        """Raises ValueError if the warm-up, or with the decay, is longer than `total` steps."""
        warmup = self.warmup_steps or 0
        decay = round(self.decay_fraction * total) if self.name == "wsd" else 0
        if warmup and warmup + decay > total:
            raise ValueError(
                f"schedule: {warmup:,} steps of warm-up"
                + (f" and {decay:,} of decay" if decay else "")
                + f" do not fit into {total:,} steps"
            )


class ParallelConfig(Closed):
    """Device and backend of a run. `auto`: the best that this machine has (`khaosz doctor`)."""

    device: Literal["auto", "cpu", "cuda", "npu", "mps", "xpu"] = "auto"
    backend: Literal["auto", "gloo", "nccl", "hccl", "xccl"] = "auto"
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads; None: all cores"
    )


class TrainConfig(Closed):
    """One run of one stage. Paths are relative to the working directory."""

    stage: Stage
    data: Path
    out: Path
    val: Path | None = None
    tokenizer: Path | None = None
    init_from: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    size: str | None = None
    model: dict[str, Any] = Field(default_factory=dict, description="ModelConfig keys to override")
    vocab_size: int | None = Field(default=None, ge=1, le=2**20)
    window: int | None = Field(default=None, ge=8, le=MOST_TOKENS, description="tokens per row")

    max_minutes: float | None = Field(default=None, gt=0, le=1e7)
    min_steps: int | None = Field(
        default=None, ge=1, le=MOST_STEPS, description="even if they take longer"
    )
    max_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    epochs: float | None = Field(default=None, gt=0, le=1e6)

    batch_tokens: int | None = Field(
        default=None, ge=1, le=2**31, description="tokens per optimizer step"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, le=2**20, description="rows per forward, per rank"
    )
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float | None = Field(default=None, ge=1e-20, le=1e30)
    embedding_lr: float | None = Field(default=None, ge=1e-20, le=1e30)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    weight_decay: float | None = Field(default=None, ge=0, le=1e4)
    grad_clip: float = Field(default=1.0, ge=1e-12, le=1e30)
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    gradient_checkpointing: bool = False
    memory_check: bool = Field(default=True, description="refuse what cannot fit in memory")
    loss_chunk: int = Field(
        default=1024, ge=1, le=MOST_TOKENS, description="tokens per logits chunk"
    )

    lora: LoRAConfig | None = None
    batch_pairs: int | None = Field(
        default=None, ge=1, le=2**20, description="pairs per optimizer step"
    )
    reward: RewardConfig = RewardConfig()
    preference: PreferenceConfig = PreferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    embed: EmbedConfig = EmbedConfig()
    reference: Path | None = Field(default=None, description="None: the initial model")
    reward_model: Path | None = None
    reward_function: str | None = Field(default=None, description="module:name or file.py:name")

    mix: dict[str, float] | None = None
    val_fraction: float = Field(default=0.005, ge=0, lt=1)
    dedup: bool = True
    columns: ColumnsConfig = ColumnsConfig()
    allow_unread: bool = Field(default=False, description="even if over 1 % of records are unread")

    log_every: int = Field(default=10, ge=1, le=MOST_STEPS)
    eval_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    eval_tokens: int = Field(default=100_000, ge=1, le=10**12)
    save_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    save_minutes: float = Field(
        default=10.0, gt=0, le=1e7, description="minutes between checkpoints"
    )
    keep: int = Field(default=2, ge=1, le=MOST_STEPS)
    sample_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    prompts: list[str] = Field(default_factory=list)
    early_stop: int | None = Field(
        default=None, ge=1, le=MOST_STEPS, description="evaluations without improvement"
    )
    loggers: list[Literal["tensorboard", "trackio", "swanlab", "wandb"]] = Field(
        default_factory=list
    )

    @classmethod
    def hint_for(cls, path: list[str], values: dict[str, Any]) -> str:
        stage = values.get("stage")
        hint = meant_by(path, stage if stage in STAGES else None, ModelConfig.model_fields)
        return hint or super().hint_for([*path[:-1], ""], values)

    @field_validator("val", "tokenizer", "init_from", "reference", "reward_model", mode="before")
    @classmethod
    def _unset_path(cls, value: Any) -> Any:
        return None if value == "" else value  # an override can unset a recipe's

    @field_validator("data", "out", mode="before")
    @classmethod
    def _named_path(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("is empty, a path is expected")
        return value

    @field_validator("data", "val", mode="before")
    @classmethod
    def _sample(cls, value: object) -> object:
        return sample_data(value)

    @field_validator("size")
    @classmethod
    def _known_size(cls, value: str | None) -> str | None:
        if value is not None and value not in (*SIZES, "auto"):
            hint = did_you_mean(value, SIZES, "or auto")
            raise ValueError(f"size must be one of {' | '.join(SIZES)}, {hint}")
        return value

    @field_validator("model")
    @classmethod
    def _known_model_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Values are checked when the size is known; a misspelled key is reported before that.
        for key in value:
            if key not in ModelConfig.model_fields:
                known = f"known keys: {', '.join(sorted(ModelConfig.model_fields))}"
                hint = meant_by(("model", key), None, ModelConfig.model_fields) or known
                hint = hint.replace("'model.", "'")
                raise ValueError(f"unknown key '{key}', {hint}")
        return value

    @field_validator("reward_function")
    @classmethod
    def _unset(cls, value: str | None) -> str | None:
        return value or None  # an override can unset a recipe's

    @field_validator("mix")
    @classmethod
    def _weights(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is None:
            return None
        weights = value.values()
        if min(weights, default=-1) < 0 or not sum(weights) or max(weights) > 1e6:
            raise ValueError("mix weights must be from 0 to 1e6 and not all 0")
        smallest = min(weight for weight in weights if weight)
        if smallest < sum(weights) * 1e-6:
            raise ValueError("mix weights must be 0, or a millionth of their sum or more")
        return value

    @field_validator("prompts")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if not all(prompt.strip() for prompt in value):
            raise ValueError("a prompt is empty")
        return value

    @field_validator("loggers")
    @classmethod
    def _once(cls, value: list[Any]) -> list[Any]:
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.max_minutes is None and self.max_steps is None and self.epochs is None:
            raise ValueError("set the length of the run: max_minutes, max_steps or epochs")
        if self.stage != "pt" and self.init_from is None and self.size is None:
            raise ValueError(f"{self.stage} needs init_from=MODEL (or size=... for random weights)")
        if self.stage in ROLLOUT_STAGES:
            if self.max_steps is None and self.epochs is None:
                raise ValueError(f"{self.stage} needs max_steps or epochs")
            if self.reward_model is None and self.reward_function is None:
                raise ValueError(
                    f"{self.stage} needs a reward: reward_model=DIR or reward_function=MODULE:NAME"
                )
            if self.reward_model is not None and self.reward_function is not None:
                raise ValueError(
                    "give reward_model or reward_function, not both"
                    ' (reward_function="" unsets a recipe\'s)'
                )
            if self.stage == "grpo" and self.rollout.group < 2:
                raise ValueError(
                    "grpo compares answers to a prompt: rollout.group must be 2 or more"
                )
        elif self.reward_model is not None or self.reward_function is not None:
            raise ValueError(
                f"reward_model and reward_function are for ppo and grpo, not {self.stage}"
            )
        if self.max_steps is not None:
            self.schedule.check_steps(self.max_steps)
        if self.lora is not None and self.lora.dropout and self.stage in _NO_DROPOUT:
            raise ValueError(f"lora.dropout={self.lora.dropout:g}: {_NO_DROPOUT[self.stage]}")
        if self.keeps_file and (self.stage not in TEXT_STAGES or self.init_from is None):
            where = f"is for pt and sft, not {self.stage}"
            if self.stage in TEXT_STAGES:
                where = "needs init_from=MODEL"
            raise ValueError(f'lora.base="file" {where}; set it to int8 or fp32')
        if self.model and self.init_from is not None:
            raise ValueError("[model] is for a new model and excludes init_from")
        return self

    @property
    def keeps_file(self) -> bool:
        """Whether the frozen weights stay as the model's files store them."""
        return self.lora is not None and self.lora.base == "file"

    @property
    def validates(self) -> bool:
        """Whether the stage scores held-out data, if the data is enough for a part of it."""
        held_out = self.val is not None or self.val_fraction > 0
        return held_out and self.stage not in ROLLOUT_STAGES
