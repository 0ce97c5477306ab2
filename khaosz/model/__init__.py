"""The network: one decoder-only Transformer, readable top to bottom. It knows no devices, ranks
or losses."""

from khaosz.model.reward import RewardModel, reward_shapes
from khaosz.model.transformer import Transformer, parameter_shapes

__all__ = ["RewardModel", "Transformer", "parameter_shapes", "reward_shapes"]
