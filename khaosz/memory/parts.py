"""A sum of memory by part: one line of text, and the refusal of what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from khaosz.errors import NotEnoughMemoryError
from khaosz.memory.machine import Limit

BASE = "code and libraries"
MAPPED = "mapped file"  # weights that stay in the model's file: its pages can be read again


@dataclass(frozen=True)
class Memory:
    """Bytes by part. `BASE` is what the process has already taken."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def needed(self, limit: Limit) -> int:
        """Bytes to come that count towards a limit."""
        left_out = (BASE,) if limit.mapped else (BASE, MAPPED)
        return sum(count for name, count in self.parts.items() if name not in left_out)

    def exceeded(self, limits: Iterable[Limit]) -> Limit | None:
        """The limit that this sum exceeds, by most; None if it fits."""
        over = [limit for limit in limits if self.needed(limit) > limit.free]
        return max(over, key=lambda limit: self.needed(limit) - limit.free, default=None)

    def sum(self, separator: str = ", ") -> str:
        """The parts, the largest first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        return separator.join(f"{name} {amount(count)}" for name, count in parts if count >> 19)

    def line(self, limits: Sequence[Limit], resident: int) -> str:
        """ "memory: about 1.9 GB of 7.6 GB: weights 0.5 GB, ...": of what this process may take in
        all, with the `resident` bytes that it has already."""
        most = min((limit.free for limit in limits), default=None)
        of = "" if most is None else f" of {amount(most + resident)}"
        return f"memory: about {amount(self.total)}{of}: {self.sum()}"


def check_memory(
    memory: Memory,
    limits: Sequence[Limit],
    what: str,
    smaller: Iterable[tuple[str, Memory]] = (),
    *,
    override: str | None,
) -> None:
    """Raises `NotEnoughMemoryError` with the sum, and the changes of `smaller` (in words, and what
    would be needed then) that would fit; `smaller` is not read otherwise. `override`: the option
    that skips this check. Where no limit can be read everything passes."""
    limit = memory.exceeded(limits)
    if limit is None:
        return
    base = memory.parts.get(BASE, 0)
    changes = [(f"{words} ({amount(other.total)})", other) for words, other in smaller]
    fitting = [words for words, other in changes if other.exceeded(limits) is None]
    would = f"would fit: {', '.join(fitting)}" if fitting else "a smaller model is needed"
    if changes and not fitting:
        least = min(changes, key=lambda change: change[1].needed(limit))
        would = f"not even {least[0]} would fit: free memory, or use a larger machine"
    raise NotEnoughMemoryError(
        f"{what} needs about {amount(memory.total)} of memory,"
        f" {amount(limit.free + base)} are available ({limit.name}): {memory.sum(' + ')}",
        hint=would if override is None else f"{would}; {override} skips this check",
    )


def amount(count: float) -> str:
    """Bytes in MB or GB, of 1,024 KB and so on."""
    mb = count / (1 << 20)
    return f"{mb:,.0f} MB" if mb < 1_000 else f"{mb / 1_024:,.1f} GB"
