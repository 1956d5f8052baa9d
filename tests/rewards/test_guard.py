"""Detectors: quiet where nothing is wrong, a veto where something is, and never on a handful of answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from everlearn.errors import InvalidRequest
from everlearn.rewards.guard import cusum, disagreement, distance, divergence, habit, habit_alarms, habits, region


def slow_cusum(chances, events, tolerated: float) -> list[float]:
    found, wealth = [], 1.0
    for chance, event in zip(chances, events, strict=True):
        wealth = max(wealth, 1.0) * (1 + 0.5 * (chance - event - tolerated))
        found.append(max(math.log(wealth), 0.0))
    return found


def test_the_cusum_is_its_definition():
    rng = np.random.default_rng(0)
    chances, events = rng.random(80), rng.integers(2, size=80)
    assert cusum(chances, events).tolist() == pytest.approx(slow_cusum(chances, events, 0.05))
    with pytest.raises(InvalidRequest):
        cusum([1.5], [0])


def test_a_calibrated_model_raises_no_alarm_in_most_streams_and_a_gamed_one_does_soon():
    rng, false, places = np.random.default_rng(1), 0, []
    for _ in range(100):
        chances = rng.beta(4, 2, size=500)
        false += divergence(chances, (rng.random(500) < chances).astype(float)).veto
        promised = np.clip(chances + 0.25, 0, 1)
        course = cusum(promised, (rng.random(500) < chances).astype(float))
        places.append(int(np.argmax(course >= math.log(1000))) or 500)
    assert false <= 5
    assert np.median(places) < 250
    alarm = divergence(promised, (rng.random(500) < chances).astype(float))
    assert alarm.veto and "crossed at label" in alarm.reason and alarm.num == 500
    assert divergence([], []).veto is False


def test_good_times_earn_no_credit():
    """Two hundred labels of modesty don't hide fifty of boasting."""
    modest, boasting = [0.5] * 200, [0.95] * 50
    course = cusum(modest + boasting, [1.0] * 200 + [0.0] * 50)
    assert course[199] == 0 and course[249] == pytest.approx(cusum(boasting, [0.0] * 50)[-1])


def test_disagreement_and_distance_notice_answers_from_elsewhere():
    rng = np.random.default_rng(2)
    usual, odd = rng.gamma(4, 0.01, 300), rng.gamma(4, 0.025, 300)
    assert disagreement(usual, odd).veto and not disagreement(usual, rng.gamma(4, 0.01, 300)).veto
    assert not disagreement(usual[:10], odd[:10]).veto
    known = region(rng.normal(size=(400, 20)) * np.geomspace(10, 0.1, 20))
    same = rng.normal(size=(300, 20)) * np.geomspace(10, 0.1, 20)
    assert not distance(known, same).veto and distance(known, same).value < 0.04
    away = distance(known, same + 3 * np.geomspace(10, 0.1, 20))
    assert away.veto and away.value > 0.9
    assert not distance(known, same[:5] + 100).veto
    with pytest.raises(InvalidRequest, match="at least 60"):
        region(np.zeros((10, 4)))


def test_habits_of_texts():
    plain = habits("Restart the router, then try again.")
    assert plain == {"length": 35.0, "bullets": 0.0, "apology": 0.0, "refusal": 0.0, "flattery": 0.0, "question": 0.0}
    fawning = habits("Great question! You're absolutely right.\n- one\n- two\n1. three\nCould you tell me which router you have?")
    assert fawning["flattery"] == fawning["question"] == 1.0 and fawning["bullets"] == pytest.approx(3 / 5)
    refusing = habits("I'm sorry, but I can’t help with that.")
    assert refusing["refusal"] == refusing["apology"] == 1.0
    assert habits("It said 'no'. " * 40 + "I cannot reach it.")["refusal"] == 0.0
    assert habits("")["bullets"] == 0.0


def test_a_habit_that_moved_is_a_veto_and_one_that_only_looks_so_is_not():
    rng = np.random.default_rng(3)
    before, longer = rng.gamma(4, 100, 200), rng.gamma(4, 200, 200)
    assert habit("length", before, longer).veto and habit("length", longer, before * 0.4).veto
    assert not habit("length", before, rng.gamma(4, 110, 200)).veto
    assert not habit("length", before[:10], longer[:10]).veto
    assert habit("tool_error", [0.0] * 200, [1.0] * 60 + [0.0] * 140).veto
    with pytest.raises(InvalidRequest, match="no limit for the habit 'rhymes'"):
        habit("rhymes", [0.0], [1.0])


def test_all_habits_of_two_sets_of_answers_at_once():
    usual = ["Restart the router."] * 60
    alarms = {alarm.name: alarm for alarm in habit_alarms(usual, ["Great question! I'm sorry.\n- Restart the router?"] * 60)}
    assert {name for name, alarm in alarms.items() if alarm.veto} == {"length", "bullets", "apology", "flattery", "question"}
    assert not any(alarm.veto for alarm in habit_alarms(usual, usual))
