"""Which request kills the engine: found by running suspects alone, so that one request can't take the server down for all.

A request that was in the engine at several deaths is a suspect. It is held until nothing else runs, then runs alone. If the
engine dies again, twice, while it is alone, that request is given up and everything else goes on. An innocent request that
merely ran beside the culprit finishes when it is alone. Pure bookkeeping: no I/O, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

SUSPECT_DEATHS = 3
ALONE_DEATHS = 2


class Quarantine:
    def __init__(self) -> None:
        self.deaths: Counter[str] = Counter()
        self.alone_deaths: Counter[str] = Counter()
        self.alone: str | None = None  # the suspect that is in the engine by itself
        self.next: str | None = None  # the suspect for which the engine is being emptied

    @property
    def active(self) -> bool:
        return self.alone is not None or self.next is not None

    def may_send(self, request_id: str, in_flight: int) -> bool:
        """Whether `request_id` may go to an engine that holds `in_flight` unanswered requests. True is a promise to send it."""
        if self.alone is not None:
            return False
        if self.deaths[request_id] < SUSPECT_DEATHS:
            return self.next is None
        if self.next not in (None, request_id):
            return False
        if in_flight:
            self.next = request_id
            return False
        self.alone, self.next = request_id, None
        return True

    def release(self, request_id: str) -> bool:
        """It finished, so it isn't the one. Whether others may have been held back until now."""
        held = self.active
        if self.alone == request_id:
            self.alone = None
        if self.next == request_id:
            self.next = None
        self.deaths.pop(request_id, None)
        self.alone_deaths.pop(request_id, None)
        return held

    def died(self, in_flight: Iterable[str]) -> str | None:
        """The engine died with these unanswered; returns the request to give up, if that is now certain."""
        alone, self.alone, self.next = self.alone, None, None
        if alone is None:
            self.deaths.update(list(in_flight))
            return None
        self.alone_deaths[alone] += 1
        return alone if self.alone_deaths[alone] >= ALONE_DEATHS else None
