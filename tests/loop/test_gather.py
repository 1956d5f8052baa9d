"""Datasets: from feedback in the store to frozen items, and what happens to them when something is deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from everlearn.errors import Conflict, Forbidden, InvalidRequest, NotFound
from everlearn.loop.gather import Filters, gather
from everlearn.store import datasets, episodes, feedback, records, tables
from everlearn.store.datasets import Dataset
from everlearn.store.db import Database
from everlearn.store.feedback import Feedback
from everlearn.store.placing import split_of
from everlearn.store.records import Record
from tests.store.acts import do
from tests.store.conftest import db as db
from tests.store.conftest import emptied_url as emptied_url
from tests.store.conftest import postgres_server as postgres_server
from tests.store.test_records import record, write

TRAIN = [f"e{number}" for number in range(40) if split_of("a", f"e{number}", 0.2) == "train"]
HELDOUT = [f"e{number}" for number in range(200) if split_of("a", f"e{number}", 0.2) == "heldout"]


def ask(db: Database, number: int, episode: str, question: str = "", answer: str = "yes", **more: Any) -> Record:
    messages = [{"role": "user", "content": question or f"question {number}?"}]
    made = record(number, messages=messages, answer=[{"role": "assistant", "content": answer}], episode_id=episode, **more)
    write(db, made)
    return made


def say(db: Database, about: Record, **said: Any) -> Feedback:
    values: dict[str, Any] = {"tenant": "a", "record_id": about.record_id, "kind": "boolean", "value": 1.0} | said
    if values["kind"] in ("demonstration", "preference"):
        values["value"] = 1.0 if values["kind"] == "preference" else None
    return do(db, lambda conn: feedback.add(conn, Feedback(**values)))


def freeze(db: Database, form: str, cap: float = 100.0, **filters: Any) -> Dataset:
    found = db.read(lambda conn: gather(conn, "a", form, Filters(**filters), cap))
    return do(db, lambda conn: datasets.create(conn, "a", "name", form, filters, found.drafts, found.left_out))


def read(db: Database, made: Dataset, split: str = "train", purpose: Any = "train") -> list[dict[str, Any]]:
    return [item.body for item in db.read(lambda conn: datasets.items(conn, "a", made.dataset_id, split, purpose))]


def test_corrections_are_taught(db: Database) -> None:
    one, two = ask(db, 1, TRAIN[0]), ask(db, 2, HELDOUT[0])
    first = say(db, one, kind="demonstration", answer="At seven.")
    say(db, two, kind="demonstration", answer="At eight.")
    say(db, ask(db, 3, TRAIN[1]))
    made = freeze(db, "sft")
    assert (made.train_items, made.heldout_items, made.marks, made.form) == (1, 1, 0, "sft")
    (item,) = read(db, made)
    assert item["messages"] == [{"role": "user", "content": "question 1?"}, {"role": "assistant", "content": "At seven."}]
    assert (item["record_id"], item["feedback_ids"], item["weight"]) == (one.record_id, [first.feedback_id], 1.0)
    assert item["prompt_token_ids"] == [7, 8, 9, 10] and item["model"] == "support@3"
    with pytest.raises(Forbidden, match="held-out"):
        read(db, made, "heldout")
    assert read(db, made, "heldout", "evaluate")[0]["messages"][-1]["content"] == "At eight."
    with pytest.raises(NotFound):
        db.read(lambda conn: datasets.items(conn, "b", made.dataset_id))
    with_good = freeze(db, "sft", good=True)
    assert with_good.train_items == 2 and read(db, with_good)[1]["completion_token_ids"] == [0, 1, 2]


def test_the_same_words_make_the_same_hash(db: Database) -> None:
    for number in range(3):
        say(db, ask(db, number, TRAIN[number]), kind="demonstration", answer=f"answer {number}")
    first, second = freeze(db, "sft"), freeze(db, "sft")
    assert first == second, "who asks again, not having heard the answer, gets the same"
    other = freeze(db, "sft", sources=["human"])
    assert other.content_hash == first.content_hash and other.dataset_id != first.dataset_id
    say(db, ask(db, 9, TRAIN[9]), kind="demonstration", answer="more")
    assert freeze(db, "sft").content_hash != first.content_hash
    assert read(db, first) == read(db, second) and len(read(db, first)) == 3


def test_preferences_and_corrections_are_pairs(db: Database) -> None:
    better, worse = ask(db, 1, TRAIN[0], "same?", "good"), ask(db, 2, TRAIN[1], "same?", "bad")
    other, held = ask(db, 3, TRAIN[2], "other?"), ask(db, 4, HELDOUT[0], "same?")
    say(db, better, kind="preference", over_record_id=worse.record_id)
    say(db, better, kind="preference", over_record_id=other.record_id)
    say(db, better, kind="preference", over_record_id=held.record_id)
    say(db, other, kind="demonstration", answer="corrected")
    say(db, worse, kind="demonstration", answer=" bad ")
    made = freeze(db, "preference")
    assert made.left_out == {
        "preferences between answers to different prompts": 1,
        "preferences across the splits": 1,
        "corrections that change nothing": 1,
    }
    pair, correction = read(db, made)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"], pair["chosen_token_ids"]) == ("good", "bad", [0, 1, 2])
    assert (correction["chosen"][0]["content"], correction["rejected"][0]["content"]) == ("corrected", "yes")
    assert correction["chosen_token_ids"] is None and correction["rejected_logprobs"] == [-0.25] * 3
    sources = db.read(lambda conn: datasets.traces(conn, "a", made.dataset_id))[0].sources
    assert {("record", better.record_id), ("record", worse.record_id), ("episode", TRAIN[1])} < set(sources)


def test_labels_are_weighed_and_contradictions_cancel(db: Database) -> None:
    liked, split, crowd, rated, weak = (ask(db, number, TRAIN[number]) for number in range(5))
    say(db, liked, source_id="jo")
    say(db, liked, source_id="al")
    say(db, split, source_id="mo")
    say(db, split, source_id="ed", value=0.0)
    for one in (crowd, *(ask(db, number, TRAIN[number]) for number in range(10, 17))):
        say(db, one, source_id="crowd", value=0.0)
    say(db, rated, kind="float", name="stars", value=2.0, source_id="stars")
    say(db, weak, kind="implicit", name="retry", value=0.0, noise=0.35, source="program")
    made = freeze(db, "kto", cap=4.0, threshold=3.0)
    assert made.left_out == {} or "with labels" not in str(made.left_out)
    by_record = {item["record_id"]: item for item in read(db, made)}
    assert by_record[crowd.record_id]["weight"] == 0.5 and not by_record[crowd.record_id]["label"]
    assert not by_record[rated.record_id]["label"]
    assert not by_record[liked.record_id]["label"], "a thumb is 1, which is below a threshold of 3"
    made = freeze(db, "kto", cap=4.0)
    by_record = {item["record_id"]: item for item in read(db, made)}
    assert (by_record[liked.record_id]["label"], by_record[liked.record_id]["weight"]) == (True, 2.0)
    assert split.record_id not in by_record and made.left_out == {"with labels that contradict each other": 1}
    assert weak.record_id not in by_record
    with_weak = {item["record_id"]: item for item in read(db, freeze(db, "kto", implicit=True))}
    assert with_weak[weak.record_id]["weight"] == pytest.approx(0.3) and not with_weak[weak.record_id]["label"]


def test_filters_choose(db: Database) -> None:
    one = ask(db, 1, TRAIN[0], model="a@1", user="jo")
    two = ask(db, 2, TRAIN[1], model="b@1", user="al")
    for about, source in ((one, "human"), (two, "model")):
        say(db, about, source=source, name="x" if about is one else "")
    for filters in ({"model": "a"}, {"model": "a@1"}, {"user": "jo"}, {"sources": ["human"]}, {"names": ["x"]}):
        assert [item["record_id"] for item in read(db, freeze(db, "kto", **filters))] == [one.record_id], filters
    for nothing in ({"model": "c"}, {"since": 4e9}, {"until": 1.0}, {"key_id": "key-9"}):
        with pytest.raises(InvalidRequest, match="nothing"):
            freeze(db, "kto", **nothing)
    bare = ask(db, 3, TRAIN[2], content=False)
    completion = ask(db, 4, TRAIN[3])
    say(db, bare)
    do(db, lambda conn: conn.execute(tables.feedback.delete().where(tables.feedback.c.record_id == completion.record_id)))
    plain = record(5, messages="text", answer=[{"role": "assistant", "content": "x"}], episode_id=TRAIN[4])
    write(db, plain)
    say(db, plain)
    do(db, lambda conn: feedback.add(conn, Feedback(tenant="a", episode_id=TRAIN[0], kind="boolean", value=1.0)))
    assert freeze(db, "kto").left_out == {
        "about whole episodes": 1,
        "of records without content": 1,
        "of completions, which are no conversations": 1,
    }


@pytest.mark.parametrize("what", ["feedback", "record", "episode"])
def test_a_deletion_marks_all_that_learned_from_it(db: Database, what: str) -> None:
    gone, stays = ask(db, 1, TRAIN[0], "secret?"), ask(db, 2, TRAIN[1])
    said = say(db, gone, kind="demonstration", answer="the secret")
    say(db, stays, kind="demonstration", answer="fine")
    made = freeze(db, "sft")
    do(db, lambda conn: datasets.learned(conn, "a", "v-1", [made.dataset_id]))
    do(db, lambda conn: datasets.learned(conn, "a", "v-2", [], parent="v-1"))
    other = freeze_other(db)
    do(db, lambda conn: datasets.learned(conn, "a", "v-3", [other.dataset_id], parent=None))
    assert db.read(lambda conn: datasets.marked_versions(conn, "a")) == []
    delete = {
        "feedback": lambda conn: feedback.delete(conn, "a", said.feedback_id),
        "record": lambda conn: records.delete(conn, "a", gone.record_id),
        "episode": lambda conn: episodes.delete(conn, "a", TRAIN[0]),
    }
    do(db, delete[what])
    found = db.read(lambda conn: datasets.get(conn, "a", made.dataset_id))
    assert found.marks >= 1 and what in {mark.kind for mark in db.read(lambda conn: datasets.marks(conn, "a", made.dataset_id))}
    assert db.read(lambda conn: datasets.marked_versions(conn, "a")) == ["v-1", "v-2"]
    assert [(one.version, one.inherited) for one in db.read(lambda conn: datasets.versions_of(conn, "a", made.dataset_id))] == [
        ("v-1", False),
        ("v-2", True),
    ]
    with pytest.raises(Conflict, match="rebuild"):
        read(db, made)
    again = do(db, lambda conn: datasets.rebuild(conn, "a", made.dataset_id))
    assert (again.train_items, again.marks, again.rebuilt_from) == (1, 0, made.dataset_id)
    assert [item["record_id"] for item in read(db, again)] == [stays.record_id]
    assert do(db, lambda conn: datasets.rebuild(conn, "a", made.dataset_id)) == again
    assert freeze(db, "sft").dataset_id not in (made.dataset_id, again.dataset_id)
    kept = db.read(
        lambda conn: (
            conn.execute(sa.select(tables.dataset_items.c.body).where(tables.dataset_items.c.dataset_id == made.dataset_id)).scalars().all()
        )
    )
    assert sorted(map(bool, kept)) == [False, True], "what is deleted is deleted in the dataset too"


def freeze_other(db: Database, name: str = "other") -> Dataset:
    return do(db, lambda conn: datasets.create(conn, "a", name, "sft", {}, [datasets.draft("train", "e", 1.0, {"x": 1}, [])], {}))


def test_what_only_grew_old_stays_in_datasets(db: Database) -> None:
    say(db, ask(db, 1, TRAIN[0]), kind="demonstration", answer="kept")
    made = freeze(db, "sft")
    do(db, lambda conn: records.sweep(conn, 4e9))
    assert db.read(lambda conn: datasets.get(conn, "a", made.dataset_id)).marks == 0
    assert read(db, made)[0]["messages"][-1]["content"] == "kept"


def test_what_is_deleted_between_reading_and_writing_is_left_out(db: Database) -> None:
    one, two = ask(db, 1, TRAIN[0]), ask(db, 2, TRAIN[1])
    for about in (one, two):
        say(db, about)
    found = db.read(lambda conn: gather(conn, "a", "kto", Filters()))
    do(db, lambda conn: records.delete(conn, "a", one.record_id))
    made = do(db, lambda conn: datasets.create(conn, "a", "n", "kto", {}, found.drafts, found.left_out))
    assert made.left_out == {"deleted meanwhile": 1} and made.train_items == 1


def test_a_dataset_goes_but_its_lineage_stays(db: Database) -> None:
    say(db, ask(db, 1, TRAIN[0]))
    free, used = freeze(db, "kto"), freeze(db, "kto", sources=["human"])
    do(db, lambda conn: datasets.learned(conn, "a", "v-1", [used.dataset_id]))
    for made in (free, used):
        do(db, lambda conn, made=made: datasets.delete(conn, "a", made.dataset_id))
    with pytest.raises(NotFound):
        db.read(lambda conn: datasets.get(conn, "a", free.dataset_id))
    assert db.read(lambda conn: datasets.get(conn, "a", used.dataset_id)).marks == 1
    assert read(db, used, "train", "evaluate") == [] and db.read(lambda conn: datasets.marked_versions(conn, "a")) == ["v-1"]


def test_pages(db: Database) -> None:
    drafts = [
        datasets.draft("heldout" if number % 3 == 0 else "train", "e", 1.0, {"n": number}, [("record", f"r{number}")])
        for number in range(10)
    ]
    made = do(db, lambda conn: datasets.create(conn, "a", "n", "sft", {}, drafts, {}, rebuilt_from="ds_x"))
    found, after = [], -1
    while page := db.read(lambda conn, after=after: datasets.items(conn, "a", made.dataset_id, after=after, limit=2)):
        found += [item.body["n"] for item in page]
        after = page[-1].number
    assert found == [number for number in range(10) if number % 3]
    assert [one.number for one in db.read(lambda conn: datasets.traces(conn, "a", made.dataset_id, 7))] == [8, 9]
    for name in ("one", "two", "three"):
        freeze_other(db, name)
    listed = db.read(lambda conn: datasets.list_datasets(conn, "a"))
    assert len(listed) == 4 and listed[-1].dataset_id == made.dataset_id
    assert db.read(lambda conn: datasets.list_datasets(conn, "a", 2, listed[0].dataset_id)) == listed[1:3]
    assert msgspec.json.encode(listed[0])


@pytest.mark.parametrize("way", ["record", "episode", "feedback"])
def test_what_has_expired_can_still_be_deleted_from_datasets(db: Database, way: str) -> None:
    one = ask(db, 1, TRAIN[0])
    word = say(db, one, kind="demonstration", answer="At seven.")
    made = freeze(db, "sft")
    do(db, lambda conn: records.sweep(conn, one.created_at + 1.0))
    assert len(read(db, made)) == 1, "datasets keep what they froze"
    forget: dict[str, Callable[[Any, str], None]] = {
        "record": lambda conn, tenant: records.delete(conn, tenant, one.record_id),
        "episode": lambda conn, tenant: episodes.delete(conn, tenant, TRAIN[0]),
        "feedback": lambda conn, tenant: feedback.delete(conn, tenant, word.feedback_id),
    }
    with pytest.raises(NotFound):
        do(db, lambda conn: forget[way](conn, "b"))
    do(db, lambda conn: forget[way](conn, "a"))
    assert read(db, made, purpose="evaluate") == []
    assert db.read(lambda conn: datasets.get(conn, "a", made.dataset_id)).marks > 0


@pytest.mark.parametrize(
    ("name", "form", "param"), [("", "sft", "name"), ("x" * 300, "sft", "name"), ("a\0", "sft", "name"), ("n", "dpo", "form")]
)
def test_what_can_not_be_a_dataset(db: Database, name: str, form: str, param: str) -> None:
    draft = datasets.draft("train", "e", 1.0, {}, [])
    with pytest.raises(InvalidRequest) as told:
        do(db, lambda conn: datasets.create(conn, "a", name, form, {}, [draft], {}))
    assert told.value.param == param


def test_prompts_are_where_users_were_when_they_said_something(db: Database) -> None:
    one, same = ask(db, 1, TRAIN[0], question="When?"), ask(db, 2, TRAIN[1], question="When?")
    say(db, one)
    say(db, same, kind="demonstration", answer="At seven.")
    say(db, ask(db, 3, HELDOUT[0], question="Where?"))
    made = freeze(db, "prompts")
    assert (made.train_items, made.heldout_items) == (1, 1), "each prompt once"
    (item,) = read(db, made)
    assert item["corrected"] == "At seven." and item["prompt"][0]["content"] == "When?" and item["prompt_token_ids"]
    (other,) = read(db, made, "heldout", "evaluate")
    assert other["corrected"] is None
