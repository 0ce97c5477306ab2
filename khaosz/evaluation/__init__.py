"""How good a model is: bits per byte of texts, agreement with what people prefer, retrieval."""

from khaosz.evaluation.bits_per_byte import BitsPerByte, bits_per_byte
from khaosz.evaluation.grounded import Groundedness, groundedness
from khaosz.evaluation.preference import (
    PreferenceAccuracy,
    format_preference,
    preference_accuracy,
)
from khaosz.evaluation.retrieval import RetrievalAccuracy, retrieval_accuracy

__all__ = [
    "BitsPerByte",
    "Groundedness",
    "PreferenceAccuracy",
    "RetrievalAccuracy",
    "bits_per_byte",
    "format_preference",
    "groundedness",
    "preference_accuracy",
    "retrieval_accuracy",
]
