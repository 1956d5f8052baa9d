"""A reward model in the store: labels come once, what is deleted goes with the weights that knew it, what only expired stays."""

from __future__ import annotations

from typing import Any

import pytest

from everlearn.errors import Conflict, NotFound
from everlearn.loop import rewarded
from everlearn.store import deployments, feedback, records, reward_models
from everlearn.store.db import Database
from everlearn.store.feedback import Feedback
from everlearn.store.reward_models import Doubt, Stream
from tests.store.acts import do
from tests.store.conftest import db as db
from tests.store.conftest import emptied_url as emptied_url
from tests.store.conftest import postgres_server as postgres_server
from tests.store.test_records import record, write

REPORT = {"labels": 2, "effective_labels": 2.0, "earned": False, "why": "few"}


def opened(db: Database) -> Stream:
    do(db, lambda conn: deployments.create(conn, "a", "desk", "tiny", {"base": "tiny"}, deployments.Act("me")))
    return do(db, lambda conn: reward_models.open_stream(conn, "a", "desk", "tiny"))


def answered(db: Database, number: int, model: str = "desk@0") -> str:
    made = record(number, model=model, messages=[{"role": "user", "content": f"{number}?"}], episode_id=f"e{number}")
    write(db, made)
    return made.record_id


def say(db: Database, record_id: str, **said: Any) -> Feedback:
    given = {"tenant": "a", "record_id": record_id, "kind": "boolean", "value": 1.0} | said
    return do(db, lambda conn: feedback.add(conn, Feedback(**given)))


def follow(db: Database, stream: Stream) -> Stream:
    """Takes what came, with features that say only how long a prompt was."""

    def act(conn: Any) -> Stream:
        changes = feedback.changes_after(conn, "a", stream.cursor)
        if not changes:
            return stream
        came, went = rewarded.wanted(conn, stream, changes, implicit=False)
        stored = [one.stored(bytes([len(one.ids), 0, 0, 0]), b"\0\0\0\0" if one.corrected or one.other else None) for one in came]
        return reward_models.take(conn, stream, changes[-1].id, stored, went)

    return do(db, act)


def known(db: Database) -> list[str]:
    return [one.feedback_id for one in db.read(lambda conn: reward_models.labels(conn, "a", "desk"))]


def publish(db: Database, stream: Stream) -> Any:
    stored = db.read(lambda conn: reward_models.labels(conn, "a", "desk"))
    return do(db, lambda conn: reward_models.publish(conn, stream, stored, reward_models.hash_of(stored), REPORT, b"m", b"t", 0.1))


def test_labels_come_once_and_the_last_word_counts(db: Database) -> None:
    stream = opened(db)
    first, other = answered(db, 1), answered(db, 2, model="shop@1")
    one = say(db, first)
    say(db, other)
    say(db, first, kind="comment", value=None, text="hm")
    after = follow(db, stream)
    assert known(db) == [one.feedback_id], "of this deployment, and of a kind that teaches"
    assert after.changed == 1
    with pytest.raises(Conflict, match="meanwhile"):
        follow(db, stream)
    two = say(db, first, value=0.0)
    after = follow(db, after)
    assert known(db) == [two.feedback_id], "the same source's word before it doesn't count any more"
    do(db, lambda conn: feedback.delete(conn, "a", two.feedback_id))
    assert known(db) == []
    follow(db, after)
    assert known(db) == [one.feedback_id], "and counts again"


def test_what_is_deleted_goes_with_the_weights_that_knew_it(db: Database) -> None:
    stream = opened(db)
    ids = [answered(db, number) for number in range(1, 4)]
    said = [say(db, one) for one in ids]
    stream = follow(db, stream)
    made = publish(db, stream)
    assert (made.number, made.cause) == (1, "labels")
    assert db.read(lambda conn: reward_models.weights(conn, "a", made.model_id)) == (b"m", b"t")
    with pytest.raises(NotFound):
        db.read(lambda conn: reward_models.get(conn, "b", made.model_id))
    stale = db.read(lambda conn: reward_models.stream(conn, "a", "desk"))
    do(db, lambda conn: records.delete(conn, "a", ids[1]))
    assert known(db) == [said[0].feedback_id, said[2].feedback_id]
    with pytest.raises(NotFound, match="only its figures"):
        db.read(lambda conn: reward_models.weights(conn, "a", made.model_id))
    assert stale is not None and publish(db, stale) is None, "a fit that began before the deletion is no version"
    now = follow(db, db.read(lambda conn: reward_models.stream(conn, "a", "desk")))
    again = publish(db, now)
    assert (again.number, again.cause) == (2, "deleted") and again.labels_hash != made.labels_hash


def test_what_only_grew_old_stays_until_it_is_deleted(db: Database) -> None:
    stream = opened(db)
    first = answered(db, 1)
    said = say(db, first)
    stream = follow(db, stream)
    do(db, lambda conn: records.sweep(conn, before=1e12))
    stream = follow(db, stream)
    assert known(db) == [said.feedback_id]
    do(db, lambda conn: feedback.delete(conn, "a", said.feedback_id))
    assert known(db) == [], "also of what has expired"


def test_what_was_edited_and_then_expired_before_anybody_looked_stays(db: Database) -> None:
    stream = opened(db)
    said = say(db, answered(db, 1))
    stream = follow(db, stream)
    do(db, lambda conn: feedback.edit(conn, "a", said.feedback_id, value=0.0))
    do(db, lambda conn: records.sweep(conn, before=1e12))
    follow(db, stream)
    assert known(db) == [said.feedback_id]


def test_an_edited_word_is_not_heard_twice(db: Database) -> None:
    stream = opened(db)
    said = say(db, answered(db, 1))
    stream = follow(db, stream)
    do(db, lambda conn: feedback.edit(conn, "a", said.feedback_id, value=0.0))
    fresh = say(db, answered(db, 2))
    behind = stream.cursor
    follow(db, stream)
    found = db.read(lambda conn: reward_models.labels(conn, "a", "desk", behind))
    assert [one.feedback_id for one in found] == [said.feedback_id, fresh.feedback_id]
    assert db.read(lambda conn: reward_models.unheard(conn, "a", "desk", found, behind)) == found[1:]


def test_figures_of_old_versions_go(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_models, "KEPT_FIGURES", 4)
    stream = opened(db)
    say(db, answered(db, 1))
    stream = follow(db, stream)
    for _ in range(6):
        publish(db, db.read(lambda conn: reward_models.stream(conn, "a", "desk")))
    listed = db.read(lambda conn: reward_models.list_versions(conn, "a", deployment="desk"))
    assert sorted((one.number, one.has_weights) for one in listed) == [(3, False), (4, True), (5, True), (6, True)]


def test_a_doubt_goes_with_a_word_and_with_its_record(db: Database) -> None:
    stream = opened(db)
    ids = [answered(db, number) for number in range(1, 4)]
    doubts = [Doubt(one, 0, "a", "desk", "rm_1", 0.5, 0.3, 0.1, 1.0) for one in [*ids, "rec_0gone"]]
    do(db, lambda conn: reward_models.doubt(conn, "a", "desk", ids[-1], doubts))
    shown = lambda: [one.record_id for one in db.read(lambda conn: reward_models.list_doubts(conn, "a", deployment="desk"))]  # noqa: E731
    assert shown() == ids[::-1]
    say(db, ids[0])
    follow(db, stream)
    do(db, lambda conn: records.delete(conn, "a", ids[1]))
    assert shown() == [ids[2]]
    do(db, lambda conn: reward_models.drop(conn, "a", "desk"))
    assert shown() == [] and db.read(lambda conn: reward_models.stream(conn, "a", "desk")) is None
    do(db, lambda conn: reward_models.doubt(conn, "a", "desk", ids[-1], doubts))
    assert shown() == [], "who was scoring when it was given up comes too late"
