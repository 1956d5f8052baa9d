"""What an environment is. Names and meaning are those of the tinker-cookbook, so its environments are environments here.

An **environment** is used once: make it, play one episode, throw it away. Environments come in **groups**, whose members are compared
with each other; a **dataset** deals out batches of groups. An environment speaks tokens and images, never text: what the policy sampled
comes in as token ids, and what the policy shall see next goes out as a `tinker.ModelInput`.

Everything here is asynchronous, and one event loop plays many episodes. An environment that computes for long without awaiting holds up
all of them, out of reach of any time limit; such work belongs in `asyncio.to_thread` or in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward

if TYPE_CHECKING:
    from everlearn.rl.trajectory import Trajectory

StopCondition = Sequence[str] | Sequence[int] | None  # None: the model's own end; empty: nothing ends an answer but its length
Metrics = Mapping[str, float]


class StepResult(msgspec.Struct, frozen=True):
    """What an action led to.

    `reward` may be a bare number, which counts as one part. `next_observation` is the whole prompt of the next turn, not an addition to
    the last one; at the end of an episode nobody looks at it. `metrics` are averaged into curves; `logs` are shown with the rollout.
    """

    reward: Reward | float
    episode_done: bool
    next_observation: tinker.ModelInput = tinker.ModelInput.empty()
    next_stop_condition: StopCondition = None
    metrics: Metrics = {}
    logs: Mapping[str, Any] = {}


class Env(Protocol):
    """One episode's world."""

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        """The first prompt, and what ends the policy's answer to it."""
        ...

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        """Takes the sampled token ids. `extra["stop_reason"]` is "stop" or "length": whether the answer ended or was cut off."""
        ...


class EnvGroup(Protocol):
    """Environments whose trajectories are compared with each other: usually the same task several times."""

    async def make_envs(self) -> Sequence[Env]: ...

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> Sequence[tuple[Reward | float, Metrics]]:
        """A further reward for each trajectory that needs sight of all (a judge of pairs, say). Trajectories that failed aren't shown."""
        return [(Reward(), {}) for _ in trajectory_group]

    async def cleanup(self) -> None:
        """Gives back what make_envs took. Called once, after everything else, whatever happened."""
        return

    def logging_tags(self) -> list[str]:
        """Names under which this group's metrics are averaged, from coarse to fine."""
        return []


class SameTask(EnvGroup):
    """A group of `size` environments, each made by `make()` and alike."""

    def __init__(self, make: Callable[[], Env], size: int, tags: Sequence[str] = ()):
        if size < 1:
            raise InvalidRequest(f"a group of {size} environments can't be played; size must be at least 1", param="size")
        self.make, self.size, self.tags = make, size, list(tags)

    async def make_envs(self) -> Sequence[Env]:
        return [self.make() for _ in range(self.size)]

    def logging_tags(self) -> list[str]:
        return self.tags


class Dataset(Protocol):
    """Batches of groups by number. The same number gives the same tasks, so that a run can be continued where it stopped."""

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        """Batch `index`, 0 <= index < len(self). The groups are new: environments are used once."""
        ...

    def __len__(self) -> int:
        """How many batches there are."""
        ...


def deal(index: int, batches: int, groups_per_batch: int, group: Callable[[int], EnvGroup]) -> Sequence[EnvGroup]:
    """Batch `index` of a dataset whose groups are numbered on through its batches. Raises InvalidRequest for one that isn't there."""
    if not 0 <= index < batches:
        raise InvalidRequest(f"there is no batch {index}; batches go from 0 to {batches - 1}", param="index")
    return [group(index * groups_per_batch + place) for place in range(groups_per_batch)]
