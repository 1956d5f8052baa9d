"""Environments of the tinker-cookbook, played unchanged: `CookbookTasks(their_dataset)` is a dataset here.

Their vocabulary is ours, so little has to be done. Rewards are one part, `reward`; what looks at a whole group gets the cookbook's own
trajectories. A first prompt that is over an environment's own budget, which the cookbook scores without sampling, is a failure here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward
from everlearn.rl.env import Env, EnvGroup, Metrics, StepResult, StopCondition
from everlearn.rl.trajectory import Trajectory


class CookbookTasks:
    """A dataset from an `RLDataset`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return [CookbookGroup(builder) for builder in self.dataset.get_batch(index)]


class CookbookGroup(EnvGroup):
    """A group from an `EnvGroupBuilder`."""

    def __init__(self, builder: Any):
        self.builder = builder

    async def make_envs(self) -> Sequence[Env]:
        return [CookbookEnv(env) for env in await self.builder.make_envs()]

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> Sequence[tuple[Reward | float, Metrics]]:
        theirs = [_theirs(trajectory) for trajectory in trajectory_group]
        found = await self.builder.compute_group_rewards(theirs, [env.env for env in env_group if isinstance(env, CookbookEnv)])
        return [(Reward.of(reward, "group"), metrics) for reward, metrics in found]

    async def cleanup(self) -> None:
        await self.builder.cleanup()

    def logging_tags(self) -> list[str]:
        return list(self.builder.logging_tags())


class CookbookEnv:
    """An environment from an `Env`."""

    def __init__(self, env: Any):
        self.env = env

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        found = await self.env.initial_observation()
        if not isinstance(found, tuple):
            raise InvalidRequest(
                f"the first prompt is over the environment's budget ({type(found).__name__}); shorten it, or raise the budget"
            )
        return found

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        done = await self.env.step(action, extra=extra)
        return StepResult(done.reward, done.episode_done, done.next_observation, done.next_stop_condition, done.metrics, done.logs)


def _theirs(trajectory: Trajectory) -> Any:
    """The same as the cookbook's own types."""
    from tinker_cookbook.completers import TokensWithLogprobs
    from tinker_cookbook.rl import types as cookbook

    transitions = [
        cookbook.Transition(
            ob=turn.observation,
            ac=TokensWithLogprobs(turn.action.tokens, turn.action.logprobs, turn.action.stop_reason, turn.action.sequence_id),
            reward=turn.reward.total,
            episode_done=turn.episode_done,
            metrics=dict(turn.metrics),
            logs=dict(turn.logs),
        )
        for turn in trajectory.transitions
    ]
    return cookbook.Trajectory(transitions=transitions, final_ob=tinker.ModelInput.empty())
