"""Acts of people and runners on a deployment in any order, late, repeated and refused, against what must always hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Connection

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.store import deployments, names
from everlearn.store.db import Database
from everlearn.store.deployments import NEXT, TRIED, Act, Deployment
from tests.store.acts import do, new_run
from tests.store.test_names import give, save

SIGNED = {"base": "tiny", "gate": {"owner": "maria", "promote": "automatic", "canary": {}}}
VERSIONS, ACTS = 3, 250
Does = Callable[[Connection, Act], Deployment]


def now(db: Database) -> Deployment:
    return db.read(lambda conn: deployments.get(conn, "a", "support"))


def chosen(rng: random.Random, before: Deployment) -> Does:
    """What somebody does: mostly what may be done, sometimes anything. Number 4 isn't there."""
    number = rng.choice([None, None, 0, 1, 2, 3, 4])
    kind = rng.randrange(8)
    if kind < 5:
        to = rng.choice([*NEXT[before.state], *NEXT, "nowhere"])
        more: dict[str, Any] = {"candidate": number, "share": rng.choice([0.1, 0.5, 1.5]), "shadow": rng.choice([0.0, 0.5])}
        ends = "rejected" if to == "collect" or rng.random() < 0.1 else "advanced"
        return lambda conn, act: deployments.advance(conn, "a", "support", to, act, kind=ends, **more)
    if kind == 5:
        by_rule = rng.random() < 0.5
        return lambda conn, act: deployments.promote(conn, "a", "support", act, number, by_rule)
    if kind == 6:
        return lambda conn, act: deployments.rollback(conn, "a", "support", act, number)
    paused = rng.random() < 0.3
    return lambda conn, act: deployments.pause(conn, "a", "support", paused, act)


def test_whatever_is_done_what_serves_is_there_and_the_log_tells_it(db: Database) -> None:
    run, rng, changes = new_run(db), random.Random(7), 0
    for seq in range(1, VERSIONS + 1):
        give(db, "support", save(db, run, seq, f"ck{seq}"))
    do(db, lambda conn: deployments.create(conn, "a", "support", "tiny", SIGNED, Act("ana"), 1))
    for place in range(ACTS):
        before = now(db)
        act = Act("somebody", f"act {place}", {}, before.revision - (rng.random() < 0.2))
        does = chosen(rng, before)
        try:
            after = do(db, lambda conn, does=does, act=act: does(conn, act))
        except (Conflict, InvalidRequest, NotFound):
            assert now(db) == before, "what is refused changes nothing"
            continue
        assert after == now(db) and after.revision - before.revision in (0, 1)
        changes += after.revision - before.revision
        if after != before:
            assert do(db, lambda conn, does=does, act=act: does(conn, act)) == after, "sent again it has no second effect"
        meant = db.read(lambda conn: names.get(conn, "a", "support")).number
        assert 0 <= after.champion <= VERSIONS and (not after.champion or meant == after.champion)
        assert (after.candidate is not None) == (after.state in TRIED)
        assert (after.share > 0) == (after.state == "canary") and not (after.shadow and after.state != "shadow")
    events = db.read(lambda conn: deployments.history(conn, "a", "support", 1000))
    assert len(events) == 1 + changes > ACTS / 5
    assert {event.kind for event in events} >= {"created", "advanced", "promoted", "rejected", "rolled_back", "paused", "resumed"}
    assert all(later.was == earlier.state for later, earlier in itertools.pairwise(events))
