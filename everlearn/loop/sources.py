"""Whether what people said decides, or one of them: a finding counts where it stands without any single source too.

A cap on what a source counts (everlearn/loop/weights.py) keeps ten thousand words of one from outweighing everybody else's, or from using
up a canary's budget. It doesn't keep one source from deciding: a test that may be asked after every outcome is convinced by a few dozen
that all say the same, and somebody who wants to be heard needs no longer. So what the tests find is asked again without each of the sources
that said most of either version. A test that holds by itself and then holds again errs no more often than it did; it only takes a few
outcomes more.

Axes: N outcomes in order of arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.loop.evidence import Evidence
from everlearn.loop.rule import Rule

NOBODY = -1  # in the place of a source's number: nobody is named, or nothing was said
MOST = 20  # sources that are left out in turn, of each version those with most outcomes first
COUNTING = 2  # in evidence that is made now (evidence.Evidence.counting)
ALONE = "; without one source it wouldn't be shown, and none decides alone"


def left_out(rule: Rule, evidence: Evidence, name: str, num: int) -> list[np.ndarray]:
    """For each source that could decide alone, bool [N] of the outcomes that aren't its own; none where the rule lets one decide
    (`min_sources` 1), and none where nobody is named. `num` is N. Raises InvalidRequest for sources of another number of outcomes."""
    if rule.min_sources == 1 or evidence.sources is msgspec.UNSET or name not in evidence.sources:
        return []
    sources = evidence.sources[name]
    if len(sources) != num:
        raise InvalidRequest(f"sources.{name} has {len(sources)} numbers, and there are {num} outcomes; each has one", param="sources")
    if evidence.counting is msgspec.UNSET:
        return masks(sources)
    outcomes = evidence.feedback if name == "feedback" else evidence.guardrails.get(name, ())
    return masks(sources, [outcome.candidate for outcome in outcomes])


def masks(sources: Sequence[int], arms: Sequence[bool] | None = None) -> list[np.ndarray]:
    """The same for outcomes whose sources are given by number, [N]. `arms` [N] tells which are the candidate's: then those are left out
    who said most of the candidate, and those who said most of the champion, ties by what they said of both. A short time with the one is
    swayed by whoever says most in it, however little that is beside a long record of the other. Without arms, as evidence was read at
    first, it is those who said most of both together."""
    numbers_N = np.asarray(sources, dtype=np.int64)
    total = Counter(number for number in sources if number != NOBODY)
    if arms is None:
        chosen = sorted(total, key=lambda number: (-total[number], number))[:MOST]
    else:
        said = {arm: Counter(number for number, one in zip(sources, arms, strict=True) if one == arm) for arm in (True, False)}
        ranked = [sorted(total, key=lambda number: (-of[number], -total[number], number))[:MOST] for of in said.values()]
        chosen = list(dict.fromkeys(number for one in ranked for number in one))
    return [numbers_N != number for number in chosen]


def stands(places: Sequence[np.ndarray], found: Callable[[np.ndarray], bool]) -> bool:
    """Whether something is found without each source as well. `found` is asked with the outcomes that are left, bool [N]."""
    return all(found(kept_N) for kept_N in places)


def counted(rule: Rule, evidence: Evidence, needed: int) -> int:
    """How many of the candidate's outcomes count towards `needed`, of which no source gives more than half, rounded up: two are enough.
    (Evidence without `counting` was read with half of it rounded down.)"""
    own = [place for place, outcome in enumerate(evidence.feedback) if outcome.candidate]
    if not left_out(rule, evidence, "feedback", len(evidence.feedback)) or evidence.sources is msgspec.UNSET:
        return len(own)
    counts = Counter(evidence.sources["feedback"][place] for place in own)
    half = max(1, needed // 2 if evidence.counting is msgspec.UNSET else (needed + 1) // 2)
    return counts.pop(NOBODY, 0) + sum(min(count, half) for count in counts.values())
