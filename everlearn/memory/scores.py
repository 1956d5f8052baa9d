"""Scores without a judge: exact match, containment, token-F1, and whether the evidence is still in the window. Pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.memory.suites import Question, share

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Interval(NamedTuple):
    """A mean with the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def normalised(text: str) -> list[str]:
    """Small letters, no punctuation, no articles: SQuAD's way (Rajpurkar et al., 2016, arXiv 1606.05250)."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact(answer: str, golds: Sequence[str]) -> float:
    return float(any(normalised(answer) == normalised(gold) for gold in golds))


def contains(answer: str, golds: Sequence[str]) -> float:
    """Whether a gold stands in the answer, word by word."""
    said = normalised(answer)
    wanted = [normalised(gold) for gold in golds]
    return float(any(gold and said[i : i + len(gold)] == gold for gold in wanted for i in range(len(said))))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, for the gold that fits best (SQuAD)."""
    return max((_f1(normalised(answer), normalised(gold)) for gold in golds), default=0.0)


def _f1(said: list[str], gold: list[str]) -> float:
    same = sum((Counter(said) & Counter(gold)).values())
    return 2.0 * same / (len(said) + len(gold)) if same else 0.0


def kept(question: Question, pieces: Sequence[str]) -> float:
    """1 where one piece of the window holds the evidence, else 0."""
    return float(bool(question.words) and share(question.words, pieces) >= question.need > 0.0)


def interval(groups: Sequence[Sequence[float]], rounds: int = 2000, seed: int = 0) -> Interval:
    """Of the mean over all values. Groups (histories) are drawn with replacement and then their values are: questions about one history
    share its fate (a two-stage bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, 3.8)."""
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not arrays:
        raise InvalidRequest("there are no values to average; ask at least one question", param="values")
    rng = np.random.default_rng(seed)
    means = np.empty(rounds)
    for i in range(rounds):
        drawn = [arrays[j] for j in rng.integers(len(arrays), size=len(arrays))]
        means[i] = np.concatenate([group[rng.integers(len(group), size=len(group))] for group in drawn]).mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(np.concatenate(arrays).mean()), float(low), float(high))
