"""What was played: actions, transitions, trajectories, groups of them. Values only; `rollouts.py` makes them, `datums.py` trains on them.

An action holds the token ids and log-probabilities that the sampler returned. Nothing here or later turns tokens into text and back:
text has more than one spelling in tokens, and a policy must be trained on the spelling that it chose.

Axes: G members of a group, T turns of an episode.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward, total_of
from everlearn.rl.env import Metrics


class Action(msgspec.Struct, frozen=True):
    """What the policy sampled for one turn: ids, and the log-probability (nats) of each under the policy that drew it.

    `sequence_id` is the server's name for the sequence, for losses that look up what was recorded. `versions` names who drew each token,
    where more than one version may have (partial.py).
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "length"] = "stop"
    sequence_id: str | None = None
    versions: list[str] | None = None

    def check(self) -> Action:
        """Itself. Raises InvalidRequest unless every token has a finite log-probability that is at most 0 (but for rounding)."""
        if len(self.tokens) != len(self.logprobs):
            counts = f"{len(self.tokens)} tokens and {len(self.logprobs)} log-probabilities"
            raise InvalidRequest(f"a sampled sequence has {counts}; it must have as many of each", param="logprobs")
        if not self.tokens:
            raise InvalidRequest("a sampled sequence has no tokens; ask for at least one (max_tokens)", param="max_tokens")
        for index, logprob in enumerate(self.logprobs):
            if not math.isfinite(logprob) or logprob > 1e-3:
                message = f"sampled token {index} has the log-probability {logprob}; it must be finite and at most 0"
                raise InvalidRequest(message, param="logprobs")
        return self


class Transition(msgspec.Struct, frozen=True):
    """One turn: what the policy saw, what it did, what it got."""

    observation: tinker.ModelInput
    action: Action
    reward: Reward = Reward()
    episode_done: bool = False
    metrics: Metrics = {}
    logs: dict[str, Any] = {}


FailureKind = Literal["sampling", "environment", "timeout", "turns", "not_finite", "group", "verifier"]


class Failure(msgspec.Struct, frozen=True):
    """Why an episode has no score. An episode that failed is neither trained on nor part of anybody's baseline; it is counted.

    | kind | what happened |
    |---|---|
    | sampling | the server refused or couldn't sample |
    | environment | the environment raised, or returned something that is none |
    | timeout | the episode took longer than its limit |
    | turns | the episode was not over after the limit of turns |
    | not_finite | a reward was NaN or infinite, or had two parts of one name |
    | verifier | what judges the answer hung, raised or died |
    | group | the reward that compares the group's trajectories could not be computed, or its metrics are no finite numbers |
    """

    kind: FailureKind
    message: str
    turn: int = 0  # the turn it happened in, from 0


class Trajectory(msgspec.Struct, frozen=True):
    """One episode. With a `failure` it is what happened until then."""

    transitions: list[Transition]
    failure: Failure | None = None
    seconds: float = 0.0

    @property
    def reward(self) -> Reward:
        """The sum over turns, part by part."""
        return total_of(transition.reward for transition in self.transitions)

    @property
    def num_tokens(self) -> int:
        """How many tokens were sampled."""
        return sum(len(transition.action.tokens) for transition in self.transitions)

    @property
    def truncated(self) -> bool:
        """Whether an answer was cut off by the limit of tokens."""
        return any(transition.action.stop_reason == "length" for transition in self.transitions)


class TrajectoryGroup(msgspec.Struct, frozen=True):
    """What came of one group: a trajectory and a group reward for each member, failed ones included.

    `failures` are those of the group as a whole (it could not be made or named, or not given back).
    """

    trajectories_G: list[Trajectory]
    group_rewards_G: list[Reward]
    metrics_G: list[Metrics] = []
    tags: list[str] = []
    failures: list[Failure] = []

    @property
    def scored(self) -> list[int]:
        """Indices of the members that have a score."""
        return [index for index, trajectory in enumerate(self.trajectories_G) if trajectory.failure is None]

    def taught(self, mask_over_long: bool = False) -> list[int]:
        """Indices of the members that may be trained on; `mask_over_long` leaves out those whose answer was cut off."""
        return [index for index in self.scored if not (mask_over_long and self.trajectories_G[index].truncated)]

    @property
    def num_failed(self) -> int:
        return len(self.trajectories_G) - len(self.scored)

    def reward(self, index: int) -> Reward:
        """All that member `index` got: over its turns, and from the group. Raises InvalidRequest for one that failed."""
        trajectory = self.trajectories_G[index]
        if trajectory.failure is not None:
            raise InvalidRequest(f"member {index} failed ({trajectory.failure.kind}) and has no reward; ask only those in `scored`")
        return total_of([trajectory.reward, self.group_rewards_G[index]])
