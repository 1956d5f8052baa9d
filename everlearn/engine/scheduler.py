"""Whose turn it is: training and sampling share one device by time.

Both have work most of the time in a system that learns while it serves. The scheduler gives each its share of the device's seconds
(weighted fair queueing over the two): a slice of training is one packed row, a step of sampling is one decode or prefill, so
neither waits for the other longer than one such unit. A side that was idle starts level with the other: idleness saves up nothing.
"""

from __future__ import annotations

TRAIN, SAMPLE = "train", "sample"


class Scheduler:
    """`sampling_share` of the time goes to sampling while both have work."""

    def __init__(self, sampling_share: float):
        self.shares = {TRAIN: 1.0 - sampling_share, SAMPLE: sampling_share}
        self.used = {TRAIN: 0.0, SAMPLE: 0.0}  # seconds divided by share
        self.last: set[str] = set()

    def pick(self, wants: set[str]) -> str | None:
        """The side to run next out of those that have work."""
        for side in wants - self.last:
            self.used[side] = max(self.used.values())
        self.last = set(wants)
        return min(sorted(wants), key=lambda side: self.used[side]) if wants else None

    def charge(self, side: str, seconds: float) -> None:
        """The side ran for so long."""
        self.used[side] += seconds / self.shares[side]
