"""What the loops send for `gspo` has the gradient of the paper's objective, in which every answer is one term, however long it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinker
import torch

from everlearn.losses.table import LOSSES, loss_and_grad
from everlearn.rewards.reward import Reward
from everlearn.rl.settings import Settings
from everlearn.rl.train import Learner
from everlearn.rl.trajectory import Action, Trajectory, TrajectoryGroup, Transition

SEEN = tinker.ModelInput.from_ints([1, 2])
LENGTHS, REWARDS = (1, 5, 2, 4), (0.0, 1.0, 0.25, 0.5)
BOUNDS = {"clip_low_threshold": 0.95, "clip_high_threshold": 1.1}


def answered(length: int, reward: float) -> Trajectory:
    action = Action([7] * length, [-0.5 - 0.25 * place for place in range(length)])
    return Trajectory([Transition(SEEN, action, Reward.of(reward), True)])


def paper(logprobs_y: torch.Tensor, behaviour_y: torch.Tensor, advantage: float) -> torch.Tensor:
    """min(s A, clip(s) A) of one answer y, s = (pi(y) / pi_old(y))^(1 / |y|) (Zheng et al., arXiv 2507.18071)."""
    s = ((logprobs_y - behaviour_y).sum() / len(logprobs_y)).exp()
    return torch.minimum(s * advantage, s.clamp(BOUNDS["clip_low_threshold"], BOUNDS["clip_high_threshold"]) * advantage)


@pytest.mark.parametrize("drift", [0.0, 0.02, 0.3])
def test_an_answer_is_one_term_however_long_it_is(service: tinker.ServiceClient, tmp_path: Path, drift: float):
    learner = Learner(service, Settings("tiny", 1, rank=4, loss="gspo", loss_config=dict(BOUNDS)), tmp_path)
    members = [answered(*one) for one in zip(LENGTHS, REWARDS, strict=True)]
    group = TrajectoryGroup(members, [Reward()] * len(members))
    (data,) = learner.data_of([group], learner.compare([group]))
    noise = torch.Generator().manual_seed(1)
    for datum, length, reward in zip(data, LENGTHS, REWARDS, strict=True):
        inputs = {name: torch.tensor(value.to_numpy()).double() for name, value in datum.loss_fn_inputs.items()}
        behaviour = inputs["logprobs"]
        logprobs = behaviour + drift * torch.randn(len(behaviour), generator=noise, dtype=torch.float64)
        _, grad = loss_and_grad(LOSSES["gspo"], logprobs, inputs, BOUNDS, [(0, len(logprobs))])
        leaf = logprobs[-length:].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(-paper(leaf, behaviour[-length:], reward - sum(REWARDS) / 4), leaf)
        torch.testing.assert_close(grad[-length:], wanted, rtol=1e-6, atol=1e-9)
        assert not grad[:-length].any()
        if not drift:
            assert float(-grad.sum()) == pytest.approx(reward - sum(REWARDS) / 4)
