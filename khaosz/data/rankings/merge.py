"""Rankings of several annotators as one: agreement, wins of models, disputes, training records.

An item is a prompt with its answers. The consensus of an item orders its answers by their mean
rank (Borda's count), which always gives an order, with ties where the means are equal. The majority
of each pair of answers need not: it can be cyclic. But the majority decides which pairs train:
those that more than half of the item's annotators order as the mean ranks do. Others are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import chain, combinations, product
from typing import Any

import numpy as np

from khaosz.data.rankings.agreement import (
    bootstrap,
    bradley_terry,
    coincidences,
    ordinal_alpha,
    scaled_ranks,
)
from khaosz.data.rankings.ranking_file import Ranking
from khaosz.data.records.comparisons import levels_of
from khaosz.data.records.turns import Message


@dataclass
class Item:
    """`ranks`: by annotator, the scaled rank of each of `answers`, 0 for the best."""

    prompt: list[Message]
    answers: list[str]
    models: list[list[str]]
    ranks: dict[str, list[Fraction]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, ranking: Ranking) -> None:
        """The later of two rankings of one annotator counts."""
        places = [ranking.answers.index(answer) for answer in self.answers]
        ranks = scaled_ranks(ranking.levels)
        self.ranks[ranking.annotator] = [ranks[place] for place in places]
        self.records[ranking.annotator] = ranking.record
        for ours, place in zip(self.models, places, strict=True):
            ours += [name for name in ranking.models[place] if name not in ours]

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        return combinations(range(len(self.answers)), 2)

    @cached_property
    def discordance(self) -> float:
        """The share of comparisons, over pairs of annotators and of answers, that are opposite."""
        signs = [
            [sign(ranks[a] - ranks[b]) for a, b in self.pairs] for ranks in self.ranks.values()
        ]
        compared = [
            x * y < 0
            for one, other in combinations(signs, 2)
            for x, y in zip(one, other, strict=True)
        ]
        return sum(compared) / len(compared) if compared else 0.0

    def consensus(self) -> tuple[list[list[int]], list[tuple[int, int]], int]:
        """Levels by mean rank; pairs (better, worse) with a majority; how many pairs have none: of
        these the order differs between annotators, or most tie them."""
        means = [sum(ranks) / len(self.ranks) for ranks in zip(*self.ranks.values(), strict=True)]
        levels = levels_of(float(-mean) for mean in means)
        kept, dropped = [], 0
        for a, b in self.pairs:
            better, worse = (a, b) if means[a] < means[b] else (b, a)
            votes = sum(ranks[better] < ranks[worse] for ranks in self.ranks.values())
            if means[a] != means[b] and 2 * votes > len(self.ranks):
                kept.append((better, worse))
            elif any(ranks[a] != ranks[b] for ranks in self.ranks.values()):
                dropped += 1
        return levels, kept, dropped


def sign(value: Fraction) -> int:
    return (value > 0) - (value < 0)


def items_of(rankings: Iterable[Ranking]) -> dict[str, Item]:
    """Rankings of the same answers to the same prompt together, in order of appearance."""
    items: dict[str, Item] = {}
    for ranking in rankings:
        if (item := items.get(ranking.item)) is None:
            models: list[list[str]] = [[] for _ in ranking.answers]
            item = items[ranking.item] = Item(ranking.prompt, ranking.answers, models)
        item.add(ranking)
    return items


@dataclass(frozen=True)
class Agreement:
    """Two annotators: `same` is the share of `comparisons`, pairs of answers that both ranked,
    which they order or tie alike."""

    annotators: tuple[str, str]
    items: int
    comparisons: int
    same: float


@dataclass(frozen=True)
class ModelWins:
    """`rate`: wins over `comparisons` with other models' answers, a tie counts half; `interval`:
    its 95 % interval over items; `score`: Bradley-Terry log-strength, mean 0, None where it is
    undefined."""

    model: str
    comparisons: int
    wins: float
    rate: float
    interval: tuple[float, float] | None
    score: float | None


@dataclass(frozen=True)
class Merged:
    items: dict[str, Item]
    rankings: int  # that were read; the later of two of one annotator counts

    @cached_property
    def annotators(self) -> dict[str, int]:
        """Name -> items ranked."""
        names = sorted(set(chain(*(item.ranks for item in self.items.values()))))
        return {name: sum(name in item.ranks for item in self.items.values()) for name in names}

    @property
    def superseded(self) -> int:
        return self.rankings - sum(self.annotators.values())

    @cached_property
    def shared(self) -> list[Item]:
        """Items that two annotators or more ranked."""
        return [item for item in self.items.values() if len(item.ranks) > 1]

    @cached_property
    def disputed(self) -> list[tuple[str, Item]]:
        """Items where two annotators order two answers in opposite ways, most opposite first."""
        items = [(key, item) for key, item in self.items.items() if item.discordance]
        return sorted(items, key=lambda each: -each[1].discordance)

    @cached_property
    def alpha(self) -> tuple[float | None, tuple[float, float] | None]:
        """Krippendorff's alpha and its 95 % interval."""
        matrices = coincidences([list(item.ranks.values()) for item in self.shared])
        if not len(matrices):
            return None, None
        alpha = ordinal_alpha(matrices.sum(0))
        draw = lambda drawn: ordinal_alpha(np.tensordot(drawn, matrices, 1))  # noqa: E731
        return alpha, None if alpha is None else bootstrap(len(matrices), draw)

    @cached_property
    def agreements(self) -> list[Agreement]:
        found = []
        for pair in combinations(self.annotators, 2):
            both = [item for item in self.shared if {*pair} <= item.ranks.keys()]
            same = [
                sign(one[a] - one[b]) == sign(other[a] - other[b])
                for item in both
                for one, other in [[item.ranks[name] for name in pair]]
                for a, b in item.pairs
            ]
            if same:
                found.append(Agreement(pair, len(both), len(same), sum(same) / len(same)))
        return found

    @cached_property
    def models(self) -> list[ModelWins]:
        """The best first; empty where fewer than two models were compared."""
        names = sorted(set(chain(*(chain(*item.models) for item in self.items.values()))))
        if len(names) < 2:
            return []
        wins = np.stack([_wins(item, names) for item in self.items.values()])  # (I, M, M)
        games = wins + wins.swapaxes(1, 2)
        scores = bradley_terry(wins.sum(0))
        rows = []
        for i, name in enumerate(names):
            won, played = wins[:, i].sum(1), games[:, i].sum(1)  # (I,)
            if not played.any():
                continue
            rate = lambda drawn, won=won, played=played: (  # noqa: E731
                float(drawn @ won / (drawn @ played)) if drawn @ played else None
            )
            rows.append(
                ModelWins(
                    name, round(played.sum()), float(won.sum()), float(won.sum() / played.sum()),
                    bootstrap(len(won), rate), None if scores is None else scores[i],
                )
            )  # fmt: skip
        return sorted(rows, key=lambda row: -row.rate)

    def consensus(self) -> Consensus:
        """One record for each item with a pair to train on."""
        records, pairs, dropped = [], 0, 0
        for key, item in self.items.items():
            levels, kept, without_majority = item.consensus()
            dropped += without_majority
            pairs += len(kept)
            if kept:
                implied = sum(len(a) * len(b) for a, b in combinations(levels, 2))
                records.append(
                    {
                        "prompt": item.prompt,
                        "answers": item.answers,
                        "ranking": [each[0] if len(each) == 1 else each for each in levels],
                        **({"pairs": kept} if len(kept) < implied else {}),
                        "models": item.models,
                        "annotators": list(item.ranks),
                        "discordance": item.discordance,
                        "id": key,
                    }
                )
        return Consensus(records, pairs, dropped)

    def every_ranking(self) -> list[dict[str, Any]]:
        """All rankings as records. Those of an item weigh 1 together in training, as a consensus
        does, by their common `ranking_group`."""
        return [
            {**record, "annotator": name, "ranking_group": key}
            for key, item in self.items.items()
            for name, record in item.records.items()
        ]

    def disputes(self) -> list[dict[str, Any]]:
        """The disputed items as records: each annotator's ranking, not made for training."""
        return [
            {
                "id": key,
                "prompt": item.prompt,
                "candidates": item.answers,
                "models": item.models,
                "rankings": {
                    name: [
                        each[0] if len(each) == 1 else each
                        for each in levels_of(float(-rank) for rank in ranks)
                    ]
                    for name, ranks in item.ranks.items()
                },
                "discordance": item.discordance,
            }
            for key, item in self.disputed
        ]

    def body(self) -> dict[str, Any]:
        """What `--json` and the API say."""
        alpha, interval = self.alpha
        consensus = self.consensus()
        return {
            "rankings": self.rankings,
            "superseded": self.superseded,
            "items": len(self.items),
            "shared_items": len(self.shared),
            "annotators": self.annotators,
            "alpha": alpha,
            "alpha_interval": interval,
            "agreement": [vars(each) for each in self.agreements],
            "models": [vars(each) for each in self.models],
            "disputed": len(self.disputed),
            "consensus": {
                "records": len(consensus.records),
                "pairs": consensus.pairs,
                "pairs_without_majority": consensus.dropped,
            },
        }

    def lines(self) -> list[str]:
        """A report for people."""
        alpha, interval = self.alpha
        people = ", ".join(f"{name} {count}" for name, count in self.annotators.items())
        lines = [
            f"rankings {self.rankings - self.superseded:,}, items {len(self.items):,},"
            f" annotators {len(self.annotators)}: {people}"
        ]
        if self.superseded:
            lines.append(f"replaced by a later ranking of the same annotator: {self.superseded:,}")
        if alpha is None:
            why = "ranked by two annotators" if not self.shared else "with ranks that differ"
            lines.append(f"Krippendorff's alpha: undefined, no items {why}")
        else:
            span = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
            lines.append(
                f"Krippendorff's alpha (ordinal): {alpha:.3f}{span},"
                f" of {len(self.shared):,} items that two or more ranked"
            )
        for each in self.agreements:
            lines.append(
                f"  {' and '.join(each.annotators)}: {each.same:.0%} of"
                f" {each.comparisons:,} comparisons alike"
            )
        lines.append(f"disputed items: {len(self.disputed):,}")
        for row in self.models:
            span = (
                "" if row.interval is None else f" [{row.interval[0]:.0%}, {row.interval[1]:.0%}]"
            )
            score = "" if row.score is None else f", Bradley-Terry {row.score:+.2f}"
            lines.append(
                f"  {row.model}: won {row.rate:.0%}{span} of {row.comparisons:,} comparisons{score}"
            )
        return lines


@dataclass(frozen=True)
class Consensus:
    """`dropped`: pairs that some annotator ordered, without a majority."""

    records: list[dict[str, Any]]
    pairs: int
    dropped: int


def merge(rankings: Sequence[Ranking]) -> Merged:
    return Merged(items_of(rankings), len(rankings))


def _wins(item: Item, names: Sequence[str]) -> np.ndarray:
    """(M, M): how often the row's answer was ranked above the column's; ties count half for both.
    Two models that gave the same text tie."""
    wins = np.zeros((len(names), len(names)))
    index = {name: i for i, name in enumerate(names)}
    for ranks in item.ranks.values():
        for models in item.models:
            for one, other in combinations(models, 2):
                wins[index[one], index[other]] += 0.5
                wins[index[other], index[one]] += 0.5
        for a, b in item.pairs:
            for one, other in product(item.models[a], item.models[b]):
                if one != other:
                    share = (1 - sign(ranks[a] - ranks[b])) / 2
                    wins[index[one], index[other]] += share
                    wins[index[other], index[one]] += 1 - share
    return wins
