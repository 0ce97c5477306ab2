"""The network: one decoder-only Transformer, readable top to bottom. It does not depend on
devices, ranks or losses."""

from khaosz.model.fingerprint import parameters_fingerprint, weights_fingerprint
from khaosz.model.mixture import is_router
from khaosz.model.reward import RewardModel, reward_shapes
from khaosz.model.transformer import Transformer, capped, evaluating, parameter_shapes

__all__ = [
    "RewardModel",
    "Transformer",
    "capped",
    "evaluating",
    "is_router",
    "parameter_shapes",
    "parameters_fingerprint",
    "reward_shapes",
    "weights_fingerprint",
]
