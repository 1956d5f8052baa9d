"""Self-critique as a reward (Kimi K2, arXiv 2507.20534, section 3.2.2): answers to one task are compared in pairs by rubrics, and how often
an answer is preferred is its reward, a part for each rubric.

The critic may be an adapter of the policy's own base model, asked by its name. `everlearn/rl/critic.py` keeps it honest: it is trained on
pairs whose winner a verifier knows.

Axes: G answers to one task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import combinations

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.rewards import hackcheck
from everlearn.rewards.judge import CORE, PRESCRIPTIVE, Judge, Rubric, Verdict
from everlearn.rewards.reward import Part, Reward
from everlearn.rewards.verifiers import VerifierFailed

EVEN = 0.5  # the win rate of an answer that nobody was there to be compared with
LEAST_JUDGED = 0.5  # share of an answer's comparisons that must have a judgement


class Criticised(msgspec.Struct, frozen=True):
    """`rewards_G`, and of all comparisons: how many there were, the share that failed, the share in which both orders agreed."""

    rewards_G: list[Reward]
    comparisons: int
    failed: float
    agreed: float
    vetoed: float

    @property
    def metrics(self) -> dict[str, float]:
        return {"critic/failed": self.failed, "critic/agreed": self.agreed, "critic/vetoed": self.vetoed}


async def criticise(
    judge: Judge,
    task: str,
    answers_G: Sequence[str],
    rubrics: Sequence[Rubric] = CORE + PRESCRIPTIVE,
    complied_G: Sequence[bool | None] | None = None,
    hack_check: bool = True,
    hack_judge: Judge | None = None,
) -> Criticised:
    """The reward of each answer: for each rubric a part `critic/NAME`, its weight times the mean share of the comparisons with every other
    answer; for what the hack check found, `veto` instead. Vetoed answers take part in no comparison. `complied_G`: what verifiers say,
    where they do (see `hackcheck.finds`).

    An answer of which less than half of the comparisons could be judged can't be ranked: then VerifierFailed is raised, and nobody in the
    group has a score.
    """
    _check(answers_G, rubrics, complied_G)
    complied = list(complied_G) if complied_G is not None else [None] * len(answers_G)
    found: list[list[hackcheck.Find]] = [[] for _ in answers_G]
    if hack_check:
        checks = [hackcheck.check(answer, task, own, hack_judge) for answer, own in zip(answers_G, complied, strict=True)]
        found = list(await asyncio.gather(*checks))
    clean = [index for index, own in enumerate(found) if not own]
    asked = [(rubric, pair) for rubric in rubrics for pair in combinations(clean, 2)]
    jobs = [judge.prefers(task, answers_G[one], answers_G[other], rubric) for rubric, (one, other) in asked]
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    judged: dict[tuple[str, int, int], Verdict] = {}
    problem = ""
    for (rubric, (one, other)), outcome in zip(asked, outcomes, strict=True):
        if isinstance(outcome, Verdict):
            judged[rubric.name, one, other] = outcome
        elif isinstance(outcome, VerifierFailed):
            problem = problem or str(outcome)
        else:
            raise outcome
    rewards = [
        Reward((hackcheck.veto(found[index], weight=sum(rubric.weight for rubric in rubrics)),))
        if found[index]
        else Reward(tuple(_part(rubric, index, clean, judged, problem) for rubric in rubrics))
        for index in range(len(answers_G))
    ]
    agreed = sum(one.agreed for one in judged.values()) / len(judged) if judged else 1.0
    failed = 1 - len(judged) / len(asked) if asked else 0.0
    return Criticised(rewards, len(asked), failed, agreed, 1 - len(clean) / len(answers_G))


def _part(rubric: Rubric, index: int, clean: Sequence[int], judged: dict[tuple[str, int, int], Verdict], problem: str) -> Part:
    """The win rate of one answer by one rubric."""
    name, others = f"critic/{rubric.name}", [other for other in clean if other != index]
    if not others:
        return Part(name, rubric.weight * EVEN, "nobody to be compared with")
    shares, unsure = [], 0
    for other in others:
        own = judged.get((rubric.name, min(index, other), max(index, other)))
        if own is not None:
            shares.append(own.share if index < other else 1 - own.share)
            unsure += not own.agreed
    if len(shares) < LEAST_JUDGED * len(others):
        raise VerifierFailed(f"{len(others) - len(shares)} of {len(others)} comparisons of an answer could not be judged: {problem}")
    rate = sum(shares) / len(shares)
    told = f"preferred by {rate:.0%} over {len(shares)} of {len(others)} others"
    return Part(name, rubric.weight * rate, f"{told}; {unsure} times the order decided" if unsure else told)


def _check(answers_G: Sequence[str], rubrics: Sequence[Rubric], complied_G: Sequence[bool | None] | None) -> None:
    names = [rubric.name for rubric in rubrics]
    if not answers_G or not names or len(set(names)) < len(names):
        raise InvalidRequest(
            f"{len(answers_G)} answers by the rubrics {names}: give at least one of each, and each its own name", param="rubrics"
        )
    if complied_G is not None and len(complied_G) != len(answers_G):
        raise InvalidRequest(f"complied_G has {len(complied_G)} values for {len(answers_G)} answers; give one for each", param="complied_G")
