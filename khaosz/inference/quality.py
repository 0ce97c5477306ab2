"""What quantisation costs: bits per byte and agreement on the next token, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from khaosz.data.tokenizer import Tokenizer
from khaosz.inference.runner import Chunk, Runner


@dataclass
class LanguageQuality:
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    reference_nats: float = 0.0
    agreeing: int = 0


@dataclass
class QualityReport:
    """By language: bits per byte of both models, and how often both name the same next token."""

    by_lang: dict[str, LanguageQuality] = field(default_factory=dict)

    @property
    def total(self) -> LanguageQuality:
        total = LanguageQuality()
        for part in self.by_lang.values():
            for name, value in asdict(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def as_dict(self) -> dict[str, object]:
        def line(part: LanguageQuality) -> dict[str, float]:
            scale = part.bytes * math.log(2)
            return {
                "reference_bits_per_byte": round(part.reference_nats / scale, 5),
                "bits_per_byte": round(part.nats / scale, 5),
                "loss_percent": round(100 * (part.nats / part.reference_nats - 1), 3),
                "top1_agreement": round(part.agreeing / part.tokens, 5),
                "tokens": part.tokens,
            }

        languages = {lang: line(part) for lang, part in sorted(self.by_lang.items())}
        return {**line(self.total), "by_lang": languages}


def compare(
    reference: Runner,
    other: Runner,
    tokenizer: Tokenizer,
    texts: Iterable[tuple[str, str]],
    *,
    window: int = 512,
    max_tokens: int = 20_000,
) -> QualityReport:
    """Both models on (language, text) pairs: each text alone, begin token first, in windows that
    do not overlap, until `max_tokens` of a language are scored."""
    report = QualityReport()
    lengths = tokenizer.byte_lengths
    for lang, text in texts:
        part = report.by_lang.setdefault(lang, LanguageQuality())
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, window):
            if part.tokens >= max_tokens:
                break
            inputs = ids[start : start + window]
            targets = np.array(ids[start + 1 : start + window + 1])
            inputs = inputs[: len(targets)]
            wanted = len(inputs)
            a = reference.run([Chunk(inputs, reference.new_cache(), wanted)])[0].log_softmax(-1)
            b = other.run([Chunk(inputs, other.new_cache(), wanted)])[0].log_softmax(-1)
            rows = np.arange(wanted)
            part.reference_nats -= float(a.double().numpy()[rows, targets].sum())
            part.nats -= float(b.double().numpy()[rows, targets].sum())
            part.agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
            part.tokens += wanted
            part.bytes += int(lengths[targets].sum())
    return report
