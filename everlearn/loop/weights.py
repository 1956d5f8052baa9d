"""How much each label weighs when many come from few: pure functions of labels.

A source that says a thing ten thousand times has one opinion, not ten thousand. With a cap c, n labels of one source weigh
min(1, c / n) each, so that together they are worth min(n, c) labels, whatever n is. On top of that each kind of source (people,
programs, models) has a factor of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from everlearn.config import FeedbackSettings


class Sourced(Protocol):
    """What has a source: `source` is human, program or model, `source_id` tells sources of one kind apart."""

    @property
    def source(self) -> str: ...

    @property
    def source_id(self) -> str: ...


EQUAL: Mapping[str, float] = {"human": 1.0, "program": 1.0, "model": 1.0}


def factors(settings: FeedbackSettings) -> dict[str, float]:
    """What a label of each kind of source is worth, by the settings."""
    return {"human": settings.human_weight, "program": settings.program_weight, "model": settings.model_weight}


def weigh(labels: Sequence[Sourced], cap: float, by_source: Mapping[str, float] = EQUAL) -> list[float]:
    """The weight of each label: its kind of source's factor times min(1, `cap` / number of that source's labels among these)."""
    counts = Counter((label.source, label.source_id) for label in labels)
    return [by_source[label.source] * share(counts[label.source, label.source_id], cap) for label in labels]


def share(count: int, cap: float) -> float:
    """The weight of each of `count` labels of one source."""
    return min(1.0, cap / count) if count else 0.0


def effective(labels: Sequence[Sourced], cap: float, by_source: Mapping[str, float] = EQUAL) -> float:
    """How many labels these are worth: the sum of their weights."""
    return sum(weigh(labels, cap, by_source))


def within(said: Sequence[tuple[str, Hashable]], cap: float) -> list[bool]:
    """Which of these words count where each counts whole or not at all, and what has counted goes on to: `said` has, in order of arrival,
    a word's source and what it is about. The first `cap` things that a source speaks about count, whatever it says of them.

    "" is whoever isn't named. That is one source like any other while those who are named spoke of at least as many things so far; else it
    is everybody, and all of it counts. (Of a named source only what counts does so here too: one who says much makes nobody a few.)
    """
    about: dict[str, set[Hashable]] = {}
    named: set[Hashable] = set()
    nameless: set[Hashable] = set()
    found = []
    for source, thing in said:
        mine = about.setdefault(source, set())
        if not source:
            nameless.add(thing)
        counts = thing in mine or len(mine) + 1 <= cap or (not source and len(nameless) > len(named))
        if counts:
            mine.add(thing)
            if source:
                named.add(thing)
        found.append(counts)
    return found
