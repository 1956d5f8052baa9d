"""Whether what people said decides, or one of them: a finding counts where it stands without any single source too.

A cap on what a source counts (everlearn/loop/weights.py) keeps ten thousand words of one from outweighing everybody else's, or from using
up a canary's budget. It doesn't keep one source from deciding: a test that may be asked after every outcome is convinced by a few dozen
that all say the same, and somebody who wants to be heard needs no longer. So what the tests find is asked again without each of the
sources that said most. A test that holds by itself and then holds again errs no more often than it did; it only takes a few outcomes more.

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
MOST = 20  # sources that are left out in turn, those with most outcomes first
ALONE = "; without one source it wouldn't be shown, and none decides alone"


def left_out(rule: Rule, evidence: Evidence, name: str, num: int) -> list[np.ndarray]:
    """For each source that could decide alone, bool [N] of the outcomes that aren't its own; none where the rule lets one decide
    (`min_sources` 1), and none where nobody is named. `num` is N. Raises InvalidRequest for sources of another number of outcomes."""
    if rule.min_sources == 1 or evidence.sources is msgspec.UNSET or name not in evidence.sources:
        return []
    sources = evidence.sources[name]
    if len(sources) != num:
        raise InvalidRequest(f"sources.{name} has {len(sources)} numbers, and there are {num} outcomes; each has one", param="sources")
    return masks(sources)


def masks(sources: Sequence[int]) -> list[np.ndarray]:
    """The same for outcomes whose sources are given by number."""
    numbers_N = np.asarray(sources, dtype=np.int64)
    counts = Counter(number for number in sources if number != NOBODY)
    return [numbers_N != number for number, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:MOST]]


def stands(places: Sequence[np.ndarray], found: Callable[[np.ndarray], bool]) -> bool:
    """Whether something is found without each source as well. `found` is asked with the outcomes that are left, bool [N]."""
    return all(found(kept_N) for kept_N in places)


def counted(rule: Rule, evidence: Evidence, needed: int) -> int:
    """How many of the candidate's outcomes count towards `needed`, of which no source gives more than half."""
    own = [place for place, outcome in enumerate(evidence.feedback) if outcome.candidate]
    if not left_out(rule, evidence, "feedback", len(evidence.feedback)) or evidence.sources is msgspec.UNSET:
        return len(own)
    counts = Counter(evidence.sources["feedback"][place] for place in own)
    return counts.pop(NOBODY, 0) + sum(min(count, max(1, needed // 2)) for count in counts.values())
