"""Token budgets: what is over the budget isn't judged, ends the episode, and costs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.budget import Budget, Budgeted
from everlearn.rl.datums import datums_of
from everlearn.rl.env import Env, Metrics, SameTask, StepResult
from everlearn.rl.envs.verifiers import VerifiersEnv, VerifiersGroup
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.rollouts import play_now
from everlearn.rl.trajectory import Action, Trajectory, Transition


class Echo:
    """Two turns; pays 0.1 for each token that it is shown."""

    def __init__(self):
        self.seen: list[tuple[list[int], str]] = []

    async def initial_observation(self) -> tuple[tinker.ModelInput, list[int]]:
        return tinker.ModelInput.from_ints([20, 30]), []

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        self.seen.append((action, extra["stop_reason"]))
        reward = Reward((Part("tokens", 0.1 * len(action)),))
        return StepResult(reward, len(self.seen) == 2, tinker.ModelInput.from_ints([20, 30, *action, 31]), [], {"turn": len(self.seen)})


def through(budget: Budget, *actions: list[int]) -> tuple[Echo, list[StepResult]]:
    async def play() -> tuple[Echo, list[StepResult]]:
        env = Echo()
        (inside,) = await Budgeted(SameTask(lambda: env, 1, ["echo"]), budget).make_envs()
        await inside.initial_observation()
        return env, [await inside.step(action, extra={"stop_reason": "stop"}) for action in actions]

    return asyncio.run(play())


def test_within_the_budget_nothing_is_taken():
    env, (one, two) = through(Budget(6), [1, 2, 3], [4, 5, 6])
    assert [action for action, _ in env.seen] == [[1, 2, 3], [4, 5, 6]] and one.reward.values == {"tokens": pytest.approx(0.3)}
    assert two.reward.values == {"tokens": pytest.approx(0.3), "budget": 0.0} and two.metrics["budget/used"] == 1.0


def test_over_the_budget_the_rest_is_not_judged_and_it_costs():
    env, (_, two) = through(Budget(5, penalty=2.0), [1, 2, 3], [4, 5, 6])
    assert env.seen[1] == ([4, 5], "length") and two.reward.values == {"tokens": pytest.approx(0.2), "budget": -2.0}
    assert two.reward.parts[-1].reason == "6 of 5 tokens" and two.metrics["budget/over"] == 1.0
    _, (one,) = through(Budget(2), [1, 2, 3])
    assert one.episode_done, "an episode that may go on by its own rules ends with its budget"


def test_a_margin_draws_answers_in_before_they_are_cut_off():
    _, (_, two) = through(Budget(8, penalty=1.0, margin=4), [1, 2, 3], [4, 5, 6])
    assert two.reward.values["budget"] == pytest.approx(-0.5)


@pytest.mark.parametrize("wrong", [Budget(0), Budget(4, margin=5), Budget(4, penalty=-1.0), Budget(4, penalty=float("nan"))])
def test_budgets_that_cannot_be_meant(wrong: Budget):
    with pytest.raises(InvalidRequest):
        Budgeted(SameTask(Echo, 1), wrong)


class Shortest(SameTask):
    """Pays for few tokens, and keeps what it was shown."""

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> Sequence[tuple[Reward | float, Metrics]]:
        self.shown = trajectory_group
        return [(-float(one.num_tokens), {}) for one in trajectory_group]


def test_what_compares_a_group_sees_what_the_budget_held():
    seen = tinker.ModelInput.from_ints([20])
    first = Action([1, 2, 3], [-1.0] * 3)
    long = Action([4, 5, 6], [-1.0, -2.0, -3.0], versions=["a", "a", "b"])
    members = [Trajectory([Transition(seen, first), Transition(seen, last)], seconds=2.0) for last in (long, Action([4, 5], [-1.0] * 2))]
    inner = Shortest(Echo, 2)
    rewards = asyncio.run(Budgeted(inner, Budget(5)).compute_group_rewards(members, []))
    cut, whole = inner.shown
    assert cut.transitions[0] == members[0].transitions[0] and cut.seconds == 2.0
    assert cut.transitions[1].action == Action([4, 5], [-1.0, -2.0], "length", versions=["a", "a"])
    assert whole is members[1] and [reward for reward, _ in rewards] == [-5.0, -5.0]
    assert members[0].num_tokens == 6, "what is trained on stays as it was"


def test_an_environment_that_its_budget_ended_is_rendered_before_it_is_scored():
    """verifiers makes the completion, which its rubric reads, when a rollout is cleaned up; once, and before the scores."""

    class Rubric:
        async def score_group(self, states: list[dict[str, Any]]) -> None:
            for state in states:
                state |= {"reward": float(len(state["completion"])), "metrics": {}}

    class Theirs:
        rubric = Rubric()

        async def cleanup(self, state: dict[str, Any]) -> None:
            assert "completion" not in state
            state["completion"] = "said"

    async def play() -> list[float]:
        group = VerifiersGroup(Theirs(), {}, 2, None)  # type: ignore[arg-type]
        envs = await group.make_envs()
        for env in envs:
            assert isinstance(env, VerifiersEnv)
            env.state = {}
        await envs[0].clean_up()  # type: ignore[attr-defined]
        found = await group.compute_group_rewards([], envs)
        await group.cleanup()
        return [Reward.of(reward).total for reward, _ in found]

    assert asyncio.run(play()) == [4.0, 4.0]


def test_each_task_has_its_own_on_a_server(policy: TinkerPolicy):
    """Six tokens a turn: the first group's budget holds one turn, the second's both. What was sampled is trained on, all of it."""
    short, long = play_now([Budgeted(SameTask(Echo, 2, ["echo"]), Budget(tokens)) for tokens in (4, 12)], policy, seed=1)
    for trajectory in short.trajectories_G:
        assert trajectory.failure is None and len(trajectory.transitions) == 1 and trajectory.num_tokens == 6
        assert trajectory.reward.values == {"tokens": pytest.approx(0.4), "budget": -1.0}
        (datum,) = datums_of(trajectory, [1.0])
        assert (datum.loss_fn_inputs["advantages"].to_numpy() == 1).sum() == 6
    assert [one.reward.values for one in long.trajectories_G] == [{"tokens": pytest.approx(1.2), "budget": 0.0}] * 2
    assert short.tags == ["echo"]
