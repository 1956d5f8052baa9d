"""Is a version that everybody gets as good as the record of the one before it, asked as often as one likes.

There is no second arm any more, so what comes in is held against what was known: the mean of the version before lies above `low` with
probability 1 - alpha / 2 (exactly so where outcomes are 0 or 1, else by betting on them), and a test at alpha / 2 looks for outcomes whose
mean is below that. Its wealth is put on "below m" outcome by outcome, and not only from the beginning: a part of it waits and enters at
every outcome, so that a harm which comes after a month of good service is found as well.

    W[t] = mean over J of sum over k <= t of share[k] prod over s from k to t of 1 + STAKES[j] (m - x[s])   +   what hasn't entered yet
    share[k] = 1 / log2(k + 1) - 1 / log2(k + 2), whose sum over all k is 1

As long as each outcome's expectation, given those before, is m or more, W is a supermartingale that starts at 1: it ever reaches 1 / alpha
with probability alpha at most (Ville). A late beginning k costs log(k) + 2 log(log(k)) of evidence, which Page's CUSUM doesn't pay; but
CUSUM promises only a long time between false alarms. (Mixtures of e-processes that begin at different times: Shin, Ramdas and Rinaldo,
arXiv 2203.03532.)

Axes: N outcomes in order of arrival, each from 0 to 1; J stakes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from everlearn.loop import parts, sequential, sources
from everlearn.loop.evidence import Evidence, Outcome
from everlearn.loop.paired import proportion
from everlearn.loop.parts import Part
from everlearn.loop.rule import Rule, WatchRule
from everlearn.loop.sequential import STAKES_J, STEPS

FEEDBACK = "feedback"  # the part on human outcome


def crossing(values_N: np.ndarray, mean: float, alpha: float, below: bool = True) -> int | None:
    """After how many outcomes wealth on "it is below `mean`" (above, for `below=False`) first reached 1 / alpha; None if it hasn't."""
    surplus_N = (mean - values_N) if below else (values_N - mean)
    wealth_J, waiting = np.zeros(len(STAKES_J)), 1.0
    for place, surplus in enumerate(surplus_N.tolist(), 1):
        left = 1.0 / math.log2(place + 2)
        wealth_J = (wealth_J + (waiting - left)) * (1.0 + STAKES_J * surplus)
        waiting = left
        if wealth_J.mean() + waiting >= 1.0 / alpha:
            return place
    return None


def bound(values_N: np.ndarray, alpha: float, lower: bool) -> float:
    """What the mean is surely above (`lower`) or below; wrong with probability alpha at most. 0 or 1 where nothing is known."""
    known, unknown = (0.0, 1.0) if lower else (1.0, 0.0)
    for _ in range(STEPS):
        middle = (known + unknown) / 2
        surplus_N = (values_N - middle) if lower else (middle - values_N)
        logs_JN = np.cumsum(np.log1p(STAKES_J[:, None] * surplus_N), axis=1)
        reached = len(values_N) > 0 and float(np.logaddexp.reduce(logs_JN, axis=0).max()) - math.log(len(STAKES_J)) >= -math.log(alpha)
        known, unknown = (middle, unknown) if reached else (known, middle)
    return known


def surely(record_N: np.ndarray, alpha: float, lower: bool) -> float:
    """`bound` of a record, which is read once and whole: exact (Clopper and Pearson) where every outcome is 0 or 1."""
    if not np.isin(record_N, (0.0, 1.0)).all():
        return bound(record_N, alpha, lower)
    return proportion(int(record_N.sum()), len(record_N), alpha)[0 if lower else 1]


def watched(rule: Rule, evidence: Evidence) -> list[Part]:
    """One part for human outcome and one for each guardrail of the rule; outcomes of the version before count as the champion's."""
    if rule.watch is None:
        return []
    without = sources.left_out(rule, evidence, FEEDBACK, len(evidence.feedback))
    shown = [compared(FEEDBACK, rule.watch, evidence.feedback, rule.watch.margin, ("down",), rule.watch.alpha, without=without)]
    for name, guard in rule.guardrails.items():
        ways = ("up", "down") if guard.worse == "both" else (guard.worse,)
        outcomes = evidence.guardrails.get(name, ())
        without = sources.left_out(rule, evidence, name, len(outcomes))
        shown.append(compared(name, rule.watch, outcomes, guard.margin, ways, guard.alpha, guard.limit, without))
    return shown


def compared(
    name: str, rule: WatchRule, outcomes: Sequence[Outcome], margin: float, ways: Sequence[str], alpha: float, limit: float = 1.0,
    without: Sequence[np.ndarray] = (),
) -> Part:  # fmt: skip
    """Fails where the live version is surely worse than the one before by more than `margin`, whenever that was shown; also without each of
    its sources, where `without` has what is left then (everlearn/loop/sources.py)."""
    arms_N, values_N = sequential.read(outcomes, limit, f"watch.{name}")
    record_N, live_N = values_N[~arms_N], values_N[arms_N]
    told, num = f"live:{name}", len(live_N)
    if len(record_N) < rule.min_record:
        reason = f"{len(record_N)} of {rule.min_record} outcomes of the version before; nothing to hold the live one against"
        return Part(name=told, result="wait", reason=reason, num=num, live=True)
    each = alpha / len(ways) / 2
    places, alone = {}, ""
    for way in ways:
        place = _crossed(record_N, live_N, margin, way, each)
        if place is None:
            continue

        def stands(kept_N: np.ndarray, way: str = way) -> bool:
            before_N, since_N = values_N[kept_N & ~arms_N], values_N[kept_N & arms_N]
            return len(before_N) >= rule.min_record and _crossed(before_N, since_N, margin, way, each) is not None

        if sources.stands(without, stands):
            places[way] = place
        else:
            alone = sources.ALONE
    before, now = float(record_N.mean()), float(live_N.mean()) if num else float(record_N.mean())
    low, high = bound(live_N, each, lower=True), bound(live_N, each, lower=False)
    figures = f"{now:.3f} over {num} outcomes, {before:.3f} over {len(record_N)} of the version before"
    if places:
        way = min(places, key=lambda one: places[one])
        side = "below" if way == "down" else "above"
        reason = f"{side} the version before by more than {margin:g} since outcome {places[way]}: {figures}"
    else:
        reason = f"no harm beyond {margin:g} seen: {figures}{alone}"
    result = "fail" if places else "pass"
    return Part(name=told, result=result, reason=reason, value=now - before, low=low - before, high=high - before, num=num, live=True)  # type: ignore[arg-type]


def _crossed(record_N: np.ndarray, live_N: np.ndarray, margin: float, way: str, alpha: float) -> int | None:
    """Since which outcome the live version surely is beyond `margin` of the record, below it ("down") or above."""
    end = surely(record_N, alpha, lower=way == "down")
    tolerated = end - margin if way == "down" else end + margin
    return crossing(live_N, tolerated, alpha, below=way == "down") if 0.0 < tolerated < 1.0 else None


def shown(rule: Rule, evidence: Evidence) -> list[Part]:
    """All parts of a version that is live: alarms, and what is watched."""
    return [*parts.alarms(rule, evidence), *watched(rule, evidence)]
