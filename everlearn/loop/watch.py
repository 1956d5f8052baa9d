"""Watching what was promoted: its outcomes and guardrails against the record of the version before, and the way back where one is crossed.

A client like the runner, of which it is a part (everlearn/loop/live.py judges). A look costs a listing of the records since the look before
and one of the feedback since the promotion, which may have been edited; the first one after a promotion or a start reads the record too,
with each answer's text where a guardrail needs it (outcomes.OF_TEXT). A crossing that is seen is one request to roll back, which the next
request of a user meets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from everlearn.errors import Conflict, EverlearnError
from everlearn.loop import description as descriptions
from everlearn.loop import outcomes, rule, sources
from everlearn.loop.description import Description
from everlearn.loop.evidence import Alarm, Evidence, Outcome
from everlearn.loop.gate import decide
from everlearn.loop.live import surely
from everlearn.loop.outcomes import FEEDBACK, Told
from everlearn.loop.rule import Rule, WatchRule
from everlearn.loop.service import Api, Deployed, pages, read, route, source_cap
from everlearn.rewards import guard

HOUR = 3600.0
MOVES = ("promoted", "rolled_back", "created")  # kinds of events that may change what serves
BACK = 600  # seconds that a listing goes back behind what is known: an answer is kept when it ends, and counts from when it began
TURNED = 50  # events on one page


class Watch:
    """Looks after what serves under `name`."""

    def __init__(self, api: Api, name: str, say: Callable[[str], None] = print, clock: Callable[[], float] = time.time):
        self.api, self.name, self.say, self.clock = api, name, say, clock
        self.known: dict[str, dict[str, float]] = {}  # what was read of the live version's texts
        self._listed: dict[str, dict[str, Any]] = {}  # its records, by id; those that are deleted stay until the next promotion
        self._since: tuple[int, float | None] = (-1, None)  # of which revision, and when its champion came
        self._record: tuple[float, dict[str, list[Told]]] = (0.0, {})  # of which promotion, and by guardrail

    def watch(self, poll: float, over: threading.Event) -> None:
        """Every `poll` seconds, until `over` is set. Errors are told, and the next look is taken all the same."""
        while not over.is_set():
            try:
                now = read(self.api, self.name)
                if not now.paused:
                    self.look(now)
            except EverlearnError as error:
                self.say(f"watching: {error.message}")
            over.wait(poll)

    def look(self, now: Deployed) -> bool:
        """Whether the version that serves was found worse than the one before, and that one serves again."""
        described = descriptions.of(now.description)
        asked = rule.rule_of(described.gate)
        if asked.watch is None or now.previous is None or (since := self._promoted(now)) is None:
            return False
        if self.clock() - since >= asked.watch.hours * HOUR:
            return False
        found = self.evidence(now, described, asked, asked.watch, since)
        verdict = decide(asked, found)
        if verdict.decision != "reject":
            return False
        told = {"verdict": msgspec.to_builtins(verdict), "rule": msgspec.to_builtins(asked), "evidence": msgspec.to_builtins(found)}
        reason = f"{now.champion} is worse than {now.previous} was: {verdict.reason}"[:2000]
        number = int(now.previous.rpartition("@")[2])
        try:
            self.api.post(f"{route(now.name)}/rollback", {"number": number, "reason": reason, "evidence": told, "expected": now.revision})
        except Conflict:
            return True  # somebody changed it: whoever looks next sees what there is now
        self.say(f"rolled back: {reason}")
        return True

    def evidence(self, now: Deployed, described: Description, asked: Rule, watch: WatchRule, since: float) -> Evidence:
        """What everybody got since the promotion, behind the record of the version before."""
        assert now.previous is not None
        arms = msgspec.structs.replace(now, champion=now.previous, candidate=now.champion)
        names, cap = list(asked.guardrails), source_cap(self.api)
        if self._record[0] != since:
            self.known, self._listed = {}, {}  # another promotion: what was known of the last is past
            begin = since - watch.record_hours * HOUR
            before = outcomes.Traffic(self.api, arms, begin, described.settle, since, each=True, ended=True, cap=cap)
            self._record = (since, {name: _of(told, candidate=False) for name, told in before.told(names).items()})
        record = self._record[1]
        listed = self._records(since)
        live = outcomes.Traffic(self.api, arms, since, described.settle, self.clock(), self.known, each=True, listed=listed, cap=cap)
        since_then = {name: _of(told, candidate=True) for name, told in live.told(names).items()}
        shown = outcomes.evident({name: [*record.get(name, ()), *told] for name, told in since_then.items()})
        found = Evidence(
            stage="watch",
            champion=now.previous,
            candidate=now.champion,
            hours=max(0.0, self.clock() - since) / HOUR,
            **shown,
        )
        without = sources.left_out(asked, found, FEEDBACK, len(found.feedback))
        ended = len(record[FEEDBACK])
        return msgspec.structs.replace(found, alarms=cusum(watch, found.feedback[:ended], found.feedback[ended:], without))

    def _records(self, since: float) -> list[dict[str, Any]]:
        """Those since the promotion, oldest first; what an earlier look has listed isn't listed again."""
        newest = max((float(row["created_at"]) for row in self._listed.values()), default=since)
        self._listed |= {row["id"]: row for row in pages(self.api, "/v1/records", max(since, newest - BACK), model=self.name)}
        return [self._listed[record] for record in sorted(self._listed)]

    def _promoted(self, now: Deployed) -> float | None:
        """Since when the champion serves, where it was promoted; None where it came by a rollback or at the beginning."""
        if self._since[0] != now.revision:  # not only another champion: the same may have gone and come again between two looks
            self._since = (now.revision, self._found(now))
        return self._since[1]

    def _found(self, now: Deployed) -> float | None:
        after: Any = None
        while True:
            page = self.api.get(f"{route(now.name)}/history", limit=TURNED, after=after)
            for event in page["data"]:
                if event["kind"] in MOVES:
                    return float(event["created_at"]) if event["kind"] == "promoted" else None
            if not page["has_more"]:
                return None
            after = page["last_id"]


def _of(told: Sequence[Told], candidate: bool) -> list[Told]:
    return [one for one in told if one.outcome.candidate == candidate]


def cusum(watch: WatchRule, record: Sequence[Outcome], live: Sequence[Outcome], without: Sequence[np.ndarray] = ()) -> tuple[Alarm, ...]:
    """`cusum`: Page's detector on human outcome against what the record of the version before surely promises (rewards/guard.py); none
    without a record that is long enough. What is held against is wrong with probability `alpha` / 2; where it isn't, a false alarm comes
    once in `labels` outcomes on average, which is another promise than the watch's tests'. (The record's own mean is above the truth half
    of the time, and what is promised too high is crossed in the end.) It is a veto where it is one without each source too; `without` has
    what is left then, bool [N] of the outcomes of both."""
    if not watch.labels or len(record) < watch.min_record:
        return ()
    values_N = np.array([one.value for one in (*record, *live)])
    before_N = np.arange(len(values_N)) < len(record)

    def diverged(kept_N: np.ndarray) -> Alarm:
        promised = surely(values_N[kept_N & before_N], watch.alpha / 2, lower=True)
        live_N = values_N[kept_N & ~before_N]
        return guard.divergence([promised] * len(live_N), live_N.tolist(), watch.margin, float(watch.labels))

    def stands(kept_N: np.ndarray) -> bool:
        return int((kept_N & before_N).sum()) >= watch.min_record and diverged(kept_N).veto

    found = diverged(np.ones(len(values_N), dtype=bool))
    if found.veto and not sources.stands(without, stands):
        found = msgspec.structs.replace(found, veto=False, reason=found.reason + sources.ALONE)
    reason = found.reason.replace("the model promises", "the record promises").replace("held-out labels", "outcomes")
    return (msgspec.structs.replace(found, name="cusum", reason=reason),)
