"""Reward functions under the name that recipes use: `reward_function = "khaosz.rewards:NAME"`."""

from khaosz.trainer.stages.rewards import brevity, contains_answer, last_number

__all__ = ["brevity", "contains_answer", "last_number"]
