"""Which request kills the engine: found by running suspects alone, so that one request can't take the server down for all.

A request that was in the engine at several deaths is a suspect. It is held until nothing else runs, then runs alone. If the
engine dies again and again while it is alone, that request is given up and everything else goes on. An innocent request that
merely ran beside the culprit finishes when it is alone. An engine that was killed from outside says little about what it ran: a
long request meets many such deaths, so each counts for a third. Pure bookkeeping: no I/O, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

DEATH, FROM_OUTSIDE = 3, 1  # blame for a death of the engine's own, and for one that came from outside
SUSPECT_BLAME = 3 * DEATH
ALONE_BLAME = 3 * DEATH


class Quarantine:
    def __init__(self) -> None:
        self.blame: Counter[str] = Counter()
        self.alone_blame: Counter[str] = Counter()
        self.alone: str | None = None  # the suspect that is in the engine by itself
        self.next: str | None = None  # the suspect for which the engine is being emptied

    @property
    def active(self) -> bool:
        return self.alone is not None or self.next is not None

    def may_send(self, request_id: str, in_flight: int) -> bool:
        """Whether `request_id` may go to an engine that holds `in_flight` unanswered requests. True is a promise to send it."""
        if self.alone is not None:
            return False
        if self.blame[request_id] < SUSPECT_BLAME:
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
        self.blame.pop(request_id, None)
        self.alone_blame.pop(request_id, None)
        return held

    def died(self, in_flight: Iterable[str], *, from_outside: bool = False) -> str | None:
        """The engine died with these unanswered; returns the request to give up, if that is now certain."""
        alone, self.alone, self.next = self.alone, None, None
        blame = FROM_OUTSIDE if from_outside else DEATH
        if alone is None:
            for request_id in in_flight:
                self.blame[request_id] += blame
            return None
        self.alone_blame[alone] += blame
        return alone if self.alone_blame[alone] >= ALONE_BLAME else None
