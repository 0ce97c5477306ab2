"""Reward functions by the name that recipes use: `reward_function = "khaosz.rewards:brevity"`."""

from khaosz.trainer.stages.rewards import brevity, contains_answer

__all__ = ["brevity", "contains_answer"]
