from __future__ import annotations

import tempfile
import time
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from everlearn.errors import Conflict, InvalidRequest, NotFound, TooLarge, Unsupported
from everlearn.store import feedback, forgetting, records, tables
from everlearn.store.db import Database, open_database
from everlearn.store.feedback import Feedback
from everlearn.store.feedback_checks import MAX_TEXT
from everlearn.store.records import Record
from tests.store.acts import do
from tests.store.test_records import record, write

Made = tuple[Record, Record]


@pytest.fixture
def made(db: Database) -> Made:
    both = record(1), record(2, messages=[{"role": "user", "content": "another"}], choices=record().choices * 2)
    write(db, *both)
    return both


def add(db: Database, about: Record | None = None, **more: Any) -> Feedback:
    values: dict[str, Any] = {"tenant": "a", "kind": "boolean", "value": 1.0, "record_id": about.record_id if about else None} | more
    return do(db, lambda conn: feedback.add(conn, Feedback(**values)))


def acts(db: Database, one: Feedback) -> list[str]:
    return [change.act for change in db.read(lambda conn: feedback.history(conn, "a", one.feedback_id))]


def test_ids_are_in_the_order_in_which_words_were_kept(db: Database, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    at = time.time()
    ids = []
    for moment in (at, at, at - 3600.0, at + 0.0004, at + 60.0, at + 1.0):  # one millisecond, and clocks that were set
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        ids.append(add(db, made[0], kind="comment", value=None, text="again").feedback_id)
    do(db, lambda conn: feedback.delete(conn, "a", ids[-1]))
    ids.append(add(db, made[0], kind="comment", value=None, text="again").feedback_id)
    assert ids == sorted(set(ids)) and len(ids) == 7


def test_every_kind_is_kept_as_it_was_said(db: Database, made: Made) -> None:
    first, second = made
    episode = "ep_" + first.record_id.removeprefix("rec_")
    said: list[dict[str, Any]] = [
        {"kind": "boolean", "value": 0.0, "reason": "too long"},
        {"kind": "float", "value": 3.5, "name": "stars"},
        {"kind": "comment", "value": None, "text": "Nice 🙂"},
        {"kind": "demonstration", "value": None, "answer": "No."},
        {"kind": "demonstration", "value": None, "answer": "No, yes.", "text": "No", "span_start": 1, "span_end": 3},
        {"kind": "preference", "over_record_id": second.record_id, "over_choice": 1},
        {"kind": "outcome", "name": "tests", "value": 1.0, "text": "12 passed", "source": "program"},
        {"kind": "implicit", "name": "copy", "value": 1.0, "noise": 0.3, "source": "program"},
    ]
    for one in said:
        kept = add(db, first, **one)
        assert all(getattr(kept, name) == value for name, value in one.items())
        assert (kept.episode_id, kept.counts, kept.revision, kept.source_id) == (episode, True, 1, "someone")
    whole = add(db, None, episode_id=episode, kind="boolean", value=1.0)
    assert whole.record_id is None and whole.source_id == "someone"
    listed = db.read(lambda conn: feedback.list_feedback(conn, "a", 100))
    assert len(listed) == 9 and [one.feedback_id for one in listed] == sorted((one.feedback_id for one in listed), reverse=True)
    page = db.read(lambda conn: feedback.list_feedback(conn, "a", 4, listed[3].feedback_id))
    assert page == listed[4:8]
    assert db.read(lambda conn: feedback.list_feedback(conn, "a", kind="float", record_id=first.record_id))[0].value == 3.5
    assert db.read(lambda conn: feedback.list_feedback(conn, "b")) == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"kind": "thumb"}, "kind"),
        ({"value": None}, "value"),
        ({"value": 0.5}, "value"),
        ({"value": float("nan"), "kind": "float"}, "value"),
        ({"value": 1e300, "kind": "float"}, "value"),
        ({"text": "why"}, "text"),
        ({"kind": "comment", "value": None}, "text"),
        ({"kind": "comment", "value": None, "text": "x" * (MAX_TEXT + 1)}, "text"),
        ({"kind": "comment", "value": None, "text": "a\0"}, "text"),
        ({"kind": "comment", "value": None, "text": "\ud800"}, "text"),
        ({"reason": "\0"}, "reason"),
        ({"kind": "preference"}, "over"),
        ({"kind": "outcome"}, "name"),
        ({"kind": "implicit", "name": "x"}, "noise"),
        ({"kind": "implicit", "name": "x", "noise": 0.5}, "noise"),
        ({"source": "god"}, "source"),
        ({"source_id": "x" * 300}, "source_id"),
        ({"name": "a\nb"}, "name"),
        ({"choice": 1}, "choice"),
        ({"choice": -1}, "choice"),
        ({"span_start": 2, "span_end": 2}, "span"),
        ({"span_start": 0, "span_end": 4}, "span"),
        ({"episode_id": "another"}, "episode_id"),
    ],
)
def test_what_can_not_be_said_is_refused_by_name(db: Database, made: Made, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        add(db, made[0], **wrong)
    assert told.value.param == param
    assert db.read(lambda conn: feedback.list_feedback(conn, "a")) == []


def test_only_what_is_there_and_ours_can_be_judged(db: Database, made: Made) -> None:
    for more in (
        {"tenant": "b"},
        {"record_id": "rec_nothing"},
        {"record_id": None, "episode_id": "nowhere"},
        {"kind": "preference", "over_record_id": "rec_nothing"},
    ):
        with pytest.raises(NotFound):
            add(db, made[0], **more)
    with pytest.raises(InvalidRequest):
        add(db, made[0], kind="preference", over_record_id=made[0].record_id)


def test_the_last_word_of_a_source_counts_and_the_others_are_kept(db: Database, made: Made) -> None:
    up, down = add(db, made[0]), add(db, made[0], value=0.0)
    other = add(db, made[0], source_id="somebody else")
    assert [db.read(lambda conn, one=one: feedback.get(conn, "a", one.feedback_id)).counts for one in (up, down, other)] == [
        False,
        True,
        True,
    ]
    assert acts(db, up) == ["created", "superseded"]
    do(db, lambda conn: feedback.delete(conn, "a", down.feedback_id))
    assert acts(db, up) == ["created", "superseded", "restored"] and acts(db, down)[-1] == "deleted"
    assert {one.feedback_id for one in db.read(lambda conn: feedback.labels(conn, "a"))} == {up.feedback_id, other.feedback_id}
    left, right = {"kind": "preference", "over_record_id": made[1].record_id}, {"kind": "preference", "over_record_id": made[0].record_id}
    one, turned = add(db, made[0], **left), add(db, made[1], **right)
    assert acts(db, one)[-1] == "superseded" and turned.counts
    comments = [add(db, made[0], kind="comment", value=None, text=text) for text in "xy"]
    assert all(comment.counts for comment in comments)
    changes = db.read(lambda conn: feedback.changes_after(conn, "a", 0))
    assert [change.id for change in changes] == sorted(change.id for change in changes)
    assert db.read(lambda conn: feedback.changes_after(conn, "a", changes[-2].id)) == changes[-1:]


def test_edits_keep_history_and_are_the_last_word(db: Database, made: Made) -> None:
    first, second = add(db, made[0]), add(db, made[0], value=0.0)
    edited = do(db, lambda conn: feedback.edit(conn, "a", first.feedback_id, value=0.0, reason="I was wrong"))
    assert (edited.value, edited.revision, edited.counts, edited.reason) == (0.0, 2, True, "I was wrong")
    assert not db.read(lambda conn: feedback.get(conn, "a", second.feedback_id)).counts
    changes = db.read(lambda conn: feedback.history(conn, "a", first.feedback_id))
    assert [change.before for change in changes if change.act == "edited"] == [{"value": 1.0, "reason": ""}]
    assert do(db, lambda conn: feedback.edit(conn, "a", first.feedback_id, value=0.0)).revision == 2
    for wrong in ({"value": 0.3}, {"text": "no"}, {"kind": "float"}):
        with pytest.raises(InvalidRequest):
            do(db, lambda conn, wrong=wrong: feedback.edit(conn, "a", first.feedback_id, **wrong))
    with pytest.raises(NotFound):
        do(db, lambda conn: feedback.edit(conn, "b", first.feedback_id, value=1.0))
    do(db, lambda conn: feedback.delete(conn, "a", first.feedback_id))
    assert all(change.before is None for change in db.read(lambda conn: feedback.history(conn, "a", first.feedback_id)))


def test_a_history_outlives_its_feedback_by_a_while_and_no_longer(db: Database, made: Made) -> None:
    kept, gone = add(db, made[0]), add(db, made[1])
    do(db, lambda conn: feedback.delete(conn, "a", gone.feedback_id))
    last = add(db, made[1])
    went = db.read(lambda conn: feedback.history(conn, "a", gone.feedback_id))[-1].created_at
    assert not db.read(lambda conn: forgetting.forgotten_feedback(conn, went)), "who follows the changes has yet to see that it went"
    ids = db.read(lambda conn: forgetting.forgotten_feedback(conn, went + 1.0))
    assert ids == [gone.feedback_id]
    do(db, lambda conn: forgetting.drop_history(conn, ids))
    assert acts(db, gone) == [] and acts(db, kept) == acts(db, last) == ["created"]


def test_a_change_never_gets_the_number_of_one_that_was_dropped(db: Database, made: Made) -> None:
    gone = [add(db, one) for one in made[:2]]
    for one in gone:
        do(db, lambda conn, one=one: feedback.delete(conn, "a", one.feedback_id))
    cursor = db.read(lambda conn: feedback.changes_after(conn, "a"))[-1].id
    for _ in range(2):
        ids = db.read(lambda conn: forgetting.forgotten_feedback(conn, 1e12))
        do(db, lambda conn, ids=ids: forgetting.drop_history(conn, ids))
    assert not db.read(lambda conn: forgetting.forgotten_feedback(conn, 1e12)), "the sweep comes to an end"
    do(db, lambda conn: forgetting.drop_history(conn, [one.feedback_id for one in gone]))
    said = add(db, made[0])
    assert said.feedback_id in [one.feedback_id for one in db.read(lambda conn: feedback.changes_after(conn, "a", cursor))]
    assert len(db.read(lambda conn: forgetting.forgotten_feedback(conn, 1e12))) == 1, "what was the newest goes when it isn't any more"


def test_an_idempotency_key_stands_for_one_body(db: Database, made: Made) -> None:
    first = add(db, made[0], idempotency_key="k", fingerprint="f")
    assert add(db, made[0], idempotency_key="k", fingerprint="f") == first
    with pytest.raises(Conflict) as told:
        add(db, made[0], idempotency_key="k", fingerprint="g")
    assert told.value.code == "idempotency_conflict"
    write(db, record(9, tenant="b"))
    assert len(db.read(lambda conn: feedback.list_feedback(conn, "a"))) == 1


def test_without_content_no_word_is_kept_and_nobody_s_name(db: Database) -> None:
    bare = record(content=False)
    write(db, bare)
    for said in ({"reason": "x"}, {"kind": "comment", "value": None, "text": "x"}, {"kind": "demonstration", "value": None, "answer": "x"}):
        with pytest.raises(Unsupported):
            add(db, bare, **said)
    one, two = add(db, bare, source_id="jane@example.com"), add(db, bare, source_id="jane@example.com", value=0.0)
    assert one.source_id == two.source_id and one.source_id.startswith("sha256:") and two.counts
    assert acts(db, one)[-1] == "superseded"
    edited = do(db, lambda conn: feedback.edit(conn, "a", two.feedback_id, value=1.0))
    assert edited.source_id == two.source_id
    kept = db.read(lambda conn: str(conn.execute(sa.select(tables.feedback)).all()))
    assert "jane" not in kept


def test_one_source_can_not_fill_the_store_with_one_answer(db: Database, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_WORDS", 5)
    for _ in range(5):
        add(db, made[0])
    with pytest.raises(TooLarge, match="5"):
        add(db, made[0])
    add(db, made[0], source_id="another")
    add(db, made[1])


def test_feedback_goes_with_its_record(db: Database, made: Made) -> None:
    mine, other = add(db, made[0]), add(db, made[1], kind="preference", over_record_id=made[0].record_id)
    stays = add(db, made[1])
    do(db, lambda conn: records.delete(conn, "a", made[0].record_id))
    assert [one.feedback_id for one in db.read(lambda conn: feedback.list_feedback(conn, "a"))] == [stays.feedback_id]
    assert acts(db, mine)[-1] == acts(db, other)[-1] == "deleted"
    do(db, lambda conn: records.sweep(conn, time.time() + 1e9))
    assert acts(db, stays)[-1] == "expired"
    assert db.read(lambda conn: conn.execute(sa.select(tables.feedback)).all()) == []


WORDS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.sampled_from(["jo", "al"]), st.sampled_from([0.0, 1.0])),
        st.tuples(st.just("edit"), st.integers(0, 20), st.sampled_from([0.0, 1.0])),
        st.tuples(st.just("delete"), st.integers(0, 20), st.just(0.0)),
    ),
    max_size=15,
)


@settings(max_examples=15)
@given(WORDS)
def test_whatever_is_said_edited_and_deleted_the_last_word_counts(words: list[tuple[str, Any, float]]) -> None:
    """Against a plain model: a list of words in the order of their last change. Who follows the changes knows what counts."""
    with tempfile.TemporaryDirectory() as folder:
        db = open_database(f"sqlite:///{folder}/x.db")
        about = record(1)
        write(db, about)
        model: list[tuple[str, str, float]] = []
        for act, who, value in words:
            if act == "say":
                model.append((add(db, about, source_id=who, value=value).feedback_id, who, value))
            elif model:
                known, source, before = model[who % len(model)]
                if act == "delete":
                    do(db, lambda conn, known=known: feedback.delete(conn, "a", known))
                else:
                    do(db, lambda conn, known=known, value=value: feedback.edit(conn, "a", known, value=value))
                if act == "delete" or before != value:  # an edit that changes nothing is no new word
                    model.remove((known, source, before))
                if act == "edit" and before != value:
                    model.append((known, source, value))
        last = {source: (known, value) for known, source, value in model}
        found = db.read(lambda conn: feedback.labels(conn, "a"))
        assert {one.source_id: (one.feedback_id, one.value) for one in found} == last
        counts: dict[str, bool] = {}
        for change in db.read(lambda conn: feedback.changes_after(conn, "a")):
            counts[change.feedback_id] = change.act in ("created", "restored") or (change.act == "edited" and counts[change.feedback_id])
        assert {known for known, counted in counts.items() if counted} == {known for known, _ in last.values()}
        db.close()


def test_shares_of_sources(db: Database, made: Made) -> None:
    for number in range(3):
        add(db, made[0], source_id=f"user {number}")
    add(db, made[1], source_id="user 0")
    add(db, made[1], source_id="user 0", value=0.0)  # one word: the last
    add(db, made[1], source="model", source_id="judge", kind="float", value=0.2)
    found = db.read(lambda conn: feedback.shares(conn, "a"))
    assert [msgspec.structs.astuple(one) for one in found] == [
        ("human", "user 0", "boolean", 2),
        ("human", "user 1", "boolean", 1),
        ("human", "user 2", "boolean", 1),
        ("model", "judge", "float", 1),
    ]
