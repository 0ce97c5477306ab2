"""Schedules as functions of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from khaosz.config import ScheduleConfig
from khaosz.trainer.schedule import lr_factor

TOTAL = 200


def factors(**settings: object) -> list[float]:
    config = ScheduleConfig.parse(settings)
    return [lr_factor(config, step, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "sgdr", "constant"])
def test_warm_up_is_linear_and_its_first_step_moves(name: str) -> None:
    values = factors(name=name, warmup_steps=10)
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert max(values) <= 1.0
    assert min(values) > 0.0  # no step is spent on a learning rate of zero


def test_cosine_against_its_formula() -> None:
    values = factors(name="cosine", warmup_steps=0, min_ratio=0.1)
    for step in (0, 50, 199):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / TOTAL))
        assert values[step] == pytest.approx(expected)


def test_wsd_is_stable_then_decays_linearly_to_the_end() -> None:
    values = factors(name="wsd", warmup_steps=0, decay_fraction=0.25)
    assert values[:150] == [1.0] * 150
    steps = [a - b for a, b in itertools.pairwise(values[150:])]
    assert steps == pytest.approx([1 / 51] * len(steps))
    assert values[-1] == pytest.approx(1 / 51)


def test_sgdr_restarts_once_per_cycle() -> None:
    values = factors(name="sgdr", warmup_steps=0, cycles=4)
    restarts = [i for i in range(1, TOTAL) if values[i] > values[i - 1]]
    assert restarts == [50, 100, 150]
    growing = factors(name="sgdr", warmup_steps=0, cycles=3, cycle_growth=2.0)
    restarts = [i for i in range(1, TOTAL) if growing[i] > growing[i - 1]]
    assert restarts == [29, 86]  # 200/7 and 600/7, rounded up to whole steps


def test_schedule_counts_optimizer_steps_of_this_run() -> None:
    assert factors(name="cosine")[-1] < 0.01
    short = ScheduleConfig(name="cosine")
    assert lr_factor(short, 9, 10) < lr_factor(short, 9, 1000)
