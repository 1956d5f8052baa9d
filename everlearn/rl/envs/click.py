"""Click what was named: a picture of a form, a target, and a coordinate as the answer. What an agent on a screen must be able to do first.

The answer is "x,y": two whole numbers from 0 to 1000, x from the left edge to the right one, y from the upper edge to the lower one,
whatever size the picture has. (Qwen3-VL was taught to point in this range.)
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.env import EnvGroup, SameTask, StepResult, StopCondition, deal
from everlearn.rl.envs.forms import Form, Widget, make_form
from everlearn.rl.prompts import ChatMl

RANGE = 1000
ANSWER = re.compile(r"\s*\(?\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)?\s*")


class ClickRewards(msgspec.Struct, frozen=True):
    """What the parts are worth. `parsed` is lost by an answer that is no coordinate; `near` falls from there to 0 over the form's diagonal.

    With `near` 0, the default, there is no such part: a policy that hits now and then needs no slope, and a slope can be climbed halfway.
    """

    hit: float = 1.0
    parsed: float = 0.1
    near: float = 0.0


class ClickEnv:
    """One form, one target, one answer. `side` is the side of an image token in pixels; the form's sides must be multiples of it."""

    def __init__(self, form: Form, target: Widget, chat: ChatMl, side: int, rewards: ClickRewards | None = None):
        if form.width % side or form.height % side:
            size = f"{form.width} x {form.height}"
            raise InvalidRequest(f"a form of {size} pixels can't be cut into tokens of {side} x {side}; choose multiples", param="side")
        self.form, self.target, self.chat = form, target, chat
        self.num_tokens = (form.width // side) * (form.height // side)
        self.rewards = rewards or ClickRewards()
        self.used = False

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        if self.used:
            raise InvalidRequest("this environment was played; environments are used once: make another")
        self.used = True
        image = types.ImageChunk(data=self.form.png, format="png", expected_tokens=self.num_tokens)
        return self.chat.ask(instruction(self.target), image), self.chat.stop

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        answer = self.chat.decode(action)
        reward, metrics = self.score(answer)
        logs = {"target": f"{self.target.kind} {self.target.name}", "box": list(self.target.box), "answer": answer}
        return StepResult(reward, True, metrics=metrics, logs=logs)

    def score(self, answer: str) -> tuple[Reward, dict[str, float]]:
        """The reward of an answer, and `parsed` and `hit` (0 or 1) and `distance` (a share of the diagonal) as figures."""
        point = parse(answer)
        worth = self.rewards
        if point is None:
            parts = [Part("parsed", -worth.parsed, f"{answer[:80]!r} is no coordinate x,y from 0 to {RANGE}"), Part("hit", 0.0, "no click")]
            return Reward((*parts, *([Part("near", 0.0, "no click")] if worth.near else []))), {"parsed": 0.0, "hit": 0.0}
        x, y = point[0] * self.form.width / RANGE, point[1] * self.form.height / RANGE
        distance = self.target.distance(x, y)
        hit = distance == 0.0
        found = "hits" if hit else f"misses, by {distance:.0f} pixels,"
        parts = [Part("parsed", 0.0), Part("hit", worth.hit * hit, f"{point[0]},{point[1]} {found} {self.target.name}")]
        share = distance / self.form.diagonal
        if worth.near:
            parts.append(Part("near", worth.near * (1.0 - share), f"{distance:.0f} pixels away"))
        return Reward(tuple(parts)), {"parsed": 1.0, "hit": float(hit), "distance": share}


def instruction(target: Widget) -> str:
    return f"Click the {target.kind} {target.name}. Answer with x,y from 0 to {RANGE}."


def parse(answer: str) -> tuple[int, int] | None:
    """The point that an answer names, if it names one and says nothing else."""
    found = ANSWER.fullmatch(answer)
    if found is None:
        return None
    x, y = int(found[1]), int(found[2])
    return (x, y) if max(x, y) <= RANGE else None


def point_at(form: Form, target: Widget) -> str:
    """The answer that hits the middle of the target."""
    left, top, right, bottom = target.box
    return f"{round((left + right) / 2 / form.width * RANGE)},{round((top + bottom) / 2 / form.height * RANGE)}"


class ClickTasks:
    """A dataset of forms and targets. Task `number` of a `split` follows from `seed`; splits share no seed of a form.

    `columns` x `rows` image tokens of `side` pixels make a form: 14 x 10 of 32 (Qwen3-VL) are 448 x 320 pixels and 140 tokens.
    """

    def __init__(
        self,
        chat: ChatMl,
        seed: int = 0,
        split: str = "train",
        batches: int = 1000,
        groups_per_batch: int = 8,
        group_size: int = 8,
        columns: int = 14,
        rows: int = 10,
        side: int = 32,
        rewards: ClickRewards | None = None,
    ):
        self.chat, self.seed, self.split = chat, seed, split
        self.batches, self.groups_per_batch, self.group_size = batches, groups_per_batch, group_size
        self.columns, self.rows, self.side, self.rewards = columns, rows, side, rewards
        self.task(0)  # a form that has no room shows at once, not in the first batch

    def __len__(self) -> int:
        return self.batches

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, self.batches, self.groups_per_batch, self.group)

    def group(self, number: int) -> SameTask:
        form, target = self.task(number)
        tags = ["click", f"click/{target.kind}"]
        return SameTask(lambda: ClickEnv(form, target, self.chat, self.side, self.rewards), self.group_size, tags)

    def task(self, number: int) -> tuple[Form, Widget]:
        place = f"{self.split}:{self.seed}:{number}"
        form = make_form(place, self.columns * self.side, self.rows * self.side)
        return form, random.Random(f"target:{place}").choice(form.widgets)
