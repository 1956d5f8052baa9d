"""Two versions judged on the same prompts, once: how far apart they are, with an interval.

Pure functions of numbers. Where judgements are right or wrong the interval is exact; else it is a bootstrap over prompts. Sources:

- exact test of paired proportions: McNemar (1947), conditional on the prompts where the two differ
- interval of a proportion: Clopper and Pearson (1934)
- paired bootstrap: Efron (1979), percentile interval; for systems on one test set: Koehn (2004)
- interval of a difference from two intervals: Zou and Donner (2008), MOVER
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from everlearn.errors import InvalidRequest

RESAMPLES = 10_000
CHUNK = 4_000_000  # resampled numbers held at once


class Pair(msgspec.Struct, frozen=True, array_like=True):
    """One prompt, both versions judged on it: between 0 (bad) and 1 (good)."""

    champion: float
    candidate: float


class Interval(msgspec.Struct, frozen=True):
    """A mean and where it lies; each end is wrong with probability `alpha` of whoever asked."""

    mean: float
    low: float
    high: float
    num: int


def read(pairs: Sequence[Pair], name: str) -> np.ndarray:
    """[N, 2] champion and candidate. Raises InvalidRequest for judgements outside 0 to 1."""
    judged_N2 = np.array([(pair.champion, pair.candidate) for pair in pairs], dtype=np.float64).reshape(-1, 2)
    wrong = ~((judged_N2 >= 0) & (judged_N2 <= 1)).all(axis=1)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InvalidRequest(f"{name}[{place}] is {judged_N2[place].tolist()}; judgements lie between 0 and 1", param=name)
    return judged_N2


def difference(judged_N2: np.ndarray, alpha: float) -> Interval:
    """Candidate minus champion. Exact where every judgement is 0 or 1, a bootstrap otherwise."""
    gains_N = judged_N2[:, 1] - judged_N2[:, 0]
    if np.isin(judged_N2, (0.0, 1.0)).all():
        return exact_difference(int((gains_N > 0).sum()), int((gains_N < 0).sum()), len(gains_N), alpha)
    return bootstrap(gains_N, alpha)


def bootstrap(gains_N: np.ndarray, alpha: float, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of paired gains and its percentile interval at alpha and 1 - alpha. The seed is fixed: same evidence, same interval."""
    num = len(gains_N)
    if not num:
        return Interval(0.0, -1.0, 1.0, 0)
    rng = np.random.default_rng(seed)
    rows = max(CHUNK // num, 1)
    means = [gains_N[rng.integers(num, size=(min(rows, resamples - done), num))].mean(axis=1) for done in range(0, resamples, rows)]
    low, high = np.quantile(np.concatenate(means), [alpha, 1 - alpha])
    return Interval(float(gains_N.mean()), float(low), float(high), num)


def exact_difference(better: int, worse: int, num: int, alpha: float) -> Interval:
    """(better - worse) / num and its interval, given on how many prompts the two differ: the inversion of McNemar's exact test.

    Where they never differ both ends are 0: how many prompts are enough to believe that is the rule's affair (`min_num`).
    """
    if not num:
        return Interval(0.0, -1.0, 1.0, 0)
    low, high = proportion(better, better + worse, alpha)
    differing = (better + worse) / num
    return Interval((better - worse) / num, differing * (2 * low - 1), differing * (2 * high - 1), num)


def mcnemar(better: int, worse: int) -> float:
    """The probability of at least `worse` losses among the prompts that differ, were a loss as likely as a win: one-sided, exact.

    Small: the candidate is worse. For the other question swap the two.
    """
    return upper_tail(worse, better + worse, 0.5)


def proportion(hits: int, num: int, alpha: float) -> tuple[float, float]:
    """The rates at which `hits` or more, and `hits` or fewer, of `num` have probability alpha (Clopper and Pearson)."""
    low = 0.0 if hits == 0 else _root(lambda rate: upper_tail(hits, num, rate) - alpha)
    high = 1.0 if hits == num else _root(lambda rate: alpha - (1.0 - upper_tail(hits + 1, num, rate)))
    return low, high


def upper_tail(least: int, num: int, rate: float) -> float:
    """P(X >= least), X binomial."""
    if least <= 0:
        return 1.0
    if rate in (0.0, 1.0) or least > num:
        return float(rate == 1.0 and least <= num)
    logs = [
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) + k * math.log(rate) + (num - k) * math.log1p(-rate)
        for k in range(least, num + 1)
    ]
    return min(math.fsum(map(math.exp, logs)), 1.0)


def _root(rising) -> float:  # type: ignore[no-untyped-def]
    """Where a function that rises over [0, 1] is 0."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def between(champion: Interval, candidate: Interval) -> Interval:
    """Candidate minus champion where each was measured by itself, from their intervals, d being the difference:

    low  = d - sqrt((candidate - its low)^2 + (champion's high - champion)^2)
    high = d + sqrt((candidate's high - candidate)^2 + (champion - its low)^2)
    """
    gain = candidate.mean - champion.mean
    low = gain - math.hypot(candidate.mean - candidate.low, champion.high - champion.mean)
    high = gain + math.hypot(candidate.high - candidate.mean, champion.mean - champion.low)
    return Interval(gain, low, high, min(champion.num, candidate.num))
