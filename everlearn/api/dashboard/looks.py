"""A look at a canary as it is now: what the gate would say of the traffic so far, by the very functions that the runner asks.

The runner keeps a verdict only when something follows from it. Between two of them this says where things stand, so that an interval can be
watched while it grows; asked as often as one likes, it promises no less (everlearn/loop/sequential.py). Nothing is decided or kept here.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection

from everlearn.api.deployments import deployment_json
from everlearn.api.feedback import feedback_json
from everlearn.api.paging import page
from everlearn.api.records import body_json, row_json
from everlearn.errors import EverlearnError, NotFound
from everlearn.loop import description as descriptions
from everlearn.loop import gate, outcomes, rule
from everlearn.loop.evidence import Evidence
from everlearn.loop.rule import Rule
from everlearn.loop.service import deployed
from everlearn.store import feedback, records
from everlearn.store.deployments import Deployment, Event

KEPT = 256
T = TypeVar("T")


class Look(msgspec.Struct, frozen=True):
    """`verdict` on `evidence` by `rule`; `course`: how the interval of candidate minus champion came closer, (outcomes, low, high)."""

    verdict: gate.Verdict
    rule: Rule
    evidence: Evidence
    course: list[tuple[int, float, float]]
    taken_at: float


class Past(msgspec.Struct, frozen=True):
    """A verdict of the history, None where the event has none. `differs`: what comes out otherwise when it is derived again."""

    look: Look | None
    differs: str


class StoreApi:
    """What everlearn/loop/outcomes.py reads over HTTP, read from the store in one transaction."""

    url, key = "", ""

    def __init__(self, conn: Connection, tenant: str):
        self.conn, self.tenant = conn, tenant

    def get(self, path: str, limit: int = 500, after: str | None = None, **chosen: Any) -> Any:
        if path == "/v1/records":
            return page(records.list_rows(self.conn, self.tenant, limit + 1, after, **chosen), limit, row_json)
        if path == "/v1/feedback":
            return page(feedback.list_feedback(self.conn, self.tenant, limit + 1, after, **chosen), limit, feedback_json)
        if path.startswith("/v1/records/"):
            row, body = records.get(self.conn, self.tenant, path.removeprefix("/v1/records/"))
            return row_json(row) | {"content": body_json(body)}
        raise NotFound(f"{path} isn't read here", param="path")

    def post(self, path: str, body: Any = None) -> Any:
        raise NotFound(f"{path}: a look changes nothing", param="path")

    patch = post

    def lines(self, path: str, **params: Any) -> list[dict[str, Any]]:
        raise NotFound(f"{path} isn't read here", param="path")


def take(conn: Connection, found: Deployment, now: float, cap: float = outcomes.SOURCE_CAP) -> Look | None:
    """The look at a deployment's canary, where a source counts `cap` times at most; None where there is none, or its runner hasn't noted
    what came before it."""
    if found.state != "canary" or "canary_began" not in found.cycle or "offline" not in found.cycle:
        return None
    described = descriptions.of(found.description)
    asked, since = rule.rule_of(described.gate), float(found.cycle["canary_began"])
    traffic = outcomes.Traffic(StoreApi(conn, found.tenant), deployed(deployment_json(found)), since, described.settle, now, cap=cap)
    evidence = outcomes.of_canary(traffic, asked)
    return Look(gate.decide(asked, evidence), asked, evidence, gate.course(asked, evidence), now)


class Looks:
    """Looks, each kept for ten times as long as it took: ten open pages cost no more than one, and a look that takes long is taken seldom.
    What the history has is worked out once. `home` tells the servers of one process apart. A lock isn't needed: two that look at once do
    the work twice."""

    def __init__(self) -> None:
        self._now: OrderedDict[Hashable, tuple[float, int, Look | None]] = OrderedDict()
        self._past: OrderedDict[Hashable, Past] = OrderedDict()

    def now(self, conn: Connection, found: Deployment, home: Path, cap: float = outcomes.SOURCE_CAP) -> tuple[Look | None, float]:
        """The look at the present canary, and after how many seconds the next one is taken."""
        key, time_now = (home, found.tenant, found.name), time.time()
        until, revision, look = self._now.get(key, (0.0, 0, None))
        if time_now >= until or revision != found.revision:
            look = take(conn, found, time_now, cap)
            until = time.time() + 10.0 * (time.time() - time_now)
            _keep(self._now, key, (until, found.revision, look))
        return look, max(0.0, until - time_now)

    def past(self, found: Deployment, event: Event, home: Path) -> Past:
        key = (home, found.tenant, event.id)
        known = self._past.get(key)
        return known if known is not None else _keep(self._past, key, past(event))


def past(event: Event) -> Past:
    """Derives the verdict of an event again from what stands beside it."""
    try:
        verdict = msgspec.convert(event.evidence["verdict"], gate.Verdict)
        asked = msgspec.convert(event.evidence["rule"], Rule)
        evidence = msgspec.convert(event.evidence["evidence"], Evidence)
        course = gate.course(asked, evidence) if evidence.stage == "canary" else []
    except (msgspec.ValidationError, KeyError, EverlearnError):  # anybody with the scope may write evidence of another form
        return Past(None, "")
    try:
        gate.replay(verdict, asked, evidence)
        differs = ""
    except EverlearnError as error:
        differs = error.message
    return Past(Look(verdict, asked, evidence, course, event.created_at), differs)


def _keep(kept: OrderedDict[Hashable, T], key: Hashable, made: T) -> T:
    kept[key] = made
    kept.move_to_end(key)
    if len(kept) > KEPT:
        kept.popitem(last=False)
    return made
