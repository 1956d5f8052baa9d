"""The test by betting against its definition written out slowly, and what must hold whatever the outcomes are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.errors import InvalidRequest
from everlearn.loop.sequential import BLOCK, STAKES_J, Blocks, Outcome, blocks, bounds, course, crossing, log_wealth, read

outcomes = st.lists(st.tuples(st.booleans(), st.integers(0, 4).map(lambda value: value / 4)), max_size=120)


def split(pairs) -> tuple[np.ndarray, np.ndarray]:
    return read([Outcome(arm, value) for arm, value in pairs])


def slow_blocks(pairs) -> list[tuple[int, float, float]]:
    found, ours, theirs = [], [], []
    for place, (candidate, value) in enumerate(pairs):
        (ours if candidate else theirs).append(value)
        if ours and theirs and len(ours) + len(theirs) >= BLOCK:
            n, m = len(ours), len(theirs)
            found.append((place + 1, sum(ours) / n - sum(theirs) / m, n * m / (n + m)))
            ours, theirs = [], []
    return found


def slow_wealth(found: Blocks, difference: float, sign: int) -> list[float]:
    stakes, wealth = [1.0] * len(STAKES_J), []
    for gain, weight in zip(found.gains_B, found.weights_B, strict=True):
        for place, stake in enumerate(STAKES_J):
            stakes[place] *= 1 + min(0.5, stake * weight) * sign * (gain - difference)
        wealth.append(sum(stakes) / len(stakes))
    return wealth


def drawn(seed: int, num: int, champion: float, candidate: float, share: float = 0.5) -> Blocks:
    rng = np.random.default_rng(seed)
    arms_N = rng.random(num) < share
    return blocks(arms_N, (rng.random(num) < np.where(arms_N, candidate, champion)).astype(float))


@given(outcomes)
def test_blocks_are_their_definition(pairs):
    found, wanted = blocks(*split(pairs)), slow_blocks(pairs)
    assert found.ends_B.tolist() == [end for end, _, _ in wanted]
    assert found.gains_B.tolist() == pytest.approx([gain for _, gain, _ in wanted])
    assert found.weights_B.tolist() == pytest.approx([weight for _, _, weight in wanted])


@given(outcomes, st.floats(-0.9, 0.9), st.sampled_from([1, -1]))
def test_wealth_is_its_definition_and_never_negative(pairs, difference, sign):
    found = blocks(*split(pairs))
    wanted = slow_wealth(found, difference, sign)
    assert all(wealth > 0 for wealth in wanted)
    assert log_wealth(found, difference, sign == 1).tolist() == pytest.approx([math.log(wealth) for wealth in wanted], abs=1e-9)


@given(outcomes, st.data())
def test_what_is_shown_stays_shown_and_looking_often_changes_nothing(pairs, data):
    """The answer on the first part is the beginning of the answer on the whole."""
    part = data.draw(st.integers(0, len(pairs)))
    early, late = blocks(*split(pairs[:part])), blocks(*split(pairs))
    # to the last bits, whose rounding depends on how many numbers are added up
    assert log_wealth(early, 0.0).tolist() == pytest.approx(log_wealth(late, 0.0)[: len(early.ends_B)].tolist(), rel=1e-9, abs=1e-12)
    first = crossing(early, 0.0, 0.3)
    if first is not None:
        assert crossing(late, 0.0, 0.3) == first


@given(outcomes, st.integers(-9, 9), st.integers(-9, 9))
def test_what_is_excluded_is_an_interval(pairs, one, other):
    found, (low, high) = blocks(*split(pairs)), sorted((one / 10, other / 10))
    assert np.all(log_wealth(found, low) >= log_wealth(found, high) - 1e-9)
    assert np.all(log_wealth(found, low, False) <= log_wealth(found, high, False) + 1e-9)


def test_bounds_are_where_the_test_stops_excluding():
    found = drawn(1, 6000, 0.7, 0.8)
    low, high = bounds(found, 0.05, 0.05)
    assert 0 < low < 0.1 < high < 0.2
    assert crossing(found, low - 1e-4, 0.05) and crossing(found, low + 1e-4, 0.05) is None
    assert crossing(found, high + 1e-4, 0.05, False) and crossing(found, high - 1e-4, 0.05, False) is None
    assert bounds(drawn(1, 5, 0.7, 0.8), 0.05, 0.05) == (-1.0, 1.0)


def test_the_course_narrows_and_ends_at_the_bounds():
    found = drawn(2, 6000, 0.7, 0.8)
    steps = course(found, 0.05, 0.05)
    places, lows, highs = zip(*steps, strict=True)
    assert list(places) == sorted(places) and list(lows) == sorted(lows) and list(highs) == sorted(highs, reverse=True)
    assert (lows[-1], highs[-1]) == pytest.approx(bounds(found, 0.05, 0.05), abs=0.011)  # the grid's step
    assert course(drawn(2, 4, 0.7, 0.8), 0.05, 0.05) == []


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
def test_equal_arms_are_told_apart_no_more_often_than_alpha(share: float):
    """Looked at after every outcome, since a crossing counts wherever it was."""
    crossed = sum(crossing(drawn(seed, 2000, 0.8, 0.8, share), 0.0, 0.05) is not None for seed in range(300))
    assert crossed / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_a_calendar_is_no_difference():
    """The candidate gets 1 % of the traffic on bad days and 50 % on good ones; all-time means differ by a tenth, the versions don't."""
    crossed, apart = 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        late_N = np.arange(4000) >= 2000
        arms_N = rng.random(4000) < np.where(late_N, 0.5, 0.01)
        values_N = (rng.random(4000) < np.where(late_N, 0.8, 0.6)).astype(float)
        apart.append(values_N[arms_N].mean() - values_N[~arms_N].mean())
        crossed += crossing(blocks(arms_N, values_N), 0.0, 0.05) is not None
    assert np.mean(apart) > 0.1
    assert crossed / 200 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_differences_are_found_and_large_ones_at_once():
    small = [crossing(drawn(seed, 20_000, 0.75, 0.70), 0.0, 0.05, better=False) for seed in range(40)]
    large = [crossing(drawn(seed, 20_000, 0.75, 0.35), 0.0, 0.05, better=False) for seed in range(40)]
    assert sum(place is not None for place in small) >= 38
    assert np.median(large) < 200 and max(large) < 400
    assert np.median(small) < 5000


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_outcomes_lie_between_0_and_1(value: float):
    with pytest.raises(InvalidRequest, match=r"feedback\[1\] is"):
        read([Outcome(True, 0.5), Outcome(False, value)], name="feedback")


def test_a_limit_divides_and_caps():
    _, values_N = read([Outcome(True, 512), Outcome(False, 4096)], limit=1024)
    assert values_N.tolist() == [0.5, 1.0]
