"""Tasks of reasoning-gym, unchanged: `ReasoningTasks(reasoning_gym.create_dataset("chain_sum", seed=1, size=2000), chat)`.

The policy is asked to put its answer between <answer> and </answer>; what stands there is scored by the task's own `score_answer`, in a
thread and within a time limit. A score that doesn't come, or is none, fails the episode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rewards.verifiers import judge
from everlearn.rl.env import EnvGroup, SameTask, StepResult, StopCondition
from everlearn.rl.prompts import ChatMl

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
INSTRUCTION = "Put the answer, and only the answer, between <answer> and </answer>."


class ReasoningEnv:
    """One task (`entry`), one answer. Rewards: `score`, the task's own, and `parsed`, lost by an answer without the tags."""

    def __init__(self, tasks: Any, entry: dict[str, Any], chat: ChatMl, seconds: float = 5.0, parsed: float = 0.1):
        self.tasks, self.entry, self.chat, self.seconds, self.parsed = tasks, entry, chat, seconds, parsed

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        return self.chat.ask(f"{self.entry['question']}\n{INSTRUCTION}"), self.chat.stop

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        text = self.chat.decode(action)
        found = ANSWER.findall(text)
        if not found:
            parts = (Part("parsed", -self.parsed, "no <answer>"), Part("score", 0.0, "no <answer>"))
            return StepResult(Reward(parts), True, metrics={"parsed": 0.0, "score": 0.0}, logs={"said": text})
        answer = found[-1].strip()
        score = float(await judge(self.tasks.score_answer, answer, self.entry, seconds=self.seconds))
        parts = (Part("parsed", 0.0), Part("score", score, f"{answer[:100]!r} for {str(self.entry['answer'])[:100]!r}"))
        return StepResult(Reward(parts), True, metrics={"parsed": 1.0, "score": score}, logs={"said": text})


class ReasoningTasks:
    """A dataset of the tasks numbered from `first` to before `last`; two ranges of one reasoning-gym dataset make a held-out split."""

    def __init__(
        self,
        tasks: Any,
        chat: ChatMl,
        first: int = 0,
        last: int | None = None,
        groups_per_batch: int = 8,
        group_size: int = 8,
        seconds: float = 5.0,
    ):
        self.tasks, self.chat, self.seconds = tasks, chat, seconds
        self.first, self.last = first, len(tasks) if last is None else last
        self.groups_per_batch, self.group_size = groups_per_batch, group_size
        if not 0 <= self.first <= self.last - groups_per_batch or self.last > len(tasks):
            raise InvalidRequest(
                f"tasks from {first} to {self.last} of {len(tasks)} make no batch of {groups_per_batch} groups; "
                "create the dataset with a larger size, or choose another range",
                param="last",
            )

    def __len__(self) -> int:
        return (self.last - self.first) // self.groups_per_batch

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        if not 0 <= index < len(self):
            raise InvalidRequest(f"there is no batch {index}; batches go from 0 to {len(self) - 1}", param="index")
        start = self.first + index * self.groups_per_batch
        return [self._group(number) for number in range(start, start + self.groups_per_batch)]

    def _group(self, number: int) -> SameTask:
        entry = self.tasks[number]
        name = str(entry.get("metadata", {}).get("source_dataset", type(self.tasks).__name__))
        return SameTask(lambda: ReasoningEnv(self.tasks, entry, self.chat, self.seconds), self.group_size, ["reasoning", name])
