"""A shop: "How much do 6 lamps cost together?", a tool that knows prices, and one that calculates.

Prices are drawn for each task, so nobody can know one without looking it up, and sums are large enough that a small model needs the
calculator. The agent is ordinary code on an `openai` client (everlearn/rl/tool_loop.py), played by an `AgentServer`.
"""

from __future__ import annotations

import ast
import hashlib
import math
import operator
import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rewards.rules import read_number
from everlearn.rl.agents import AgentGroup, Chat
from everlearn.rl.env import EnvGroup, deal
from everlearn.rl.tool_loop import converse
from everlearn.rl.tools import Tool, Toolbox, ToolFailed

ITEMS = (
    "lamp", "chair", "table", "desk", "stool", "mirror", "carpet", "clock", "vase", "kettle", "pan", "cup", "plate", "bowl", "fork",
    "spoon", "towel", "pillow", "blanket", "basket", "bucket", "broom", "hammer", "saw", "ladder", "rope", "tent", "bike", "helmet",
    "drum", "guitar", "camera",
)  # fmt: skip
HELD_OUT = 5  # one pair of item and count in so many is held out
OPERATORS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Task(msgspec.Struct, frozen=True):
    """`prices` are those of the whole shop, in euros."""

    item: str
    count: int
    prices: dict[str, int]

    @property
    def question(self) -> str:
        return f"How much do {self.count} {self.item}s cost together?"

    @property
    def answer(self) -> int:
        return self.count * self.prices[self.item]


def toolbox(task: Task, strict: bool = True) -> Toolbox:
    """The two tools of one task. `strict`: calls are held to their schemas where the model is decoded by grammar."""

    def price(item: Annotated[str, msgspec.Meta(max_length=20)]) -> int:
        """Looks up what one item costs."""
        if item not in task.prices:
            raise ToolFailed(f"there is no {item!r} in this shop; name one item in the singular")
        return task.prices[item]

    def calculate(expression: Annotated[str, msgspec.Meta(max_length=30)]) -> int | float:
        """Calculates, for example 2 * 30."""
        return evaluate(expression)

    return Toolbox([msgspec.structs.replace(Tool.of(function), strict=strict) for function in (price, calculate)])


def evaluate(expression: str) -> int | float:
    """A sum, difference, product or quotient of numbers. Raises ToolFailed for anything else."""
    try:
        found = _value(ast.parse(expression.strip(), mode="eval").body)
        if not math.isfinite(found):
            raise ValueError("it is too large")
        return found
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, OverflowError) as error:
        raise ToolFailed(f"{expression!r} can't be calculated ({error}); write numbers with + - * / and parentheses") from None


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        found: int | float = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        return int(found) if isinstance(found, float) and found.is_integer() else found
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError(f"{type(node).__name__} is neither a number nor one of the four operations")


class ShopAgent:
    """Asks once, and calls tools for as long as the model wants to, within `turns`. Rewards: `right` if the last number of the answer is
    the one that was asked for; `ended` is lost by an episode that comes to no answer."""

    def __init__(self, task: Task, turns: int = 5, max_tokens: int = 64, strict: bool = True, ended: float = 0.1):
        self.task, self.turns, self.max_tokens, self.strict, self.ended = task, turns, max_tokens, strict, ended

    async def __call__(self, chat: Chat) -> Reward:
        asked = [{"role": "user", "content": self.task.question}]
        talk = await converse(
            chat, asked, toolbox(self.task, self.strict), self.turns, max_tokens=self.max_tokens, parallel_tool_calls=False
        )
        found = read_number(talk.answer, anywhere=True) if talk.ended == "answer" else None
        right = found is not None and found == self.task.answer
        chat.metrics |= {"right": float(right), "ended": float(talk.ended == "answer"), **talk.metrics}
        chat.logs |= {"question": self.task.question, "answer": talk.answer, "wanted": self.task.answer, "tools": dict(talk.failed)}
        parts = (
            Part("right", float(right), f"{talk.answer[:80]!r} {'says' if right else 'does not say'} {self.task.answer}"),
            Part("ended", 0.0 if talk.ended == "answer" else -self.ended, "" if talk.ended == "answer" else f"no answer ({talk.ended})"),
        )
        return Reward(parts)


def is_held_out(item: str, count: int, seed: int) -> bool:
    digest = hashlib.blake2b(f"{seed}:{item}:{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


class Shop:
    """A dataset of purchases. Task `n` of a split follows from `seed`; pairs of item and count of the splits are disjoint."""

    def __init__(
        self,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
        batches: int = 1000,
        groups_per_batch: int = 8,
        group_size: int = 8,
        turns: int = 5,
        max_tokens: int = 64,
        strict: bool = True,
    ):
        if split not in ("train", "test"):
            raise InvalidRequest(f"there is no split {split!r}; there are train and test", param="split")
        self.seed, self.split, self.batches = seed, split, batches
        self.groups_per_batch, self.group_size = groups_per_batch, group_size
        self.turns, self.max_tokens, self.strict = turns, max_tokens, strict

    def __len__(self) -> int:
        return self.batches

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, self.batches, self.groups_per_batch, self.group)

    def group(self, number: int) -> AgentGroup:
        task = self.task(number)
        return AgentGroup(lambda: ShopAgent(task, self.turns, self.max_tokens, self.strict), self.group_size, ["shop"])

    def task(self, number: int) -> Task:
        """Drawn again until it is of this split."""
        rng = random.Random(f"shop:{self.split}:{self.seed}:{number}")
        prices = {item: rng.randrange(11, 100) for item in ITEMS}
        while True:
            item, count = rng.choice(ITEMS), rng.randrange(3, 20)
            if is_held_out(item, count, self.seed) == (self.split == "test"):
                return Task(item, count, prices)
