"""A corridor of doors: every door shows a sign and has four handles, and what lies behind the doors is counted at the exit only.

Which handle is right is a secret of the house, the same for the same sign; one coin lies behind it. There is one turn for each door,
and the one reward at the end says how many coins there were, not where. Coins may also lie on the floor: they are shown, they count, and
no choice brings them; a toll takes as many as lie there on average. So the sum at the exit is the sum of many choices and of luck, and to
learn from it is to find out which choice was worth what (Hung et al., 2019, arXiv 1810.06721, has a task of such a kind, with a key,
apples and a door).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.env import Env, EnvGroup, StepResult, StopCondition, deal
from everlearn.rl.prompts import ChatMl

SIGNS = ("sun", "moon", "star", "tree", "fish", "bird", "ship", "bell")
HANDLES = ("a", "b", "c", "d")
FLOOR = 3  # at most so many coins lie before one door
HANDLE = re.compile(rf"\W*([{''.join(HANDLES)}])\b", re.I)
INTRO = (
    "You walk through a corridor. Every door has a sign and the handles a, b, c and d, of which one is right, always the same for the "
    "same sign. Behind the right one lies a coin. Your coins are counted when you leave. Answer with one letter. "
)


class CorridorEnv:
    """One walk: `signs` and the coins on the `floor` before each door (empty: no such coins), and the `house`, the right handle by sign."""

    def __init__(self, signs: Sequence[str], floor: Sequence[int], house: Mapping[str, str], chat: ChatMl, intro: str = INTRO):
        self.signs, self.floor, self.house, self.chat, self.intro = signs, floor, house, chat, intro
        self.toll = len(signs) * FLOOR / 2 if floor else 0.0  # what lies on the floor on average
        self.chosen: list[str] = []
        self.observation = tinker.ModelInput.empty()

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        self.observation = self.chat.ask(self.intro + self._door())
        return self.observation, self.chat.stop

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        found = HANDLE.match(self.chat.decode(action))
        self.chosen.append(found[1].lower() if found else "")
        if len(self.chosen) < len(self.signs):
            self.observation = self.chat.go_on(self.observation, action, self._door())
            return StepResult(0.0, False, self.observation, self.chat.stop)
        doors = len(self.signs)
        right = sum(handle == self.house[sign] for handle, sign in zip(self.chosen, self.signs, strict=True))
        parts = (
            Part("right", float(right), f"{right} of {doors} handles were right: {' '.join(map(str, self.chosen))}"),
            Part("floor", float(sum(self.floor)), f"{sum(self.floor)} coins lay on the floor"),
            Part("toll", -float(self.toll), f"{self.toll} coins are paid for leaving"),
        )
        return StepResult(Reward(parts), True, metrics={"right": right / doors})

    def _door(self) -> str:
        number = len(self.chosen)
        floor = f" {self.floor[number]} coins lie on the floor." if self.floor else ""
        return f"Door {number + 1} shows: {self.signs[number]}.{floor} Which handle?"


class CorridorGroup(EnvGroup):
    """The same doors several times; what lies on the floor differs from walk to walk."""

    def __init__(self, signs: Sequence[str], floors: Sequence[Sequence[int]], house: Mapping[str, str], chat: ChatMl, intro: str = INTRO):
        self.signs, self.floors, self.house, self.chat, self.intro = signs, floors, house, chat, intro

    async def make_envs(self) -> Sequence[Env]:
        return [CorridorEnv(self.signs, floor, self.house, self.chat, self.intro) for floor in self.floors]

    def logging_tags(self) -> list[str]:
        return ["corridor"]


class CorridorTasks:
    """A dataset of walks past `doors` doors with one of so many `signs` each. `seed` fixes the house, and with the split each walk's doors.

    `luck` puts from 0 to 3 coins on the floor before every door, anew for each member of a group.
    """

    def __init__(
        self,
        chat: ChatMl,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
        doors: int = 8,
        signs: int = len(SIGNS),
        luck: bool = False,
        batches: int = 1000,
        groups_per_batch: int = 8,
        group_size: int = 8,
        intro: str = INTRO,
    ):
        if not 1 <= signs <= len(SIGNS):
            raise InvalidRequest(f"signs is {signs}; there are from 1 to {len(SIGNS)} of them", param="signs")
        for name, number in (("doors", doors), ("batches", batches), ("groups_per_batch", groups_per_batch), ("group_size", group_size)):
            if number < 1:
                raise InvalidRequest(f"{name} is {number}; it must be at least 1", param=name)
        if split not in ("train", "test"):
            raise InvalidRequest(f"there is no split {split!r}; there are train and test", param="split")
        self.chat, self.seed, self.split, self.doors, self.signs = chat, seed, split, doors, SIGNS[:signs]
        self.luck, self.intro = luck, intro
        self.batches, self.groups_per_batch, self.group_size = batches, groups_per_batch, group_size
        self.house = house_of(seed)

    def __len__(self) -> int:
        return self.batches

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, self.batches, self.groups_per_batch, self.group)

    def group(self, number: int) -> CorridorGroup:
        rng = random.Random(f"corridor:{self.split}:{self.seed}:{number}")
        signs = rng.choices(self.signs, k=self.doors)
        floors = [[rng.randint(0, FLOOR) for _ in signs if self.luck] for _ in range(self.group_size)]
        return CorridorGroup(signs, floors, self.house, self.chat, self.intro)


def house_of(seed: int) -> dict[str, str]:
    """The right handle for each sign; every handle is right for as many signs."""
    handles = [HANDLES[place % len(HANDLES)] for place in range(len(SIGNS))]
    random.Random(f"house:{seed}").shuffle(handles)
    return dict(zip(SIGNS, handles, strict=True))
