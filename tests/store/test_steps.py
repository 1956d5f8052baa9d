"""What runs report of their steps: once, bounded, and of one tenant alone."""

from __future__ import annotations

import pytest

from everlearn.errors import InvalidRequest, NotFound, TooLarge
from everlearn.store import log, steps
from everlearn.store.db import Database
from tests.store.acts import DONE, append, do, entry, new_run


def finish(db: Database, run: str, seq: int, kind: str, metrics: dict[str, float], **meta: object) -> None:
    request = append(db, entry(run, seq, kind, **meta))
    do(db, lambda conn: log.finish(conn, request.request_id, DONE, None, metrics=metrics))
    do(db, lambda conn: log.finish(conn, request.request_id, DONE, None, metrics=metrics))  # a replay answers again


def test_a_point_is_an_optimizer_step_and_what_was_asked_for_before(db: Database) -> None:
    run = new_run(db)
    told = {"loss:sum": 2.0, "ratio:max": 3.0, "ratio:min": 0.5, "kl:mean": 1.0, "bad:mean": float("nan")}
    finish(db, run, 1, "forward_backward", told, loss="ppo")
    finish(db, run, 2, "forward_backward", {"loss:sum": 1.0, "ratio:max": 2.0, "ratio:min": 0.7, "kl:mean": 3.0}, loss="ppo")
    finish(db, run, 3, "forward_backward", {"loss:sum": 100.0}, forward_only=True)
    finish(db, run, 4, "optim_step", {"grad_norm": 0.25}, learning_rate=0.1)
    finish(db, run, 5, "optim_step", {})
    found = db.read(lambda conn: steps.curves(conn, "a", run, steps.LOG))
    assert found.x == [1, 2]
    assert found.series == {
        "loss:sum": [3.0, None], "ratio:max": [3.0, None], "ratio:min": [0.5, None], "kl:mean": [2.0, None], "grad_norm": [0.25, None],
        "learning_rate": [0.1, None],
    }  # fmt: skip
    assert db.read(lambda conn: steps.losses(conn, "a", run)) == ["ppo"]
    assert db.read(lambda conn: steps.curves(conn, "b", run, steps.LOG)).x == []
    assert db.read(lambda conn: steps.newest(conn, "a", [run]))[run]["loss:sum"] == 1.0


def test_a_step_that_is_told_again_replaces_the_first_word(db: Database) -> None:
    run = new_run(db)
    for value in (1.0, 2.0):
        do(db, lambda conn, v=value: steps.tell(conn, "a", run, [(0, {"reward": v}), (1, {"reward": 3.0})]))  # type: ignore[misc]
    assert db.read(lambda conn: steps.curves(conn, "a", run, steps.CLIENT)).series == {"reward": [2.0, 3.0]}
    with pytest.raises(NotFound):
        do(db, lambda conn: steps.tell(conn, "b", run, [(0, {})]))
    with pytest.raises(InvalidRequest):
        do(db, lambda conn: steps.tell(conn, "a", run, [(0, {"x" * 300: 1.0})]))
    with pytest.raises(TooLarge):
        do(db, lambda conn: steps.describe(conn, "a", run, {"x": "y" * steps.MAX_SETTINGS}))


def test_both_are_bounded_for_each_run(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(db)
    monkeypatch.setattr(steps, "KEPT_STEPS", 10)
    monkeypatch.setattr(steps, "SWEEP_EVERY", 20)
    do(db, lambda conn: steps.tell(conn, "a", run, [(number, {"x": 1.0}) for number in range(41)]))
    kept = db.read(lambda conn: steps.list_steps(conn, "a", run, steps.CLIENT, 100))
    assert [step.number for step in kept] == list(range(31, 41))
    odd = range(1, 301, 2)
    do(db, lambda conn: [steps.tell(conn, "a", run, [(number, {"x": 1.0})]) for number in odd])
    assert len(db.read(lambda conn: steps.list_steps(conn, "a", run, steps.CLIENT, 1000))) == 10
    do(db, lambda conn: [steps.note(conn, "a", run, number, "optim_step", "", {}) for number in odd])
    assert len(db.read(lambda conn: steps.list_steps(conn, "a", run, steps.LOG, 1000))) < 100, "not by the numbers that a client gives"


def test_groups_have_a_room_and_a_number(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(db)
    body = {"members": [], "text": "y" * 1000}

    def add(step: int, *numbers: int, summary: dict[str, object] | None = None) -> list[tuple[int, int]]:
        packed = [steps.pack(step, number, body, summary or {}) for number in numbers]
        do(db, lambda conn: steps.add_groups(conn, "a", run, step, packed))
        return [(group.step, group.number) for group in db.read(lambda conn: steps.list_groups(conn, "a", run))]

    monkeypatch.setattr(steps, "KEPT_BYTES", 3500)
    for number in range(5):
        add(number, 0)
    assert add(5, 0) == [(5, 0), (4, 0), (3, 0)]
    assert add(6, 0, 1, 2, 3) == [(6, 1), (6, 2), (6, 3)], "a step that takes more than the room keeps its newest"
    assert db.read(lambda conn: steps.get_group(conn, "a", run, 6, 3)).body == body
    assert add(7, 0, summary={"tags": ["z" * 2000]}) == [(7, 0)], "summaries count"
    with pytest.raises(NotFound):
        db.read(lambda conn: steps.get_group(conn, "b", run, 7, 0))
    monkeypatch.setattr(steps, "KEPT_BYTES", 10**6)
    monkeypatch.setattr(steps, "KEPT_GROUPS", 4)
    assert add(8, 0, 1, 2) == [(8, 0), (8, 1), (8, 2), (7, 0)]
    assert add(9, 1, 0) == [(9, 0), (9, 1), (8, 1), (8, 2)]
    behind = db.read(lambda conn: steps.list_groups(conn, "a", run, after=(9, 0), limit=2))
    assert [(group.step, group.number) for group in behind] == [(9, 1), (8, 1)]
    assert db.read(lambda conn: (steps.played_steps(conn, "a", run), steps.group_numbers(conn, "a", run, 8))) == ([8, 9], [1, 2])
    assert db.read(lambda conn: steps.played_steps(conn, "b", run)) == []
    assert do(db, lambda conn: steps.forget_rollouts(conn, 1e12)) == 4
