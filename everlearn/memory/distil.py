"""From counterfactuals to a head: what a model needed to answer, as targets for what can be seen on a chunk's surface.

In a plain history most turns are never needed again, so the last turns of the windows made here are a question about one turn and its
answer, and the fall that counts is that of the answer's log-likelihood. Each window holds that turn among others that chance chose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import tinker

from everlearn.errors import InvalidRequest
from everlearn.memory.counterfactual import Counterfactual
from everlearn.memory.importance import counted, features
from everlearn.memory.suites import Case, Question, words_of
from everlearn.memory.window import Chunk, Encode, Window, chunk_of


def examples(
    sampler: tinker.SamplingClient, encode: Encode, case: Case, others: int = 11, seed: int = 0, scale: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, F] and targets [N] in 0..1 of the chunks of one window for each question of `case` that has its evidence in one turn
    and an answer: N = questions x (others + 1). Costs others + 2 forward passes over others + 3 turns for each question."""
    if others < 1 or others + 1 > len(case.turns):
        raise InvalidRequest(f"others is {others}; it must lie in 1..{len(case.turns) - 1} for this history", param="others")
    rng = random.Random(f"distil:{seed}:{case.name}")
    window = Window(1, words=_words(case.turns))
    estimator = Counterfactual(sampler, later=1, scale=scale)
    rows: list[np.ndarray] = []
    targets: list[float] = []
    for question in case.questions:
        chunks = _window(encode, case, question, others, rng)
        if chunks is None:
            continue
        places = range(others + 1)
        targets += estimator.of(window, chunks, places)
        rows += [features(window, chunks[place].role, chunks[place].text) for place in places]
    if not rows:
        raise InvalidRequest(f"history {case.name} has no question with an answer and its evidence in one turn", param="questions")
    return np.stack(rows), np.array(targets)


def _window(encode: Encode, case: Case, question: Question, others: int, rng: random.Random) -> tuple[Chunk, ...] | None:
    """Some turns in order, among them the one with the evidence; then the question and its answer."""
    held = [number for number, (_, text) in enumerate(case.turns) if question.words and question.words <= words_of(text)]
    if len(held) != 1 or not question.answers:
        return None
    rest = [number for number in range(len(case.turns)) if number not in held]
    chosen = sorted([*held, *rng.sample(rest, others)])
    said = [*(case.turns[number] for number in chosen), ("user", question.text), ("assistant", question.answers[0])]
    return tuple(chunk_of(encode, role, text, place) for place, (role, text) in enumerate(said))


def _words(turns: Sequence[tuple[str, str]]) -> bytes:
    words = b""
    for _, text in turns:
        words = counted(words, text)
    return words
