from __future__ import annotations

import math

import pytest

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward, total_of


def test_a_reward_is_the_sum_of_its_parts():
    reward = Reward((Part("right", 1.0, "4 is 4"), Part("long", -0.25)))
    assert reward.total == 0.75 and reward.values == {"right": 1.0, "long": -0.25}
    assert Reward().total == 0.0
    assert Reward.of(0.5).parts == (Part("reward", 0.5),) and Reward.of(reward) is reward


def test_rewards_of_several_turns_add_up_by_name():
    turns = [Reward((Part("hit", 0.0, "missed"), Part("cost", -0.1))), Reward((Part("hit", 1.0, "hit"),))]
    whole = total_of(turns)
    assert whole.values == {"hit": 1.0, "cost": -0.1}
    assert whole.parts[0].reason == "missed; hit"
    assert whole.total == pytest.approx(sum(turn.total for turn in turns))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_part_must_be_a_number(value: float):
    with pytest.raises(InvalidRequest, match="'hit' is"):
        Reward((Part("fine", 1.0), Part("hit", value))).check()


def test_no_two_parts_have_one_name():
    with pytest.raises(InvalidRequest, match="more than one part called hit"):
        Reward((Part("hit", 1.0), Part("hit", 2.0))).check()
