"""Shares of the device's time, as the scheduler deals them out and as the setting reaches it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from everlearn.config import Settings
from everlearn.engine.engine import Engine
from everlearn.engine.scheduler import SAMPLE, TRAIN, Scheduler


def run(scheduler: Scheduler, seconds: float, wants: set[str], cost: dict[str, float]) -> dict[str, float]:
    """What each side got of `seconds` of the device's time."""
    got = {TRAIN: 0.0, SAMPLE: 0.0}
    while sum(got.values()) < seconds:
        side = scheduler.pick(wants)
        assert side in wants
        scheduler.charge(side, cost[side])
        got[side] += cost[side]
    return got


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("cost", [{TRAIN: 1.0, SAMPLE: 1.0}, {TRAIN: 0.3, SAMPLE: 0.01}, {TRAIN: 0.01, SAMPLE: 0.2}])
def test_each_side_gets_its_share_of_seconds_while_both_have_work(share: float, cost: dict[str, float]) -> None:
    seconds = 1_000 * max(cost.values())
    got = run(Scheduler(share), seconds, {TRAIN, SAMPLE}, cost)
    assert got[SAMPLE] / sum(got.values()) == pytest.approx(share, abs=0.01)


def test_at_no_moment_is_a_side_behind_by_more_than_one_unit_of_the_other() -> None:
    scheduler, got, draw = Scheduler(0.7), {TRAIN: 0.0, SAMPLE: 0.0}, random.Random(0)
    for _ in range(5_000):
        side = scheduler.pick({TRAIN, SAMPLE})
        assert side is not None
        seconds = draw.uniform(0.01, 0.1)
        scheduler.charge(side, seconds)
        got[side] += seconds
        assert abs(got[SAMPLE] / 0.7 - got[TRAIN] / 0.3) <= 0.1 / 0.3 + 1e-9


def test_whoever_is_alone_gets_everything_and_nobody_gets_nothing() -> None:
    scheduler = Scheduler(0.7)
    assert scheduler.pick(set()) is None
    assert run(scheduler, 10.0, {TRAIN}, {TRAIN: 0.1})[TRAIN] >= 10.0
    assert run(scheduler, 10.0, {SAMPLE}, {SAMPLE: 0.1})[SAMPLE] >= 10.0


@pytest.mark.parametrize(("busy", "idle"), [(TRAIN, SAMPLE), (SAMPLE, TRAIN)])
def test_idleness_saves_up_nothing(busy: str, idle: str) -> None:
    """Else whoever comes back after an hour would have the device for an hour."""
    scheduler, cost = Scheduler(0.5), {TRAIN: 1.0, SAMPLE: 1.0}
    run(scheduler, 1_000.0, {busy}, cost)
    got = run(scheduler, 100.0, {TRAIN, SAMPLE}, cost)
    assert abs(got[idle] - got[busy]) <= 2.0


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_the_setting_reaches_the_engine_s_scheduler(tmp_path: Path, share: float) -> None:
    settings = Settings.model_validate({"home": tmp_path, "engine": {"sampling_share": share}})
    assert Engine(settings, lambda event: None).scheduler.shares == {TRAIN: pytest.approx(1 - share), SAMPLE: share}
