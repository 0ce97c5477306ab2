"""Evaluation: bits per byte, agreement with preferences, retrieval, groundedness."""

from khaosz.evaluation.bits_per_byte import bits_per_byte
from khaosz.evaluation.grounded import groundedness
from khaosz.evaluation.preference import preference_accuracy
from khaosz.evaluation.retrieval import retrieval_accuracy

__all__ = ["bits_per_byte", "groundedness", "preference_accuracy", "retrieval_accuracy"]
