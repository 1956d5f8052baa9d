"""Moments to train at: a window that a turn is about to press, and the questions that its chunks can still answer.

What a memory decides has no effect that can be seen at once, and two memories that decided differently hardly meet again: whole histories
are no fair comparison. So histories are played once, with chance as the judge of what stays, chunks and sentences of them, and stopped
where there is pressure; from there a group decides and writes again and again, each time from the same window (the local re-rollouts of
Memory-R2, arXiv 2605.21768).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.memory.importance import counted
from everlearn.memory.mask import Masking
from everlearn.memory.plan import planned
from everlearn.memory.refill import Extract
from everlearn.memory.scores import kept
from everlearn.memory.suites import Case, Question
from everlearn.memory.turns import Turns
from everlearn.memory.window import Chunk, Encode, Window, chunk_of, line
from everlearn.rl.policy import seed_of

# In training more is cleared at once than a turn needs: a third of the window, of which a quarter may stay. So a group's members differ.
# Nine decisions on each window, 2 x most and the turn that comes: other windows teach more than more decisions on the same.
SQUEEZE = Masking(most=4, keep=0.25, slack=0.33)


class Moment(NamedTuple):
    """`window` as it was, and the `chunk` that comes. `questions`: those with an answer whose evidence stands in one of the chunks."""

    case: str
    window: Window
    chunk: Chunk
    questions: tuple[Question, ...]


class Chance:
    """Importance by lot: the same text always draws the same."""

    name, late = "chance", False

    def __init__(self, seed: int):
        self.seed = seed

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        return [self.score(window, chunks[place].role, chunks[place].text) for place in places]

    def score(self, window: Window, role: str, text: str) -> float:
        return (1 + seed_of("importance", self.seed, role, text)) / 2**31


def moments(case: Case, encode: Encode, budget: int, num: int, *, seed: int = 0, masking: Masking = SQUEEZE) -> list[Moment]:
    """At most `num` moments of one history, drawn from those that have a question, in order."""
    if num < 1:
        raise InvalidRequest(f"num is {num}; take at least one moment of a history", param="num")
    chance = Chance(seed)
    turns, window, found = Turns(encode, chance, Extract(encode, chance.score)), Window(budget), []
    for role, text in case.turns:
        moment = _moment(case, encode, window, role, text, masking)
        if moment is not None:
            found.append(moment)
        window, _ = turns.add(window, role, text, hold=False)
    drawn = random.Random(f"moments:{seed}:{case.name}").sample(range(len(found)), min(num, len(found)))
    return [found[place] for place in sorted(drawn)]


def _moment(case: Case, encode: Encode, window: Window, role: str, text: str, masking: Masking) -> Moment | None:
    chunk = chunk_of(encode, role, text, window.turn + 1)
    if len(chunk.tokens) > window.room or not planned(window, chunk, masking).masked:
        return None
    pieces = pieces_of((*window.chunks, chunk))
    questions = tuple(question for question in case.questions if question.answers and kept(question, pieces))
    if not questions:
        return None
    # Nothing was decided yet of any chunk: what chance drew is no knowledge.
    chunks = tuple(msgspec.structs.replace(one, importance=0.5) for one in window.chunks)
    return Moment(case.name, msgspec.structs.replace(window, chunks=chunks, words=counted(window.words, text)), chunk, questions)


def pieces_of(chunks: Sequence[Chunk]) -> list[str]:
    """What is shown of these chunks, piece by piece."""
    return [line(chunk.role, chunk.text) for chunk in chunks]
