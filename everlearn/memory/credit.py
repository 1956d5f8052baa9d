"""Who is credited with what: memory tokens with what became of the window, answer tokens with the answer. Pure functions.

A window that lost the evidence makes every answer wrong, and a good answer doesn't make a window better than that of the other members who
answered as well. So there are two advantages for each member of a group, each 0 on the tokens of the other kind:

- **memory** (decisions and refills): the member's whole reward against the group's, which all began at the same window;
- **answer**: whether the answer to a question is right, against the members whose windows still held its evidence.
"""

from __future__ import annotations

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.memory.environment import ANSWER
from everlearn.rl.advantages import ESTIMATORS, is_collapsed
from everlearn.rl.trajectory import TrajectoryGroup

Advantages = list[list[float]]  # for each member one for each of its turns; empty for one that failed


def separated(group: TrajectoryGroup, estimator: str = "group_mean_std") -> tuple[Advantages, Advantages]:
    """Of memory and of answers. Raises InvalidRequest for an estimator that gives no number to a member."""
    if estimator not in ESTIMATORS:
        raise InvalidRequest(f"estimator is {estimator!r}; memories are compared by {', '.join(ESTIMATORS)}", param="estimator")
    scored = group.scored
    memory: Advantages = [[] for _ in group.trajectories_G]
    answer: Advantages = [[] for _ in group.trajectories_G]
    rewards = [group.reward(index).total for index in scored]
    values = [0.0] * len(scored) if is_collapsed(rewards) else ESTIMATORS[estimator](rewards)
    rights = _answers(group)
    for index, value in zip(scored, values, strict=True):
        turns = group.trajectories_G[index].transitions
        memory[index] = [0.0 if turn.logs["kind"] == ANSWER else float(value) for turn in turns]
        answer[index] = [rights.get((index, number), 0.0) for number in range(len(turns))]
    return memory, answer


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
