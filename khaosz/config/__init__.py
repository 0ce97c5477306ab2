"""Configuration with closed fields: an unknown key is an error that suggests the nearest one."""

from khaosz.config.align_config import (
    EXPERT_TARGETS,
    LORA_TARGETS,
    LoRAConfig,
    PreferenceConfig,
    RewardConfig,
    RolloutConfig,
)
from khaosz.config.columns_config import ColumnsConfig
from khaosz.config.embed_config import EmbedConfig
from khaosz.config.model_config import ModelConfig, RopeScaling
from khaosz.config.presets import SIZES, Derived, Preset, preset, size_for_minutes
from khaosz.config.recipe import (
    load_recipe,
    load_stages,
    overridden,
    parse_overrides,
    save_config,
)
from khaosz.config.shipped import find_recipe, shipped_recipe, shipped_recipes
from khaosz.config.stages import PAIR_STAGES, ROLLOUT_STAGES
from khaosz.config.train_config import ParallelConfig, ScheduleConfig, TrainConfig

__all__ = [
    "EXPERT_TARGETS",
    "LORA_TARGETS",
    "PAIR_STAGES",
    "ROLLOUT_STAGES",
    "SIZES",
    "ColumnsConfig",
    "Derived",
    "EmbedConfig",
    "LoRAConfig",
    "ModelConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "Preset",
    "RewardConfig",
    "RolloutConfig",
    "RopeScaling",
    "ScheduleConfig",
    "TrainConfig",
    "find_recipe",
    "load_recipe",
    "load_stages",
    "overridden",
    "parse_overrides",
    "preset",
    "save_config",
    "shipped_recipe",
    "shipped_recipes",
    "size_for_minutes",
]
