from __future__ import annotations

import math

import numpy as np
import pytest
import tinker
from tinker import types

from everlearn.rewards.reward import Part, Reward
from everlearn.rl import measures
from everlearn.rl.datums import datums_of
from everlearn.rl.trajectory import Action, Failure, Trajectory, TrajectoryGroup, Transition

SEEN = tinker.ModelInput.from_ints([1, 2])


def turn(logprobs: list[float], hit: float, cut: bool = False, **metrics: float) -> Transition:
    action = Action([5] * len(logprobs), logprobs, "length" if cut else "stop")
    return Transition(SEEN, action, Reward((Part("hit", hit),)), True, metrics)


def test_rollouts_are_measured_by_part_and_failures_are_only_counted():
    good, other = (
        Trajectory([turn([-1.0, -2.0], 1.0, right=1.0)], seconds=2.0),
        Trajectory([turn([-3.0], 0.0, True, right=0.0)], seconds=1.0),
    )
    failed = Trajectory([turn([-100.0] * 9, 50.0)], Failure("timeout", "late"), 99.0)
    first = TrajectoryGroup([good, other, failed], [Reward((Part("place", 2.0),)), Reward(), Reward()])
    same = TrajectoryGroup([good, good], [Reward(), Reward()])
    found = measures.of_rollouts([first, same])
    assert found["episodes"] == 5 and found["failed"] == found["failed/timeout"] == 1
    assert found["reward/hit"] == 0.75 and found["reward/place"] == 0.5 and found["reward/total"] == 1.25
    assert found["env/right"] == 0.75 and found["truncated"] == 0.25
    assert found["tokens/sampled"] == 7 and found["tokens/mean"] == 1.75 and found["tokens/max"] == 2
    assert found["entropy"] == pytest.approx((3 * (1.0 + 2.0) + 3.0) / 7)
    assert found["groups/collapsed"] == 0.5 and found["seconds/episode_max"] == 2.0
    empty = measures.of_rollouts([TrajectoryGroup([failed], [Reward()])])
    assert empty["failed"] == 1 and "reward/total" not in empty and empty["groups/collapsed"] == 1.0
    assert measures.of_batch([[object(), object()], []]) == {"groups/trained": 1.0}


def test_the_distance_of_policies_is_its_formula():
    data = [
        datum for logprobs in ([-1.0, -2.0], [-0.5]) for datum in datums_of(Trajectory([turn(logprobs, 1.0)]), [1.0], sequence_mask=True)
    ]
    moved = [[-9.0, -1.5, -2.5], [-9.0, -0.25]]  # the first position of each belongs to the prompt
    outputs = [{"logprobs": types.TensorData.from_numpy(np.array(row, np.float32))} for row in moved]
    found = measures.of_training(data, outputs)
    gaps = [-0.5, -0.5, 0.25]
    ratios = [math.exp(gap) for gap in gaps]
    assert found["tokens/trained"] == 3
    assert found["kl/k1"] == pytest.approx(-sum(gaps) / 3)
    assert found["kl/k3"] == pytest.approx(sum(ratio - 1 - gap for ratio, gap in zip(ratios, gaps, strict=True)) / 3)
    assert found["ratio/max"] == pytest.approx(max(ratios)) and found["ratio/min"] == pytest.approx(min(ratios))
    assert found["ess"] == pytest.approx(sum(ratios) ** 2 / (3 * sum(ratio**2 for ratio in ratios)))
    same = [{"logprobs": datum.loss_fn_inputs["logprobs"]} for datum in data]
    assert measures.of_training(data, same) == {"tokens/trained": 3, "kl/k1": 0, "kl/k3": 0, "ratio/max": 1, "ratio/min": 1, "ess": 1}
    assert measures.of_training([], []) == {"tokens/trained": 0.0}


def test_a_token_of_which_the_policy_was_certain_counts():
    """Its log-probability is exactly 0, which below temperature 1 is common; a prompt's positions have 0 too, and don't count."""
    data = datums_of(Trajectory([turn([0.0, -1.0], 1.0)]), [1.0], sequence_mask=True)
    outputs = [{"logprobs": types.TensorData.from_numpy(np.array([-9.0, -2.0, -1.0], np.float32))}]
    found = measures.of_training(data, outputs)
    assert found["tokens/trained"] == 2 and found["kl/k1"] == 1.0 and found["ratio/min"] == pytest.approx(math.exp(-2.0))
