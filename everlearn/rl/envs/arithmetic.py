"""Sums: "What is 12 + 34?", a number as the answer. Small enough to see a policy learn on two cores, and with a held-out split.

The answer is begun for the policy ("12 + 34 ="): a small model that is only asked explains, and what is never done earns no reward.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rewards.rules import read_number
from everlearn.rl.env import EnvGroup, SameTask, StepResult, StopCondition, deal
from everlearn.rl.prompts import ChatMl

HELD_OUT = 5  # one pair of numbers in so many is held out


class SumRewards(msgspec.Struct, frozen=True):
    """`parsed` is lost by an answer that is no number and nothing else."""

    right: float = 1.0
    parsed: float = 0.1


class SumEnv:
    """One sum, one answer."""

    def __init__(self, a: int, b: int, chat: ChatMl, rewards: SumRewards | None = None):
        self.a, self.b, self.chat, self.rewards = a, b, chat, rewards or SumRewards()

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        return self.chat.ask(f"What is {self.a} + {self.b}?", begun=f"{self.a} + {self.b} ="), self.chat.stop

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        answer = self.chat.decode(action)
        found, wanted = read_number(answer), self.a + self.b
        right = found == wanted
        parts = [
            Part(
                "parsed", 0.0 if found is not None else -self.rewards.parsed, "" if found is not None else f"{answer[:80]!r} is no number"
            ),
            Part("right", self.rewards.right * right, f"{answer[:80]!r} {'is' if right else 'is not'} {wanted}"),
        ]
        metrics = {"right": float(right), "parsed": float(found is not None)}
        return StepResult(Reward(tuple(parts)), True, metrics=metrics, logs={"sum": f"{self.a} + {self.b}", "answer": answer})


def is_held_out(a: int, b: int, seed: int) -> bool:
    """Whether a pair belongs to the held-out split: one in five, decided by its digest; a + b and b + a go together."""
    digest = hashlib.blake2b(f"{seed}:{min(a, b)}:{max(a, b)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


class Sums:
    """A dataset of sums of two numbers below `below`. Task `n` of a split follows from `seed`; pairs of the splits are disjoint."""

    def __init__(
        self,
        chat: ChatMl,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
        below: int = 100,
        batches: int = 1000,
        groups_per_batch: int = 16,
        group_size: int = 8,
        rewards: SumRewards | None = None,
    ):
        if below < 10:
            raise InvalidRequest(f"sums of numbers below {below} are too few to hold some out; below must be at least 10", param="below")
        if split not in ("train", "test"):
            raise InvalidRequest(f"there is no split {split!r}; there are train and test", param="split")
        if not any(is_held_out(a, b, seed) for a in range(below) for b in range(below)):
            raise InvalidRequest(f"seed {seed} holds none of the sums below {below} out; take another seed", param="seed")
        self.chat, self.seed, self.split, self.below = chat, seed, split, below
        self.batches, self.groups_per_batch, self.group_size, self.rewards = batches, groups_per_batch, group_size, rewards

    def __len__(self) -> int:
        return self.batches

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, self.batches, self.groups_per_batch, self.group)

    def group(self, number: int) -> SameTask:
        a, b = self.task(number)
        return SameTask(lambda: SumEnv(a, b, self.chat, self.rewards), self.group_size, ["sums"])

    def task(self, number: int) -> tuple[int, int]:
        """The two numbers; drawn again until they are of this split."""
        rng = random.Random(f"sum:{self.split}:{self.seed}:{number}")
        while True:
            a, b = rng.randrange(self.below), rng.randrange(self.below)
            if is_held_out(a, b, self.seed) == (self.split == "test"):
                return a, b
