"""Each estimator against its formula written out slowly, and what must hold for all rewards."""

from __future__ import annotations

import math
from statistics import mean, stdev

import numpy as np
import pytest
import tinker
from hypothesis import assume, given
from hypothesis import strategies as st

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward
from everlearn.rl.advantages import (
    ESTIMATORS,
    advantages_of,
    format_penalty,
    gae,
    group_mean,
    group_mean_std,
    is_collapsed,
    leave_one_out,
    length_reward,
    masked,
    max_rl,
    overlong_penalty,
    per_turn,
    returns_to_go,
)
from everlearn.rl.trajectory import Action, Failure, Trajectory, TrajectoryGroup, Transition

# Two decimals: as coarse as rewards are, and no group of which one can't say whether all are equal.
number = st.integers(-10_000, 10_000).map(lambda value: value / 100)
rewards = st.lists(number, min_size=2, max_size=12)
gains = st.lists(st.integers(0, 100).map(lambda value: value / 100), min_size=2, max_size=12)
fraction = st.floats(0, 1)


def close(values) -> object:
    return pytest.approx(list(values), rel=1e-9, abs=1e-9)


@given(rewards)
def test_group_mean_is_its_formula(given_G):
    assert group_mean(given_G).tolist() == close(reward - mean(given_G) for reward in given_G)


@given(rewards)
def test_group_mean_std_is_its_formula(given_G):
    spread = stdev(given_G) + 1e-6
    wanted = [(reward - mean(given_G)) / spread if len(set(given_G)) > 1 else 0.0 for reward in given_G]
    assert group_mean_std(given_G).tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@given(rewards)
def test_leave_one_out_is_its_formula(given_G):
    wanted = [reward - mean(given_G[:place] + given_G[place + 1 :]) for place, reward in enumerate(given_G)]
    assert leave_one_out(given_G).tolist() == close(wanted)


@given(gains)
def test_max_rl_is_its_formula(given_G):
    average = mean(given_G)
    wanted = [(reward - average) / average if len(set(given_G)) > 1 else 0.0 for reward in given_G]
    assert max_rl(given_G).tolist() == close(wanted)


def test_max_rl_of_right_and_wrong_is_the_mean_over_the_right_ones_less_the_mean_over_all():
    """The paper's estimator: the average of the scores of successes, with the average of all as control variate."""
    right_G = np.array([1, 0, 0, 1, 0, 0, 0, 0.0])
    scores_G = np.random.default_rng(0).normal(size=8)  # stand for the gradient of each member's log-probability
    assert (max_rl(right_G) * scores_G).mean() == pytest.approx(scores_G[right_G == 1].mean() - scores_G.mean())


@pytest.mark.parametrize("name", ESTIMATORS)
@given(given_G=gains, data=st.data())
def test_what_every_estimator_keeps(name, given_G, data):
    estimate = ESTIMATORS[name]
    advantages = estimate(given_G)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-6)
    order = data.draw(st.permutations(range(len(given_G))))
    assert estimate([given_G[place] for place in order]).tolist() == close(advantages[place] for place in order)
    for a, b in zip(range(len(given_G)), range(1, len(given_G)), strict=False):
        if given_G[a] > given_G[b]:
            assert advantages[a] > advantages[b], "more reward, more advantage"
    assert is_collapsed(given_G) == (not advantages.any()) == (len(set(given_G)) == 1)


@given(rewards, number, st.integers(1, 100))
def test_shift_and_scale(given_G, shift, scale):
    assume(len(set(given_G)) > 1)
    changed = [reward * scale + shift for reward in given_G]
    assert group_mean(changed).tolist() == pytest.approx((group_mean(given_G) * scale).tolist(), rel=1e-6, abs=1e-6)
    assert leave_one_out(changed).tolist() == pytest.approx((leave_one_out(given_G) * scale).tolist(), rel=1e-6, abs=1e-6)
    assert group_mean_std(changed).tolist() == pytest.approx(group_mean_std(given_G).tolist(), rel=1e-2, abs=1e-3), "but for epsilon"


@given(gains, st.integers(1, 50))
def test_max_rl_does_not_depend_on_the_unit(given_G, scale):
    assert max_rl([reward * scale for reward in given_G]).tolist() == close(max_rl(given_G))


@given(st.lists(number, max_size=10), fraction)
def test_returns_to_go_are_their_formula(given_T, gamma):
    wanted = [sum(gamma ** (later - turn) * given_T[later] for later in range(turn, len(given_T))) for turn in range(len(given_T))]
    assert returns_to_go(given_T, gamma).tolist() == close(wanted)


@given(st.lists(st.lists(number, min_size=1, max_size=4), min_size=1, max_size=5), fraction)
def test_per_turn_is_its_formula(given_GT, gamma):
    returns_GT = [returns_to_go(given_T, gamma) for given_T in given_GT]
    for own, found in zip(returns_GT, per_turn(given_GT, gamma), strict=True):
        wanted = [own[turn] - mean(other[turn] for other in returns_GT if len(other) > turn) for turn in range(len(own))]
        assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-7)


def test_per_turn_credits_no_turn_with_what_came_before():
    early, late = per_turn([[1.0, 0.0], [0.0, 1.0]])
    assert early.tolist() == [0.0, -0.5] and late.tolist() == [0.0, 0.5]


@given(st.lists(st.tuples(number, number), max_size=8), fraction, fraction, number)
def test_gae_is_its_formula(pairs, gamma, lam, last):
    given_T, values_T = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    nexts_T = [*values_T[1:], last] if values_T else []
    errors_T = [r + gamma * after - v for r, after, v in zip(given_T, nexts_T, values_T, strict=True)]
    wanted = [sum((gamma * lam) ** (later - turn) * errors_T[later] for later in range(turn, len(pairs))) for turn in range(len(pairs))]
    advantages, returns = gae(given_T, values_T, gamma, lam, last)
    assert advantages.tolist() == close(wanted)
    assert (returns - advantages).tolist() == close(values_T)


@given(st.lists(st.tuples(number, number), min_size=1, max_size=8), fraction)
def test_gae_with_lambda_one_is_returns_less_values(pairs, gamma):
    given_T, values_T = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    returns = gae(given_T, values_T, gamma, 1.0)[1]
    assert returns.tolist() == pytest.approx(returns_to_go(given_T, gamma).tolist(), rel=1e-9, abs=1e-7)
    assert gae(given_T, returns.tolist(), gamma, 0.7)[0].tolist() == pytest.approx([0.0] * len(pairs), abs=1e-7), (
        "true values leave nothing"
    )


def test_overlong_penalty():
    assert [overlong_penalty(length, 100, 20) for length in (0, 80, 90, 100, 500)] == [0, 0, -0.5, -1, -1]
    with pytest.raises(InvalidRequest, match="margin is 0"):
        overlong_penalty(5, 100, 0)


@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=10))
def test_length_reward_is_its_formula(pairs):
    lengths, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = length_reward(lengths, right)
    if len(set(lengths)) == 1:
        assert not found.any()
        return
    share = [0.5 - (length - min(lengths)) / (max(lengths) - min(lengths)) for length in lengths]
    assert found.tolist() == close(value if good else min(0, value) for value, good in zip(share, right, strict=True))


def test_filters():
    assert is_collapsed([]) and is_collapsed([1.0]) and is_collapsed([0.1 * 3, 0.3]) and not is_collapsed([0.0, 1e-3])
    assert masked([1.0, -1.0], [False, True]).tolist() == [1.0, 0.0]
    assert format_penalty(True) == 0.0 and format_penalty(False, 0.2) == -0.2


@pytest.mark.parametrize("estimate", [group_mean, group_mean_std, leave_one_out, max_rl, returns_to_go, is_collapsed])
def test_what_is_no_number_is_refused(estimate):
    with pytest.raises(InvalidRequest, match="finite"):
        estimate([1.0, math.nan])


def test_refused_by_name():
    with pytest.raises(InvalidRequest, match="two rewards"):
        leave_one_out([1.0])
    with pytest.raises(InvalidRequest, match="at least 0"):
        max_rl([1.0, -1.0])
    with pytest.raises(InvalidRequest, match="2 rewards and 1 values"):
        gae([1.0, 2.0], [0.0])
    with pytest.raises(InvalidRequest, match="there are group_mean"):
        advantages_of(TrajectoryGroup([], []), "best")


def member(*turns: float, failed: bool = False, cut: bool = False) -> Trajectory:
    action = Action([5], [-1.0], "length" if cut else "stop")
    transitions = [Transition(tinker.ModelInput.from_ints([1]), action, Reward.of(turn)) for turn in turns]
    return Trajectory(transitions, Failure("timeout", "late") if failed else None)


def group(*members: Trajectory, extra: list[float] | None = None) -> TrajectoryGroup:
    return TrajectoryGroup(list(members), [Reward.of(value, "place") for value in extra or [0.0] * len(members)])


def test_members_that_failed_have_no_advantage_and_are_no_baseline():
    assert advantages_of(group(member(1.0), member(100.0, failed=True), member(0.0, 0.0))) == [[0.5], [], [-0.5, -0.5]]


def test_a_group_that_says_nothing_trains_nothing():
    assert advantages_of(group(member(1.0), member(1.0))) == [[], []]
    assert advantages_of(group(member(1.0), member(5.0, failed=True)), "leave_one_out") == [[], []], "one score is no comparison"
    assert advantages_of(TrajectoryGroup([], [])) == []


def test_group_rewards_count_and_come_with_the_last_turn():
    played = group(member(1.0, 0.0), member(0.0, 0.0), extra=[0.0, 3.0])
    assert advantages_of(played) == [[-1.0, -1.0], [1.0, 1.0]]
    assert advantages_of(played, "per_turn") == [[-1.0, -1.5], [1.0, 1.5]]


def test_equal_totals_may_still_tell_turns_apart():
    assert advantages_of(group(member(1.0, 0.0), member(0.0, 1.0)), "per_turn") == [[0.0, -0.5], [0.0, 0.5]]


def test_answers_that_were_cut_off_can_be_masked():
    played = group(member(1.0), member(0.0, cut=True))
    assert advantages_of(played) == [[0.5], [-0.5]]
    assert advantages_of(played, mask_over_long=True) == [[0.5], [0.0]]
