"""How good predictions were that were made before the label was seen. Pure functions of probabilities and what came.

- Brier (1950): mean squared error of a probability
- area under the ROC curve with its standard error: Hanley and McNeil (1982)
- expected calibration error: Naeini et al. (2015), ten bins of equal width
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

BINS = 10


class Calibration(msgspec.Struct, frozen=True):
    """Of `num` predictions. Figures are None where there is nothing to say: no prediction, or for `auc` only one kind of event.

    `log_loss` is of the label itself, in nats; the others are of the event that it is a good one (thumb up, first preferred, four or five
    stars). `base_log_loss` is that event's entropy: what somebody who knows only how often it comes would lose. `event_log_loss` is to be
    compared with it.
    """

    num: int
    log_loss: float | None = None
    event_log_loss: float | None = None
    base_log_loss: float | None = None
    brier: float | None = None
    auc: float | None = None
    auc_error: float | None = None
    ece: float | None = None


def calibration(chances_N: np.ndarray, events_N: np.ndarray, logs_N: np.ndarray) -> Calibration:
    """`chances_N`: predicted probability of the event; `events_N`: whether it came; `logs_N`: log probability of the very label."""
    num = len(chances_N)
    if not num:
        return Calibration(0)
    clipped = np.clip(chances_N, 1e-9, 1 - 1e-9)
    rate = min(max(float(events_N.mean()), 1e-9), 1 - 1e-9)
    area = auc(chances_N, events_N)
    return Calibration(
        num=num,
        log_loss=float(-logs_N.mean()),
        event_log_loss=float(-np.where(events_N, np.log(clipped), np.log1p(-clipped)).mean()),
        base_log_loss=-(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)),
        brier=float(((chances_N - events_N) ** 2).mean()),
        auc=area,
        auc_error=None if area is None else auc_error(area, int(events_N.sum()), int(num - events_N.sum())),
        ece=ece(chances_N, events_N),
    )


def auc(scores_N: np.ndarray, events_N: np.ndarray) -> float | None:
    """How often a score of an event is above one of a non-event; ties count half. None where only one of the two came."""
    positives = int(events_N.sum())
    negatives = len(events_N) - positives
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score: the mean rank of those that share it
    total = float(ranks[place][events_N.astype(bool)].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def auc_error(area: float, positives: int, negatives: int) -> float:
    """Its standard error."""
    both, twice = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (both - area * area) + (negatives - 1) * (twice - area * area)
    return math.sqrt(max(variance, 0.0) / (positives * negatives))


def ece(chances_N: np.ndarray, events_N: np.ndarray, bins: int = BINS) -> float:
    """Sum over bins of (share of predictions) |mean prediction - rate of events|."""
    return sum(abs(count * (chance - rate)) for chance, rate, count in reliability(chances_N, events_N, bins)) / max(len(chances_N), 1)


def reliability(chances_N: np.ndarray, events_N: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """For each bin that isn't empty: mean prediction, rate of events, count. What a calibration plot draws."""
    places = np.minimum((chances_N * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = places == number
        if inside.any():
            found.append((float(chances_N[inside].mean()), float(events_N[inside].mean()), int(inside.sum())))
    return found
