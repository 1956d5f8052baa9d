"""Which answers want a person, in which order, and how they leave and come back; and what was learned from what was said."""

from __future__ import annotations

from typing import Any

import pytest

from everlearn.store import datasets, episodes, feedback, lineage, review
from everlearn.store.db import Database
from everlearn.store.feedback import Feedback
from everlearn.store.records import Record
from tests.store.acts import do
from tests.store.test_records import record, write


def say(db: Database, about: Record, **more: Any) -> Feedback:
    values: dict[str, Any] = {"tenant": "a", "kind": "boolean", "value": 0.0, "record_id": about.record_id} | more
    return do(db, lambda conn: feedback.add(conn, Feedback(**values)))


def queue(db: Database, model: str | None = None) -> list[tuple[str, str]]:
    return [(one.record_id, one.why) for one in db.read(lambda conn: review.waiting(conn, "a", model))]


@pytest.fixture
def made(db: Database) -> list[Record]:
    found = [record(number, messages=[{"role": "user", "content": f"question {number}"}]) for number in range(6)]
    write(db, *found)
    return found


def test_the_queue_is_what_the_feedback_says_now(db: Database, made: list[Record]) -> None:
    down, older, split, sign, good, fixed = made
    signs = {"kind": "implicit", "name": "retry", "noise": 0.3, "source": "program"}
    say(db, older, kind="float", value=0.25)
    say(db, down)
    say(db, split, **signs)
    say(db, split, kind="implicit", name="thanks", value=1.0, noise=0.25, source="program")
    say(db, sign, **signs)
    say(db, good, value=1.0)
    say(db, good, kind="comment", value=None, text="nice")
    say(db, fixed)
    say(db, fixed, kind="demonstration", value=None, answer="No.")
    wanted = [(down.record_id, "wrong"), (older.record_id, "wrong"), (split.record_id, "disagreed"), (sign.record_id, "sign")]
    assert queue(db) == wanted, "people first, then what is disagreed about, then signs; the newest word first in each"
    assert queue(db, "support") == queue(db, "support@3") == wanted and queue(db, "support@4") == queue(db, "sup") == []
    assert db.read(lambda conn: review.waiting(conn, "b")) == []

    settled = say(db, down, kind="float", value=0.5, name=review.NAME, source_id="reviewer")
    correction = say(db, sign, kind="demonstration", value=None, answer="No.", source_id="reviewer")
    assert queue(db) == wanted[1:3]
    for one in (settled, correction):
        do(db, lambda conn, one=one: feedback.delete(conn, "a", one.feedback_id))  # type: ignore[misc]
    assert queue(db) == wanted, "what is undone waits again"
    say(db, older, kind="float", value=0.75)
    assert queue(db) == [wanted[0], *wanted[2:]], "a later word of the same source takes the place of the first"


def test_from_what_was_said_to_the_versions_that_learned_it(db: Database, made: list[Record]) -> None:
    first, second = made[:2]
    said = [say(db, one, kind="demonstration", value=None, answer="No.") for one in (first, second)]
    episode_ids = [one.episode_id for one in said]
    drafts = [
        datasets.draft("train", one.episode_id, 1.0, {"n": number}, [("feedback", one.feedback_id), ("episode", one.episode_id)])
        for number, one in enumerate(said)
    ]
    frozen = do(db, lambda conn: datasets.create(conn, "a", "night", "sft", {}, drafts, {}))
    do(db, lambda conn: datasets.learned(conn, "a", "w-1", [frozen.dataset_id]))
    do(db, lambda conn: datasets.learned(conn, "a", "w-2", [], parent="w-1"))
    (use,) = db.read(lambda conn: lineage.uses(conn, "a", [said[1].feedback_id, episode_ids[1]]))
    assert (use.dataset_id, use.number, use.split, use.deleted) == (frozen.dataset_id, 1, "train", False)
    assert sorted(use.made_of) == [("episode", episode_ids[1]), ("feedback", said[1].feedback_id)]
    learners = db.read(lambda conn: lineage.learners(conn, "a", [frozen.dataset_id]))
    assert [(one.version, one.inherited, one.names) for one in learners] == [("w-1", False, []), ("w-2", True, [])]
    assert db.read(lambda conn: lineage.uses(conn, "b", episode_ids)) == []
    assert db.read(lambda conn: lineage.learners(conn, "b", [frozen.dataset_id])) == []
    do(db, lambda conn: feedback.delete(conn, "a", said[1].feedback_id))
    assert [one.deleted for one in db.read(lambda conn: lineage.uses(conn, "a", episode_ids))] == [False, True]

    judged = db.read(lambda conn: episodes.list_episodes(conn, "a", judged=True))
    assert [one.episode_id for one in judged] == [episode_ids[0]]
    assert len(db.read(lambda conn: episodes.list_episodes(conn, "a", judged=False))) == len(made) - 1
