"""Memory as an environment: one episode decides on the chunks of one moment, writes what was masked, and answers from what is left.

    what to do with chunk 1? ... chunk n?   ->  mask and allocate  ->  write hole 1 ... hole m  ->  question 1? ... question k?

Every turn has a prompt of its own, the same that `Decided`, `Generate` and `Asking` send when the memory is used. All members of a group
begin at the same moment. The reward is a sum of named parts:

| part | what |
|---|---|
| `likelihood` | mean over the questions of exp(-max(0, fall) / scale), the fall being that of the right answer's log-likelihood (nats) from the window before to the window after, under weights that aren't trained: 1 minus the importance that `Counterfactual` gives to what was lost |
| `correct` | the share of the questions that the policy itself answers rightly |
| `over_budget` | minus: what was written beyond the caps and cut off, as a share of the caps |
| `rewrites` | minus: the holes that were written, each of which costs a model's time and may go wrong |
| `undecided` | minus: the share of the decisions that are none |
"""  # noqa: E501 - a table's row is a line

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import tinker

from everlearn.errors import InternalError, InvalidRequest
from everlearn.memory.asking import NOTHING, QUESTION
from everlearn.memory.decide import decision
from everlearn.memory.generate import filled, rewriting, written
from everlearn.memory.mask import Masking
from everlearn.memory.moments import SQUEEZE, Moment, moments, pieces_of
from everlearn.memory.orders import UNDECIDED, level_of
from everlearn.memory.plan import FLOOR, Plan, planned, settled
from everlearn.memory.scores import contains, kept
from everlearn.memory.suites import Case, Question
from everlearn.memory.turns import pressed
from everlearn.memory.window import Chunk, Window, line, others
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.env import Env, EnvGroup, StepResult, StopCondition, deal
from everlearn.rl.prompts import ChatMl

DECISION, REFILL, ANSWER = "decision", "refill", "answer"  # what a turn of an episode is, in its logs
IN_VAIN = 16  # histories in a row without a moment, after which the rest is expected to have none either


class Pay(msgspec.Struct, frozen=True):
    """What each part of the reward weighs. Without `correct`, nobody is asked to answer. `scale` in nats."""

    likelihood: float = 1.0
    correct: float = 0.0
    over_budget: float = 0.1
    rewrites: float = 0.01
    undecided: float = 0.2
    scale: float = 2.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise InvalidRequest(f"{name} is {getattr(self, name)}; what a part weighs is finite and at least 0", param=name)
        if not self.scale or not (self.likelihood or self.correct):
            raise InvalidRequest("scale must be above 0, and likelihood or correct too: else nothing pays", param="scale")


class Judge:
    """How likely right answers are from what is shown, under the weights of `sampler`, which stay as they are."""

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl):
        self.sampler, self.chat = sampler, chat

    async def logprobs(self, chunks: Sequence[Chunk], questions: Sequence[Question]) -> list[float]:
        """For each question the log-likelihood (nats) of its first right answer, summed over its tokens."""
        asked = [(question_of(self.chat, chunks, question).to_ints(), self.chat.encode(question.answers[0])) for question in questions]
        futures = [self.sampler.compute_logprobs(tinker.ModelInput.from_ints([*prompt, *answer])) for prompt, answer in asked]
        found = []
        for future, (_, answer) in zip(futures, asked, strict=True):
            values = [value for value in (await future)[-len(answer) :] if value is not None]
            if len(values) != len(answer):
                raise InternalError(f"{len(answer) - len(values)} of an answer's {len(answer)} tokens have no log-probability")
            found.append(float(sum(values)))
        return found

    async def worths(
        self, chunks: Sequence[Chunk], places: Sequence[int], questions: Sequence[Question], before: Sequence[float], scale: float
    ) -> list[float]:
        """What the chunk at each place is worth to the questions, by the counterfactual: 1 - mean exp(-max(0, fall) / scale), the fall
        being from `before`, with all chunks, to the window without that line. 0 to 1; a forward pass for each place and question."""
        without = await asyncio.gather(*(self.logprobs(others(chunks, place), questions) for place in places))
        falls = [[max(0.0, then - now) for then, now in zip(before, one, strict=True)] for one in without]
        return [1.0 - sum(math.exp(-fall / scale) for fall in own) / len(own) for own in falls]


def question_of(chat: ChatMl, chunks: Sequence[Chunk], question: Question) -> tinker.ModelInput:
    return chat.ask(QUESTION.format(context="".join(pieces_of(chunks)).strip() or NOTHING, question=question.text))


class MemoryEnv:
    """One way through a moment. `before`: what the judge found of the window as it was. `worths`: of the chunks that are decided on, if
    they were weighed."""

    def __init__(
        self, moment: Moment, before: Sequence[float], chat: ChatMl, judge: Judge, pay: Pay, masking: Masking, worths: Sequence[float] = ()
    ):
        self.moment, self.before, self.chat, self.judge, self.pay, self.masking = moment, before, chat, judge, pay, masking
        self.worths = worths
        self.chunks = (*moment.window.chunks, moment.chunk)
        self.places = pressed(moment.window, masking, hold=False)
        self.levels: list[float | None] = []
        self.plan: Plan | None = None
        self.texts: list[str] = []
        self.over = 0  # tokens beyond the caps
        self.window: Window | None = None
        self.answers: list[float] = []

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        return decision(self.chat, self.chunks, self.places[0]), self.chat.stop

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        if self.plan is None:
            return await self._decided(action)
        if self.window is None:
            return await self._filled(self.plan, action)
        return self._answered(self.window, action)

    async def _decided(self, action: list[int]) -> StepResult:
        said = self.chat.decode(action)
        self.levels.append(level_of(said))
        place = self.places[len(self.levels) - 1]
        logs = {"kind": DECISION, "chunk": self.chunks[place].text, "said": said, "level": self.levels[-1]}
        if self.worths:
            logs["worth"] = self.worths[len(self.levels) - 1]
        if len(self.levels) < len(self.places):
            return self._next(decision(self.chat, self.chunks, self.places[len(self.levels)]), logs)
        chunks = list(self.chunks)
        for place, level in zip(self.places, self.levels, strict=True):
            chunks[place] = msgspec.structs.replace(chunks[place], importance=UNDECIDED if level is None else level)
        window = msgspec.structs.replace(self.moment.window, chunks=tuple(chunks[:-1]))
        self.plan = planned(window, chunks[-1], self.masking, hold=False, least=lambda window, chunk: FLOOR)
        if self.plan.holes:
            return self._next(rewriting(self.chat, self.plan.chunks, self.plan.holes[0]), logs)
        return await self._settled(self.plan, logs)

    async def _filled(self, plan: Plan, action: list[int]) -> StepResult:
        hole = plan.holes[len(self.texts)]
        chunk = plan.chunks[hole.place]
        said = written(self.chat, chunk, action)
        self.over += max(0, len(self.chat.encode(line(chunk.role, said))) - hole.cap)
        self.texts.append(filled(self.chat, chunk, hole, action))
        logs = {"kind": REFILL, "chunk": chunk.text, "cap": hole.cap, "said": said}
        if len(self.texts) < len(plan.holes):
            return self._next(rewriting(self.chat, plan.chunks, plan.holes[len(self.texts)]), logs)
        return await self._settled(plan, logs)

    async def _settled(self, plan: Plan, logs: dict[str, Any]) -> StepResult:
        self.window, _ = settled(plan, self.texts, self.chat.encode)
        questions, pay = self.moment.questions, self.pay
        held = [kept(question, pieces_of(self.window.chunks)) for question in questions]
        metrics = {"kept": sum(held) / len(held), "holes": float(len(plan.holes)), **self._levels()}
        parts = []
        if pay.likelihood:
            after = await self.judge.logprobs(self.window.chunks, questions)
            falls = [max(0.0, then - now) for then, now in zip(self.before, after, strict=True)]
            left = sum(math.exp(-fall / pay.scale) for fall in falls) / len(falls)
            reason = f"right answers fell by {', '.join(f'{fall:.1f}' for fall in falls)} nats"
            parts.append(Part("likelihood", pay.likelihood * left, reason))
        caps = sum(hole.cap for hole in plan.holes)
        parts += [
            Part("over_budget", -pay.over_budget * self.over / max(caps, 1), f"{self.over} tokens beyond caps of {caps}"),
            Part("rewrites", -pay.rewrites * len(plan.holes), f"{len(plan.holes)} holes were written"),
            Part("undecided", -pay.undecided * metrics["undecided"], f"of {len(self.levels)} decisions"),
        ]
        reward = Reward(tuple(parts))
        if not pay.correct:
            return StepResult(reward, True, metrics=metrics, logs=logs)
        return self._next(question_of(self.chat, self.window.chunks, questions[0]), logs, reward, metrics)

    def _levels(self) -> dict[str, float]:
        """What was decided of chunks that a question needs, and of the others: measured, and no part of the reward."""
        needed: dict[str, list[float]] = {"level/needed": [], "level/other": []}
        for place, level in zip(self.places, self.levels, strict=True):
            evident = any(kept(question, pieces_of([self.chunks[place]])) for question in self.moment.questions)
            needed["level/needed" if evident else "level/other"].append(UNDECIDED if level is None else level)
        found = {name: sum(levels) / len(levels) for name, levels in needed.items() if levels}
        return found | {"undecided": sum(level is None for level in self.levels) / len(self.levels)}

    def _answered(self, window: Window, action: list[int]) -> StepResult:
        questions = self.moment.questions
        number = len(self.answers)
        question, said = questions[number], self.chat.decode(action)
        right = contains(said.strip().split("\n")[0], question.answers)
        self.answers.append(right)
        logs = {"kind": ANSWER, "question": number, "right": right, "held": kept(question, pieces_of(window.chunks)), "said": said}
        value = self.pay.correct * right / len(questions)
        reward = Reward((Part("correct", value, f"{question.text} {said!r}, not {question.answers[0]!r}" if not right else ""),))
        if len(self.answers) < len(questions):
            return self._next(question_of(self.chat, window.chunks, questions[len(self.answers)]), logs, reward)
        return StepResult(reward, True, metrics={"correct": sum(self.answers) / len(self.answers)}, logs=logs)

    def _next(self, prompt: tinker.ModelInput, logs: dict[str, Any], reward: Reward = Reward(), metrics: Any = None) -> StepResult:
        return StepResult(reward, False, prompt, self.chat.stop, metrics or {}, logs)


class MemoryGroup(EnvGroup):
    """The same moment `size` times. `weighed`: the chunks that are decided on are weighed one by one first (`Judge.worths`)."""

    def __init__(self, moment: Moment, size: int, chat: ChatMl, judge: Judge, pay: Pay, masking: Masking, weighed: bool = False):
        self.moment, self.size, self.chat, self.judge, self.pay, self.masking = moment, size, chat, judge, pay, masking
        self.weighed = weighed

    async def make_envs(self) -> Sequence[Env]:
        moment, worths = self.moment, []
        chunks = (*moment.window.chunks, moment.chunk)
        before = await self.judge.logprobs(chunks, moment.questions) if self.pay.likelihood or self.weighed else []
        if self.weighed:
            places = pressed(moment.window, self.masking, hold=False)
            worths = await self.judge.worths(chunks, places, moment.questions, before, self.pay.scale)
        return [MemoryEnv(moment, before, self.chat, self.judge, self.pay, self.masking, worths) for _ in range(self.size)]

    def logging_tags(self) -> list[str]:
        return ["memory"]


class MemoryTasks:
    """A dataset of moments: `history(n)` makes history n, of which at most `per_history` moments are taken, at one of the `budgets`. In
    place of a history that has none at this budget stands the next that has, so what is played is the same whenever it is asked for.
    `weighed`: chunks are weighed one by one, so that each decision is taught, and credited, by itself."""

    def __init__(
        self,
        history: Callable[[int], Case],
        chat: ChatMl,
        judge: Judge,
        *,
        budgets: Sequence[int] = (256,),
        pay: Pay = Pay(),
        masking: Masking = SQUEEZE,
        batches: int = 100,
        groups_per_batch: int = 8,
        group_size: int = 8,
        per_history: int = 2,
        most_questions: int = 8,
        weighed: bool = False,
        seed: int = 0,
    ):
        numbers = {"batches": batches, "groups_per_batch": groups_per_batch, "group_size": group_size, "per_history": per_history}
        for name, number in {**numbers, "most_questions": most_questions, "budgets": len(budgets)}.items():
            if number < 1:
                raise InvalidRequest(f"{name} is {number}; it must be at least 1", param=name)
        self.history, self.chat, self.judge, self.pay, self.masking = history, chat, judge, pay, masking
        self.budgets, self.batches, self.groups_per_batch, self.group_size = tuple(budgets), batches, groups_per_batch, group_size
        self.per_history, self.most_questions, self.weighed, self.seed = per_history, most_questions, weighed, seed
        self._last: tuple[int, list[Moment]] = (-1, [])

    def __len__(self) -> int:
        return self.batches

    def told(self) -> dict[str, Any]:
        """All that settles which moments are dealt and how they are paid, but for the histories and for how many batches there are."""
        names = ("budgets", "groups_per_batch", "group_size", "per_history", "most_questions", "weighed", "pay", "masking", "seed")
        return {name: getattr(self, name) for name in names}

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, self.batches, self.groups_per_batch, self.group)

    def group(self, number: int) -> MemoryGroup:
        return MemoryGroup(self.moment(number), self.group_size, self.chat, self.judge, self.pay, self.masking, self.weighed)

    def moment(self, number: int) -> Moment:
        history, place = divmod(number, self.per_history)
        if self._last[0] != history:
            self._last = (history, self._moments(history))
        found = self._last[1][place % len(self._last[1])]
        rng = random.Random(f"questions:{self.seed}:{number}")
        chosen = sorted(rng.sample(range(len(found.questions)), min(self.most_questions, len(found.questions))))
        return found._replace(questions=tuple(found.questions[i] for i in chosen))

    def _moments(self, history: int) -> list[Moment]:
        budget = self.budgets[history % len(self.budgets)]
        for number in range(history, history + IN_VAIN):
            case = self.history(number)
            if found := moments(case, self.chat.encode, budget, self.per_history, seed=self.seed, masking=self.masking):
                return found
        raise InvalidRequest(
            f"{IN_VAIN} histories in a row, the last {case.name}, never press a window of {budget} tokens that can answer one of their "
            "questions; take longer histories with more facts, or another budget",
            param="history",
        )
