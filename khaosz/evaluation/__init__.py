"""Evaluation: bits per byte, agreement with preferences, retrieval, groundedness."""

from khaosz.evaluation.bits_per_byte import BitsPerByte, bits_per_byte
from khaosz.evaluation.grounded import Groundedness, groundedness
from khaosz.evaluation.preference import PreferenceAccuracy, preference_accuracy
from khaosz.evaluation.retrieval import RetrievalAccuracy, retrieval_accuracy

__all__ = [
    "BitsPerByte",
    "Groundedness",
    "PreferenceAccuracy",
    "RetrievalAccuracy",
    "bits_per_byte",
    "groundedness",
    "preference_accuracy",
    "retrieval_accuracy",
]
