"""Exact tests against sums over all outcomes, intervals against what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.errors import InvalidRequest
from everlearn.loop.paired import (
    Interval,
    Pair,
    between,
    bootstrap,
    difference,
    exact_difference,
    mcnemar,
    proportion,
    read,
    upper_tail,
)

counts = st.integers(0, 9)


@given(counts, counts)
def test_mcnemar_is_the_share_of_all_coin_throws(better: int, worse: int):
    throws = list(itertools.product((0, 1), repeat=min(better + worse, 12)))
    if better + worse <= 12:
        assert mcnemar(better, worse) == pytest.approx(sum(sum(throw) >= worse for throw in throws) / len(throws))


@given(counts, st.integers(1, 30), st.floats(0.01, 0.99))
def test_the_tail_is_its_sum(least: int, num: int, rate: float):
    wanted = sum(math.comb(num, k) * rate**k * (1 - rate) ** (num - k) for k in range(least, num + 1))
    assert upper_tail(least, num, rate) == pytest.approx(wanted, abs=1e-12)


def test_proportions_are_those_of_the_tables():
    """Clopper and Pearson, 95 % two-sided: 8 of 10, 0 of 20 and 20 of 20."""
    assert proportion(8, 10, 0.025) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert proportion(0, 20, 0.025) == pytest.approx((0.0, 0.1684), abs=1e-4)
    assert proportion(20, 20, 0.025) == pytest.approx((0.8316, 1.0), abs=1e-4)


@given(counts, counts)
def test_the_exact_interval_excludes_0_where_the_test_rejects(better: int, worse: int):
    found = exact_difference(better, worse, 40, 0.05)
    assert found.low <= found.mean <= found.high
    if better + worse:
        assert (found.high < 0) == (mcnemar(better, worse) < 0.05)
        assert (found.low > 0) == (mcnemar(worse, better) < 0.05)


def test_the_bootstrap_covers_as_often_as_it_says_and_repeats_itself():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        found = bootstrap(rng.beta(2, 3, size=60) - 0.4, 0.05, resamples=400)
        covered += found.low <= 0.0 <= found.high
    assert 0.83 <= covered / 200 <= 0.96  # 90 % of the time, less a little for 60 prompts
    gains_N = rng.normal(size=50)
    assert bootstrap(gains_N, 0.05) == bootstrap(gains_N, 0.05)
    assert bootstrap(np.zeros(0), 0.05) == Interval(0.0, -1.0, 1.0, 0)


def test_rights_and_wrongs_are_exact_and_shades_are_bootstrapped():
    binary = read([Pair(0, 1)] * 8 + [Pair(1, 0)] * 2 + [Pair(1, 1)] * 10, "held_out")
    assert difference(binary, 0.05) == exact_difference(8, 2, 20, 0.05)
    shades = read([Pair(0.25, 0.5), Pair(0.5, 0.5), Pair(0.5, 0.75)] * 10, "held_out")
    assert difference(shades, 0.05) == bootstrap(shades[:, 1] - shades[:, 0], 0.05)


def test_two_intervals_make_one_of_their_difference():
    champion, candidate = Interval(0.5, 0.4, 0.6, 100), Interval(0.6, 0.52, 0.66, 90)
    found = between(champion, candidate)
    assert (found.mean, found.num) == (pytest.approx(0.1), 90)
    assert found.low == pytest.approx(0.1 - math.hypot(0.08, 0.1))
    assert found.high == pytest.approx(0.1 + math.hypot(0.06, 0.1))


def test_judgements_lie_between_0_and_1():
    with pytest.raises(InvalidRequest, match=r"held_out\[1\] is \[0.0, 2.0\]"):
        read([Pair(0, 1), Pair(0, 2)], "held_out")
