"""Token budgets: how many tokens an episode may sample, task by task, and what it costs to take more (Kimi K2, arXiv 2507.20534, 3.2).

Around any group whose environments answer to `step`, those of others included. The environment judges what the budget holds: of an
answer that goes beyond it, the tokens up to it; then the episode is over, and the reward has the part `budget`. So a right answer
that comes too late earns nothing but the penalty, and a group that compares its members sees no more of it. What was sampled stays what it
was: all of it is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.advantages import overlong_penalty
from everlearn.rl.env import Env, EnvGroup, Metrics, StepResult, StopCondition
from everlearn.rl.trajectory import Trajectory

PART = "budget"


class Budget(msgspec.Struct, frozen=True):
    """`tokens` may be sampled over all turns. Beyond them an episode gets -`penalty`. Over the last `margin` tokens before, the penalty
    grows in a line (`overlong_penalty`), so that answers are drawn in before they are cut off; 0: it comes at once.

    `max_tokens` of the policy bounds one answer whatever the budget says; budgets above it, times the turns, are never reached.
    """

    tokens: int
    penalty: float = 1.0
    margin: int = 0

    def check(self) -> Budget:
        """Itself. Raises InvalidRequest for what can't be meant."""
        if self.tokens < 1 or not 0 <= self.margin <= self.tokens:
            message = f"a budget of {self.tokens} tokens with a margin of {self.margin} can't be kept"
            raise InvalidRequest(f"{message}; tokens must be at least 1, and margin from 0 to tokens", param="tokens")
        if not 0 <= self.penalty < float("inf"):
            raise InvalidRequest(f"penalty is {self.penalty}; it is taken off: give a finite number of at least 0", param="penalty")
        return self

    def part(self, spent: int) -> Part:
        """What `spent` tokens cost, once an episode is over."""
        share = overlong_penalty(spent, self.tokens, self.margin) if self.margin else -float(spent > self.tokens)
        return Part(PART, self.penalty * share, f"{spent} of {self.tokens} tokens" if share else "")


class Budgeted(EnvGroup):
    """`group` within `budget`, which is that of each of its members. Everything else is the group's own."""

    def __init__(self, group: EnvGroup, budget: Budget):
        self.group, self.budget = group, budget.check()

    async def make_envs(self) -> Sequence[Env]:
        return [_BudgetedEnv(env, self.budget) for env in await self.group.make_envs()]

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> Sequence[tuple[Reward | float, Metrics]]:
        within = [_within(trajectory, self.budget.tokens) for trajectory in trajectory_group]
        return await self.group.compute_group_rewards(within, [env.env for env in env_group if isinstance(env, _BudgetedEnv)])

    async def cleanup(self) -> None:
        await self.group.cleanup()

    def logging_tags(self) -> list[str]:
        return self.group.logging_tags()


class _BudgetedEnv:
    def __init__(self, env: Env, budget: Budget):
        self.env, self.budget, self.spent = env, budget, 0

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        return await self.env.initial_observation()

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        left, self.spent = self.budget.tokens - self.spent, self.spent + len(action)
        over = self.spent > self.budget.tokens
        if over:
            action, extra = action[:left], {**(extra or {}), "stop_reason": "length"}
        result = await self.env.step(action, extra=extra)
        done = bool(result.episode_done) or over
        if not done:
            return result
        reward = Reward.of(result.reward)
        return msgspec.structs.replace(
            result,
            reward=Reward((*reward.parts, self.budget.part(self.spent))),
            episode_done=True,
            metrics={**result.metrics, "budget/used": self.spent / self.budget.tokens, "budget/over": float(over)},
        )


def _within(trajectory: Trajectory, tokens: int) -> Trajectory:
    """The episode as its environment saw it: of the last answer, what the budget held."""
    over = trajectory.num_tokens - tokens
    if over <= 0:
        return trajectory
    *before, last = trajectory.transitions
    left, action = len(last.action.tokens) - over, last.action
    versions = None if action.versions is None else action.versions[:left]
    cut = msgspec.structs.replace(
        action, tokens=action.tokens[:left], logprobs=action.logprobs[:left], stop_reason="length", versions=versions
    )
    return msgspec.structs.replace(trajectory, transitions=[*before, msgspec.structs.replace(last, action=cut)])
