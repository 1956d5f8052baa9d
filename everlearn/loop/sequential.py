"""Is the candidate better or worse than the champion, asked as often as one likes.

A test by betting (Shekhar and Ramdas, arXiv 2112.09162; Waudby-Smith and Ramdas, arXiv 2010.09686). Outcomes come one by one, each from one
of the two arms. They are cut into blocks of neighbours that hold both arms; a block's gain is the candidate's mean minus the champion's.
Whatever the labels of a block are, its expected gain is the difference of the two means at that time. So shares of traffic may be unequal
and may change, one arm may answer more often than the other, and days may be good or bad for both: none of it looks like a difference.
(A comparison of all-time means has no such protection: a candidate that gets most of its traffic on good days wins by the calendar.)

To test "the difference is at most d", bet on gains above d: stake by stake the wealth multiplies by 1 + stake (gain - d), which on average
doesn't grow while that is true. Wealth 1/alpha is therefore reached with probability alpha at most, over all looks together (Ville). What
counts is the highest wealth so far, so the answer doesn't depend on when, or how often, one looks.

Axes: N outcomes in order of arrival, B blocks, J stakes, D differences. An outcome lies between 0 and 1, a gain between -1 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from everlearn.errors import InvalidRequest

BLOCK = 8  # outcomes in a block, at least; with half the traffic each, blocks of n waste 1/n of the outcomes
MAX_STAKE = 0.5  # gain - d lies between -2 and 2: wealth can't become negative
STAKES_J = np.geomspace(0.02, 1.0, 10)  # the best is difference / variance; wealth is the mean over all, which costs log(10) at most
STEPS = 16  # of a bisection over [-1, 1]: finer than 1e-4, which no page shows


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What one episode came to, and which arm had answered it. One for each episode: it is episodes that are assigned by chance."""

    candidate: bool
    value: float


class Blocks(msgspec.Struct, frozen=True):
    """Both arms side by side. `weights_B` is n m / (n + m) of n and m outcomes: a gain's variance is an outcome's divided by it."""

    ends_B: np.ndarray  # how many outcomes had come when a block was complete
    gains_B: np.ndarray
    weights_B: np.ndarray


def read(outcomes: Sequence[Outcome], limit: float = 1.0, name: str = "outcomes") -> tuple[np.ndarray, np.ndarray]:
    """Arms (bool) and values, both [N]. Values are divided by `limit`, what is above it counts as 1.

    Raises InvalidRequest for values that aren't finite or are negative, and for values above 1 where there is no limit.
    """
    arms_N = np.fromiter((outcome.candidate for outcome in outcomes), dtype=bool, count=len(outcomes))
    values_N = np.fromiter((outcome.value for outcome in outcomes), dtype=np.float64, count=len(outcomes))
    wrong = ~np.isfinite(values_N) | (values_N < 0) | ((values_N > 1) & (limit == 1.0))
    if wrong.any():
        place = int(np.argmax(wrong))
        rule = "outcomes lie between 0 and 1, or have a limit to be divided by"
        raise InvalidRequest(f"{name}[{place}] is {values_N[place]}; {rule}", param=name)
    return arms_N, np.minimum(values_N / limit, 1.0)


def blocks(arms_N: np.ndarray, values_N: np.ndarray, least: int = BLOCK) -> Blocks:
    """Cuts outcomes into blocks of at least `least` neighbours that hold both arms. A block that isn't complete is left out.

    Where a block ends depends on labels alone, never on values.
    """
    starts, ends, start = [], [], 0
    next_one, next_other = _next(arms_N), _next(~arms_N)
    while start < len(arms_N):
        end = max(start + least, next_one[start] + 1, next_other[start] + 1)
        if end > len(arms_N):
            break
        starts.append(start)
        ends.append(end)
        start = end
    if not ends:
        return Blocks(*(np.zeros(0) for _ in range(3)))
    arms, values = arms_N[: ends[-1]].astype(np.float64), values_N[: ends[-1]]
    n, m = np.add.reduceat(arms, starts), np.add.reduceat(1 - arms, starts)
    gains_B = np.add.reduceat(arms * values, starts) / n - np.add.reduceat((1 - arms) * values, starts) / m
    return Blocks(np.asarray(ends), gains_B, n * m / (n + m))


def _next(flags_N: np.ndarray) -> list[int]:
    """For each place, the first place from there on where the flag is set; N where there is none."""
    places = np.where(flags_N, np.arange(len(flags_N)), len(flags_N))
    return np.minimum.accumulate(places[::-1])[::-1].tolist()


def log_wealth(found: Blocks, difference: float, better: bool = True) -> np.ndarray:
    """[B] log of the wealth after each block: evidence that the true difference is above (`better`) or below `difference`.

        W[b] = mean over J of the product over blocks of 1 + min(1/2, STAKES[j] weight) (gain - difference)

    and with the sign turned for `below`. Wealth falls when `difference` rises, so what it excludes is always an interval.
    """
    if not len(found.gains_B):
        return np.zeros(0)
    surplus_B = found.gains_B - difference if better else difference - found.gains_B
    stakes_JB = np.minimum(MAX_STAKE, STAKES_J[:, None] * found.weights_B)
    with np.errstate(divide="ignore"):  # a whole stake can be lost where the difference asked about is -1 or 1
        logs_JB = np.cumsum(np.log1p(stakes_JB * surplus_B), axis=1)
    highest_B = logs_JB.max(axis=0)
    highest_B = np.where(np.isfinite(highest_B), highest_B, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.mean(np.exp(logs_JB - highest_B), axis=0)) + highest_B


def crossing(found: Blocks, difference: float, alpha: float, better: bool = True) -> int | None:
    """After how many outcomes wealth first reached 1 / alpha; None if it hasn't.

    If the true difference never is above `difference` (below, for `better=False`), this ever happens with probability `alpha` at most.
    """
    reached_B = log_wealth(found, difference, better) >= -math.log(alpha)
    return int(found.ends_B[np.argmax(reached_B)]) if reached_B.any() else None


def bounds(found: Blocks, alpha_low: float, alpha_high: float) -> tuple[float, float]:
    """Between what the difference lies: the lower bound is wrong at some time with probability `alpha_low` at most, the upper one with
    `alpha_high`. They only ever come closer. -1 and 1 where nothing is known."""
    return _bound(found, alpha_low, True), _bound(found, alpha_high, False)


def _bound(found: Blocks, alpha: float, better: bool) -> float:
    """The outermost difference that isn't excluded, by bisection."""
    known, unknown = (-1.0, 1.0) if better else (1.0, -1.0)
    if crossing(found, known, alpha, better) is None:
        return known
    for _ in range(STEPS):
        middle = (known + unknown) / 2
        if crossing(found, middle, alpha, better) is None:
            unknown = middle
        else:
            known = middle
    return known


def course(found: Blocks, alpha_low: float, alpha_high: float, num: int = 201) -> list[tuple[int, float, float]]:
    """How the bounds came closer: (outcomes, low, high) at each block where one of them moved, on a grid of `num` differences."""
    grid_D = np.linspace(-1.0, 1.0, num)
    moves: dict[int, list[float]] = {}
    for better, alpha in ((True, alpha_low), (False, alpha_high)):
        for difference in grid_D if better else grid_D[::-1]:
            place = crossing(found, float(difference), alpha, better)
            if place is None:
                break
            moves.setdefault(place, [-1.0, 1.0])[0 if better else 1] = float(difference)
    low, high, found_course = -1.0, 1.0, []
    for place in sorted(moves):
        low, high = max(low, moves[place][0]), min(high, moves[place][1])
        found_course.append((place, low, high))
    return found_course
