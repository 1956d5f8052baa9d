"""What a model still can after it was trained on something else: two sets of results, compared unit by unit.

A unit is one prompt, one question, one piece of text. Both models meet the same units, so the comparison is paired: what is drawn again
and again (bootstrap, Efron 1979) are units, each with both its results, and the interval is that of the change. A metric **fell** if it
got worse by more than half its interval's width, and a perplexity also by more than rounding makes it. Pure: values in, values out;
`asking.py` makes the results.

Axes: U units, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from everlearn.errors import Conflict, InvalidRequest

RESAMPLES = 4000
CONFIDENCE = 0.95
ROUNDING = 1e-4  # of a perplexity: what float32 leaves of the same weights where other requests share the batch
FEWEST = 5  # units; of fewer the resamples are always the same few
Kind = Literal["share", "perplexity"]


class Unit(msgspec.Struct, frozen=True):
    """`value`: a share from 0 to 1, or nats for each token; `weight`: how much of the metric it is (instructions, tokens).
    `answer` is what the model said, for reading."""

    id: str
    value: float
    weight: float = 1.0
    answer: str = ""


class Metric(msgspec.Struct, frozen=True):
    """`share`: the weighted mean of values, the more the better. `perplexity`: its exponential, the less the better."""

    name: str
    kind: Kind
    units: list[Unit]

    @property
    def figure(self) -> float:
        return float(_figures(self.kind, *_columns([self])[:2])[0])


class Results(msgspec.Struct, frozen=True):
    """What one model got. `suite` is the digest of all that was asked and how: only results of the same suite can be compared."""

    model: str
    suite: str
    metrics: list[Metric]


class Change(msgspec.Struct, frozen=True):
    """How one metric changed. `low` and `high` are the ends of the change's 95 % interval."""

    metric: str
    kind: Kind
    units: int
    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> Literal["fell", "rose", "held"]:
        """Worse or better by more than half the interval's width, or neither. A perplexity that moved by less than `ROUNDING` of itself
        held: the same weights give so much another one in other company."""
        if self.kind == "perplexity" and abs(self.change) < ROUNDING * self.before:
            return "held"
        better = -self.change if self.kind == "perplexity" else self.change
        return "fell" if better < -self.half_width else "rose" if better > self.half_width else "held"


def compare(before: Results, after: Results, seed: int = 0, resamples: int = RESAMPLES) -> list[Change]:
    """One change for each metric, in order. Raises Conflict for results of different suites, InvalidRequest for fewer than five units."""
    if before.suite != after.suite:
        raise Conflict(
            f"{before.model} was asked another suite than {after.model} ({before.suite} and {after.suite}); ask both the same",
            param="before",
        )
    return [_change(one, other, seed, resamples) for one, other in zip(before.metrics, after.metrics, strict=True)]


def fallen(changes: Sequence[Change]) -> list[str]:
    """Names of the metrics that fell. Empty: nothing did, and a gate may open."""
    return [change.metric for change in changes if change.verdict == "fell"]


def rows(changes: Sequence[Change]) -> list[dict[str, str]]:
    """As tables show them: shares in per cent, perplexities as they are."""
    return [_row(change) for change in changes]


def table(changes: Sequence[Change]) -> str:
    """The rows as lines of text, with a head and a last line that says what fell."""
    lines = [list(COLUMNS), *([row[column] for column in COLUMNS] for row in rows(changes))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, said(changes)])


def said(changes: Sequence[Change]) -> str:
    """One sentence for a person."""
    lost = fallen(changes)
    if not lost:
        return "Nothing fell by more than half its interval's width."
    return f"Fell by more than half their intervals' width: {', '.join(lost)}."


COLUMNS = ("metric", "before", "after", "change", "95 % interval", "units", "verdict")


def _row(change: Change) -> dict[str, str]:
    factor, digits = (100, 1) if change.kind == "share" else (1, 2)
    before, after, moved, low, high = (factor * value for value in (change.before, change.after, change.change, change.low, change.high))
    cells = (
        f"{change.metric}, %" if change.kind == "share" else change.metric,
        f"{before:.{digits}f}",
        f"{after:.{digits}f}",
        f"{moved:+.{digits}f}",
        f"{low:+.{digits}f} to {high:+.{digits}f}",
        str(change.units),
        change.verdict,
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _change(before: Metric, after: Metric, seed: int, resamples: int) -> Change:
    keys = [[(unit.id, unit.weight) for unit in metric.units] for metric in (before, after)]
    if (before.name, before.kind) != (after.name, after.kind) or keys[0] != keys[1]:
        raise Conflict(f"the units of {before.name} are not those of {after.name}; ask both models the same", param="before")
    num = len(before.units)
    if num < FEWEST:
        raise InvalidRequest(f"{before.name} has {num} units, too few for an interval; give at least {FEWEST}", param="units")
    one_U, weights_U, other_U = _columns([before, after])
    drawn_RU = np.random.default_rng(seed).integers(num, size=(resamples, num))
    then_R = _figures(before.kind, one_U[drawn_RU], weights_U[drawn_RU])
    now_R = _figures(after.kind, other_U[drawn_RU], weights_U[drawn_RU])
    low, high = np.quantile(now_R - then_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Change(before.name, before.kind, num, before.figure, after.figure, float(low), float(high))


def _columns(metrics: Sequence[Metric]) -> list[np.ndarray]:
    """Values of the first, its weights, values of the others. Raises InvalidRequest for a value that is no finite number."""
    values = [np.array([unit.value for unit in metric.units], np.float64) for metric in metrics]
    weights = np.array([unit.weight for unit in metrics[0].units], np.float64)
    for metric, column in zip(metrics, values, strict=True):
        if not (np.isfinite(column).all() and (weights > 0).all()):
            raise InvalidRequest(f"{metric.name} holds a value that is no finite number, or a weight of 0 or less", param="units")
    return [values[0], weights, *values[1:]]


def _figures(kind: Kind, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric of each row of units."""
    values, weights = np.atleast_2d(values), np.atleast_2d(weights)
    mean = (values * weights).sum(axis=1) / weights.sum(axis=1)
    return np.asarray(np.exp(mean) if kind == "perplexity" else mean)
