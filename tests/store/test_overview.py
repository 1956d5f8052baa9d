"""The line of the loop in figures, of one tenant; and marks that differ after a change."""

from __future__ import annotations

from typing import Any

from everlearn.store import feedback, overview
from everlearn.store.db import Database
from everlearn.store.feedback import Feedback
from tests.store.acts import do
from tests.store.test_deployments import SIGNED, create, promote, to_canary, two
from tests.store.test_records import record, write

__all__ = ["two"]  # a fixture


def line(db: Database, tenant: str = "a") -> dict[str, overview.Station]:
    return {station.name: station for station in db.read(lambda conn: overview.stations(conn, tenant))}


def marks(db: Database, tenant: str = "a") -> dict[str, Any]:
    return {part: db.read(lambda conn, p=part: overview.mark(conn, tenant, p)) for part in overview.ENDS}  # type: ignore[misc]


def test_a_store_without_anything_is_a_line_of_noughts(db: Database) -> None:
    assert {(station.count, station.newest, station.note) for station in line(db).values()} == {(0, None, "")}
    assert list(line(db)) == ["answers", "feedback", "episodes", "labels", "datasets", "versions", "gate", "canary", "live"]


def test_each_station_counts_what_is_there(two: Database) -> None:
    before = marks(two)
    one, other = record(1), record(2)
    write(two, one, other)
    said: list[dict[str, Any]] = [{"kind": "boolean", "value": 1.0}, {"kind": "boolean", "value": 0.0}, {"kind": "comment", "text": "Nice"}]
    for word in said:  # of the two thumbs of one source the last counts
        given = Feedback(tenant="a", record_id=one.record_id, source_id="ann", **word)
        do(two, lambda conn, g=given: feedback.add(conn, g))  # type: ignore[misc]
    found = line(two)
    counts = {name: station.count for name, station in found.items()}
    assert counts == {
        "answers": 2, "feedback": 2, "episodes": counts["episodes"], "labels": 1, "datasets": 0, "versions": 2, "gate": 0, "canary": 0, "live": 0,
    }  # fmt: skip
    assert (
        counts["episodes"] in (1, 2)
        and found["versions"].note == "of 1 name"
        and found["answers"].newest == max(one.created_at, other.created_at)
    )
    assert {part for part, mark in marks(two).items() if mark != before[part]} == {"answers", "episodes", "feedback"}
    assert {station.count for station in line(two, "b").values()} == {0} and marks(two, "b") == {
        part: [None] * len(mark) for part, mark in before.items()
    }


def test_a_candidate_is_seen_from_the_gate_to_live(two: Database) -> None:
    create(two, SIGNED, champion=1)
    assert (line(two)["live"].count, line(two)["live"].note) == (1, "support@1")
    before = marks(two)["deployments"]
    to_canary(two)
    assert marks(two)["deployments"] != before
    found = line(two)
    assert (found["canary"].count, found["canary"].note) == (1, "support@2 at 25 %") and found["live"].note == "support@1; 1 in a cycle"
    promote(two)
    found = line(two)
    assert (
        (found["gate"].count, found["gate"].note) == (1, "1 promoted") and found["canary"].count == 0 and found["live"].note == "support@2"
    )
