"""Who is credited with what: memory tokens with what became of the window, answer tokens with the answer. Pure functions.

A window that lost the evidence makes every answer wrong, and a good answer doesn't make a window better than that of the other members who
answered as well. So there are two advantages for each member of a group, each 0 on the tokens of the other kind:

- **memory** (decisions and refills): the member's whole reward against the group's, which all began at the same window; of a
  decision, what its word earned more than the other words is taken off (`levelled`). A decision on a chunk that was weighed is credited by
  itself: how much higher its level is than the members' on average, times how much more its chunk is worth than those beside it;
- **answer**: whether the answer to a question is right, against the members whose windows still held its evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.memory.environment import ANSWER, DECISION
from everlearn.memory.orders import DROP, KEEP
from everlearn.rl.advantages import ESTIMATORS, is_collapsed
from everlearn.rl.trajectory import TrajectoryGroup, Transition

Advantages = list[list[float]]  # for each member one for each of its turns; empty for one that failed


def separated(group: TrajectoryGroup, estimator: str = "group_mean") -> tuple[Advantages, Advantages]:
    """Of memory and of answers. Raises InvalidRequest for an estimator that gives no number to a member.

    `group_mean` rather than `group_mean_std`: where no member lost an answer, all that differs are costs of a hundredth, and divided by
    their deviation these would count as much as what was lost elsewhere.
    """
    if estimator not in ESTIMATORS:
        raise InvalidRequest(f"estimator is {estimator!r}; memories are compared by {', '.join(ESTIMATORS)}", param="estimator")
    scored = group.scored
    memory: Advantages = [[] for _ in group.trajectories_G]
    answer: Advantages = [[] for _ in group.trajectories_G]
    rewards = [group.reward(index).total for index in scored]
    values = [0.0] * len(scored) if is_collapsed(rewards) else ESTIMATORS[estimator](rewards)
    rights, decided = _answers(group), _decisions(group)
    for index, value in zip(scored, values, strict=True):
        turns = group.trajectories_G[index].transitions
        memory[index] = [0.0 if turn.logs["kind"] == ANSWER else float(value) for turn in turns]
        memory[index] = [decided.get((index, number), one) for number, one in enumerate(memory[index])]
        answer[index] = [rights.get((index, number), 0.0) for number in range(len(turns))]
    return memory, answer


def levelled(groups: Sequence[TrajectoryGroup], memory: Sequence[Advantages]) -> list[Advantages]:
    """The same, where each decision's advantage is less what its word (keep, compress, drop) earned more than all words in the batch:
    A - mean A of the word + mean A of all three.

    How much is kept in all is settled by the budget and not by the policy: a window in which all is kept loses as much as one in which
    all is dropped. But where many chunks matter, "keep" is right more often than not, and a policy that is paid for that says nothing
    else long before it has learned of which chunks. So every word earns as much on average, and a shift from one to another that is the
    same for all chunks has no gradient. What they earn more than what is none of them stays: it is what teaches to decide at all. Of chunks
    that were weighed this holds already.
    """
    words: dict[str, list[float]] = {}
    for group, own in zip(groups, memory, strict=True):
        for trajectory, values in zip(group.trajectories_G, own, strict=True):
            for turn, value in zip(trajectory.transitions, values, strict=False):
                if (word := _word(turn)) is not None:
                    words.setdefault(word, []).append(value)
    all_words = float(np.mean([value for values in words.values() for value in values])) if words else 0.0
    means = {word: float(np.mean(values)) - all_words for word, values in words.items()}
    return [
        [
            [value - means.get(_word(turn) or "", 0.0) for turn, value in zip(trajectory.transitions, values, strict=False)]
            for trajectory, values in zip(group.trajectories_G, own, strict=True)
        ]
        for group, own in zip(groups, memory, strict=True)
    ]


def _word(turn: Transition) -> str | None:
    if turn.logs["kind"] != DECISION or turn.logs["level"] is None or "worth" in turn.logs:
        return None
    level = turn.logs["level"]
    return "keep" if level == 1.0 else "drop" if level == 0.0 else "compress"


def _decisions(group: TrajectoryGroup) -> dict[tuple[int, int], float]:
    """The advantage of (member, turn), where the turn decides on a chunk that was weighed: (level - mean level) x (worth - mean worth). The
    group's reward is one number for all of a window's decisions; this says which of them it came from. One that is none is left out."""
    found: dict[tuple[int, int], float] = {}
    for number, above in _above(group).items():
        levels = {index: group.trajectories_G[index].transitions[number].logs["level"] for index in group.scored}
        known = {index: level for index, level in levels.items() if level is not None}
        mean = float(np.mean(list(known.values()))) if known else 0.0
        found |= {(index, number): above * (level - mean) for index, level in known.items()}
    return found


def _answers(group: TrajectoryGroup) -> dict[tuple[int, int], float]:
    """The advantage of (member, turn), where the turn is an answer from a window that holds what is asked for."""
    asked: dict[int, list[tuple[int, int, float]]] = {}
    for index in group.scored:
        for number, turn in enumerate(group.trajectories_G[index].transitions):
            if turn.logs["kind"] == ANSWER and turn.logs["held"]:
                asked.setdefault(turn.logs["question"], []).append((index, number, float(turn.logs["right"])))
    found: dict[tuple[int, int], float] = {}
    for rows in asked.values():
        mean = float(np.mean([right for _, _, right in rows]))
        if len(rows) > 1:
            found |= {(index, number): right - mean for index, number, right in rows}
    return found


def best_of(group: TrajectoryGroup) -> int | None:
    """The member whose memory came out best, by its reward without that of its answers; None where none is better than the others."""
    scored = group.scored
    scores = [sum(value for name, value in group.reward(index).values.items() if name != "correct") for index in scored]
    return None if is_collapsed(scores) else scored[int(np.argmax(scores))]


def due(group: TrajectoryGroup) -> dict[int, tuple[str, float]]:
    """By turn what is to be said of a chunk that was weighed, and how much that counts: keep where the chunk is worth more than those
    beside it on average, drop where it is worth less, as much as |worth - mean worth|. So keeping counts as much as dropping, however many
    chunks are worth little. Members needn't have found it: what all of them get wrong, no choice among theirs would mend.
    """
    return {number: (KEEP if value > 0.0 else DROP, abs(value)) for number, value in _above(group).items() if value}


def _above(group: TrajectoryGroup) -> dict[int, float]:
    """By turn what a chunk that was weighed is worth more than the others that are decided on; all members decide on the same."""
    turns = group.trajectories_G[group.scored[0]].transitions if group.scored else []
    worths = {number: float(turn.logs["worth"]) for number, turn in enumerate(turns) if "worth" in turn.logs}
    mean = float(np.mean(list(worths.values()))) if worths else 0.0
    return {number: worth - mean for number, worth in worths.items()}
