"""The link against its definition, its derivatives against differences, moments against a fine sum, and the figures of calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.rewards.calibration import auc, calibration, ece, reliability
from everlearn.rewards.links import expected, log_likelihood, matched, probabilities

CUTS = {2: np.array([0.0]), 5: np.array([-2.0, -0.5, 0.5, 2.0])}
utility, noise, num_categories = st.floats(-8, 8), st.floats(0.0, 0.9), st.sampled_from([2, 5])


def slow(u: float, cuts: np.ndarray, noise: float) -> list[float]:
    above = [1.0, *[1 / (1 + math.exp(-(u - cut))) for cut in cuts], 0.0]
    num = len(cuts) + 1
    return [(1 - noise) * (above[k] - above[k + 1]) + noise / num for k in range(num)]


@given(utility, num_categories, noise)
def test_probabilities_are_their_formula_and_sum_to_1(u: float, num: int, noise: float):
    p_NK, _ = probabilities(np.array([u]), CUTS[num], noise)
    assert p_NK[0].tolist() == pytest.approx(slow(u, CUTS[num], noise), abs=1e-12)
    assert p_NK.sum() == pytest.approx(1.0)


@given(utility, num_categories, noise, st.integers(0, 1))
def test_slopes_are_differences(u: float, num: int, noise: float, value: int):
    step, points = 1e-5, np.array([u - 1e-5, u, u + 1e-5])
    logs, slopes, curvatures = log_likelihood(points, np.full(3, value), CUTS[num], noise)
    assert slopes[1] == pytest.approx((logs[2] - logs[0]) / (2 * step), abs=1e-6)
    p_NK, _ = probabilities(points[1:2], CUTS[num], noise)
    squares = [log_likelihood(points[1:2], np.array([k]), CUTS[num], noise)[1][0] ** 2 for k in range(num)]
    assert curvatures[1] == pytest.approx(float(p_NK[0] @ squares), abs=1e-9)  # Fisher: expected squared slope


def test_a_wrong_thumb_pulls_without_bound_only_without_noise():
    pulls = [log_likelihood(np.array([9.0]), np.array([0]), CUTS[2], noise)[1][0] for noise in (0.0, 0.4)]
    assert pulls[0] == pytest.approx(-1.0, abs=1e-3) and abs(pulls[1]) < 1e-3


@given(st.floats(-3, 3), st.floats(0.05, 9), num_categories, noise, st.integers(0, 1), st.sampled_from([1.0, 0.25]))
def test_moments_are_those_of_normal_times_likelihood(mean: float, variance: float, num: int, noise: float, value: int, weight: float):
    points = mean + math.sqrt(variance) * np.linspace(-9, 9, 4001)
    density = np.exp(-0.5 * (points - mean) ** 2 / variance)
    likelihood = probabilities(points, CUTS[num], noise)[0][:, value]
    mass = density * likelihood**weight
    wanted = float(mass @ points / mass.sum())
    spread = float(mass @ (points - wanted) ** 2 / mass.sum())
    after, changed, told = matched(mean, variance, value, CUTS[num], noise, weight)
    assert after == pytest.approx(wanted, abs=2e-3)
    assert changed == pytest.approx(min(spread, variance), rel=5e-3)
    assert told == pytest.approx(math.log(density @ likelihood / density.sum()), abs=2e-3)
    assert expected(np.array([mean]), np.array([variance]), CUTS[num], noise)[0, value] == pytest.approx(math.exp(told), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_the_area_is_the_share_of_pairs_in_order(pairs):
    scores, events = np.array([float(score) for score, _ in pairs]), np.array([float(event) for _, event in pairs])
    above, below = scores[events == 1], scores[events == 0]
    if not len(above) or not len(below):
        assert auc(scores, events) is None
        return
    wanted = np.mean([(a > b) + 0.5 * (a == b) for a in above for b in below])
    assert auc(scores, events) == pytest.approx(wanted)


def test_calibration_of_predictions_that_are_right():
    rng = np.random.default_rng(0)
    chances = rng.random(20_000)
    events = (rng.random(20_000) < chances).astype(float)
    found = calibration(chances, events, np.log(np.where(events > 0, chances, 1 - chances)))
    assert found.ece < 0.015 and found.brier == pytest.approx(1 / 6, abs=0.01) and found.auc == pytest.approx(5 / 6, abs=0.01)
    assert found.log_loss == pytest.approx(found.event_log_loss) and found.event_log_loss < found.base_log_loss
    assert ece(np.full(1000, 0.9), np.r_[np.ones(600), np.zeros(400)]) == pytest.approx(0.3)
    assert sum(count for _, _, count in reliability(chances, events)) == 20_000
    assert calibration(np.zeros(0), np.zeros(0), np.zeros(0)).num == 0
