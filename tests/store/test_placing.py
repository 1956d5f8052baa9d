from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from everlearn.errors import InvalidRequest, NotFound
from everlearn.store import episodes, records, tables
from everlearn.store.db import Database, make_engine, migrate, open_database
from everlearn.store.feedback_checks import keeps_content
from everlearn.store.placing import check_id, of_memory, plain, split_of, trail_of
from everlearn.store.records import Record
from tests.store.acts import do
from tests.store.test_records import record, write


def said(*texts: str) -> list[dict[str, Any]]:
    """A conversation: the user and the model in turn."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def turn(number: int, *texts: str, answer: str = "yes", **more: Any) -> Record:
    return record(number, messages=said(*texts), answer=[{"role": "assistant", "content": answer}], **more)


def row(db: Database, made: Record) -> records.Row:
    return db.read(lambda conn: records.get(conn, made.tenant, made.record_id))[0]


def test_a_conversation_is_one_episode(db: Database) -> None:
    first, second = turn(1, "Where is it?", answer="There."), turn(2, "Where is it?", "There.", "Thanks", answer="Sure.")
    write(db, first)
    write(db, second)
    third = turn(3, "Where is it?", "There.", "Thanks", "Sure.", "Bye")
    write(db, third)
    assert row(db, first).episode_id == "ep_" + first.record_id.removeprefix("rec_")
    assert row(db, first).episode_id == row(db, second).episode_id == row(db, third).episode_id
    assert (row(db, second).parent_id, row(db, second).seen_messages) == (first.record_id, 2)
    assert (row(db, third).parent_id, row(db, third).seen_messages) == (second.record_id, 4)
    (found,) = db.read(lambda conn: episodes.list_episodes(conn, "a"))
    assert (found.records, found.client_given, found.model, found.user) == (3, False, "support@3", "someone")
    assert found.created_at == first.created_at and found.updated_at == third.created_at


def test_turns_of_one_transaction_find_each_other_and_come_twice_without_effect(db: Database) -> None:
    made = [turn(1, "a?", answer="b"), turn(2, "a?", "b", "c?", answer="d"), turn(3, "a?", "b", "c?", "d", "e?")]
    assert write(db, *made) == 3
    assert write(db, *made) == 0
    assert len({row(db, one).episode_id for one in made}) == 1
    assert db.read(lambda conn: episodes.list_episodes(conn, "a"))[0].records == 3


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "b"},
        {"key_id": "key-2"},
        {"user": "somebody else"},
        {"content": False},
        {"messages": said("a?", "B", "c?")},
        {"messages": "a?"},
        {"messages": None},
    ],
)
def test_what_only_looks_alike_is_another_episode(db: Database, other: dict[str, Any]) -> None:
    write(db, turn(1, "a?", answer="b"))
    made = record(2, **{"messages": said("a?", "b", "c?"), **other})
    write(db, made)
    assert row(db, made).parent_id is None and row(db, made).episode_id == "ep_" + made.record_id.removeprefix("rec_")


def test_the_latest_of_equal_conversations_goes_on(db: Database) -> None:
    first, second = turn(1, "hi", answer="Hello!", user=None), turn(2, "hi", answer="Hello!", user=None)
    write(db, first, second)
    assert row(db, first).episode_id != row(db, second).episode_id
    third = turn(3, "hi", "Hello!", "What now?", user=None)
    write(db, third)
    assert row(db, third).parent_id == second.record_id


def test_any_choice_can_be_gone_on_with(db: Database) -> None:
    answers = [{"role": "assistant", "content": text} for text in ("one", "two")]
    choices = record().choices * 2
    first = record(1, messages=said("a?"), answer=answers, choices=choices)
    second = turn(2, "a?", "two", "and?")
    write(db, first, second)
    assert row(db, second).parent_id == first.record_id


def test_a_retry_belongs_to_what_it_tries_again(db: Database) -> None:
    first, again = turn(1, "a?"), turn(60, "a?")
    late, nobody, stranger = turn(2000, "a?"), turn(70, "b?", user=None), turn(80, "b?", user=None)
    write(db, first, again, late, nobody, stranger)
    assert row(db, first).episode_id == row(db, again).episode_id != row(db, late).episode_id
    assert row(db, nobody).episode_id != row(db, stranger).episode_id


def test_the_client_s_word_stands(db: Database) -> None:
    first = turn(1, "a?", answer="b", episode_id="ticket-7")
    other = turn(2, "a?", "b", "c?", answer="d", episode_id="ticket-8")
    third = turn(3, "a?", "b", "c?", "d", "e?", episode_id="ticket-7")
    write(db, first, other, third)
    assert [row(db, one).episode_id for one in (first, other, third)] == ["ticket-7", "ticket-8", "ticket-7"]
    assert row(db, other).parent_id is None and (row(db, third).parent_id, row(db, third).seen_messages) == (first.record_id, 2)
    found = db.read(lambda conn: episodes.get(conn, "a", "ticket-7"))
    assert found.client_given and found.records == 2
    with pytest.raises(NotFound):
        db.read(lambda conn: episodes.get(conn, "b", "ticket-7"))
    bare = turn(4, "x?", content=False, episode_id="ticket-7")
    write(db, bare)
    assert row(db, bare).episode_id == "ticket-7"
    assert db.read(lambda conn: conn.execute(sa.select(tables.trails).where(tables.trails.c.record_id == bare.record_id)).all()) == []


def test_an_episode_goes_with_its_last_record(db: Database) -> None:
    made = [turn(number, "a?", episode_id="e") for number in (1, 100)]
    write(db, *made)
    do(db, lambda conn: episodes.add_event(conn, episodes.Event(tenant="a", episode_id="e", kind="outcome", name="solved", value=1.0)))
    assert do(db, lambda conn: records.sweep(conn, made[1].created_at)) == 1
    assert db.read(lambda conn: episodes.get(conn, "a", "e")).records == 1
    do(db, lambda conn: records.delete(conn, "a", made[1].record_id))
    with pytest.raises(NotFound):
        db.read(lambda conn: episodes.get(conn, "a", "e"))
    for table in (tables.trails, tables.episode_events):
        assert db.read(lambda conn, table=table: conn.execute(sa.select(table)).all()) == []


def unseen(number: int, shown: Record, **more: Any) -> Record:
    return turn(number, "Where is it?", answer="Here.", route=records.UNSEEN, metadata={"shadow_of": shown.record_id}, **more)


@pytest.mark.parametrize("content", [True, False])
def test_what_nobody_saw_is_in_the_episode_of_what_was_shown_and_no_part_of_it(db: Database, content: bool) -> None:
    shown = turn(1, "Where is it?", answer="There.")
    beside = unseen(2, shown, model="support@4", content=content)
    assert write(db, shown, beside) == 2
    late = unseen(3, shown)
    assert write(db, late) == 1
    assert row(db, beside).episode_id == row(db, late).episode_id == row(db, shown).episode_id
    assert row(db, beside).parent_id == shown.record_id
    (found,) = db.read(lambda conn: episodes.list_episodes(conn, "a"))
    assert (found.records, found.model) == (1, "support@3")
    assert [one.record_id for one in db.read(lambda conn: episodes.records_of(conn, "a", found.episode_id))] == [shown.record_id]


@pytest.mark.parametrize("way", ["record", "episode", "expired"])
def test_what_nobody_saw_goes_with_what_was_shown(db: Database, way: str) -> None:
    shown, other = turn(1, "Where is it?", answer="There."), turn(50, "Who?")
    beside = unseen(2, shown)
    write(db, shown, beside, other)
    if way == "record":
        do(db, lambda conn: records.delete(conn, "a", shown.record_id))
    elif way == "episode":
        do(db, lambda conn: episodes.delete(conn, "a", row(db, shown).episode_id or ""))
    else:
        do(db, lambda conn: records.sweep(conn, beside.created_at))
    assert write(db, unseen(3, shown)) == 0, "what is answered beside a record that is forgotten isn't kept"
    assert [one.record_id for one in db.read(lambda conn: records.list_rows(conn, "a"))] == [other.record_id]
    assert db.read(lambda conn: conn.execute(sa.select(tables.record_bodies.c.record_id)).scalars().all()) == [other.record_id]
    assert len(db.read(lambda conn: episodes.list_episodes(conn, "a"))) == 1


def test_vectors_are_in_no_episode(db: Database) -> None:
    shown = turn(1, "Where is it?", episode_id="e")
    vector = record(2, route=records.EMBEDDINGS, content=False, episode_id="e", model="support@9")
    assert write(db, shown, vector) == 2
    assert row(db, vector).episode_id is None
    (found,) = db.read(lambda conn: episodes.list_episodes(conn, "a"))
    assert (found.records, found.model) == (1, "support@3")
    assert db.read(lambda conn: keeps_content(conn, "a", "e"))
    do(db, lambda conn: records.delete(conn, "a", vector.record_id))
    assert db.read(lambda conn: episodes.get(conn, "a", "e")).records == 1


def test_an_episode_takes_text_if_any_of_its_records_has_content(db: Database) -> None:
    write(db, turn(1, "a?", episode_id="e"), turn(2, "b?", episode_id="e", content=False), turn(3, "c?", episode_id="f", content=False))
    assert db.read(lambda conn: keeps_content(conn, "a", "e")) and not db.read(lambda conn: keeps_content(conn, "a", "f"))


def test_chats_in_a_memory_are_one_episode_without_retries(db: Database) -> None:
    made = [turn(number, "ok", episode_id=of_memory("ann")) for number in (1, 2)]
    packed = [records.pack(records.draft(one)) for one in made]
    places = [place for _, place in do(db, lambda conn: records.write_new(conn, packed))]
    assert {(place.episode_id, place.retry_of) for place in places} == {(check_id(of_memory("ann")), None)}
    assert db.read(lambda conn: conn.execute(sa.select(tables.trails)).all()) == []
    assert of_memory("ann") != of_memory("bob")


def test_pages_by_time(db: Database) -> None:
    made = [turn(number, f"{number}?", episode_id=f"e{9 - number}", model="m@1" if number % 2 else "n") for number in range(8)]
    write(db, *made)
    found, after = [], None
    while page := db.read(lambda conn, after=after: episodes.list_episodes(conn, "a", 3, after)):
        found += [one.episode_id for one in page]
        after = found[-1]
    assert found == [f"e{9 - number}" for number in reversed(range(8))]
    assert len(db.read(lambda conn: episodes.list_episodes(conn, "a", model="m"))) == 4
    parts = [db.read(lambda conn, split=split: episodes.list_episodes(conn, "a", split=split)) for split in ("train", "heldout")]
    assert sum(map(len, parts)) == 8
    times = {"since": made[2].created_at, "until": made[4].created_at}
    assert [one.episode_id for one in db.read(lambda conn: episodes.list_episodes(conn, "a", **times))] == ["e6", "e7"]


def test_messages_are_compared_by_what_they_say() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": 2}'}}
    same = {"id": "2", "function": {"name": "f", "arguments": {"b": 2, "a": 1}}}
    assert plain({"role": "assistant", "content": None, "tool_calls": [call]}) == plain({"role": "assistant", "tool_calls": [same]})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain({"role": "user", "content": parts}) == plain({"role": "user", "content": " ab\n"})
    salt = ("t", None, None)
    short, long = (
        trail_of(salt, said("x"), [said("", "y")[1]]),
        trail_of(salt, [{"role": "system", "content": "now"}, *said("x", "y", "z")], []),
    )
    assert long.starts == [(short.ends[0], 3)]
    assert trail_of(salt, "text", None).prompt == "" and trail_of(salt, [], None).prompt == ""


def test_about_a_fifth_is_held_out_and_stays_so() -> None:
    splits = [split_of("a", f"e{number}", 0.2) for number in range(4000)]
    assert 0.17 < splits.count("heldout") / 4000 < 0.23
    assert splits == [split_of("a", f"e{number}", 0.2) for number in range(4000)]
    assert splits != [split_of("b", f"e{number}", 0.2) for number in range(4000)]
    assert {split_of("a", f"e{number}", 0.0) for number in range(100)} == {"train"}


@pytest.mark.parametrize("text", ["", "-x", "a/b", "a b", "x" * 129, "ü", "a\0"])
def test_what_can_not_be_an_episode_s_id(text: str) -> None:
    with pytest.raises(InvalidRequest, match="episode"):
        check_id(text)


def test_records_from_before_there_were_episodes_are_one_each(store_url: str) -> None:
    db = open_database(store_url)
    made = [record(number) for number in range(3)]
    write(db, *made)
    db.close()
    engine = make_engine(store_url)
    migrate(engine, down_to="0003")
    engine.dispose()
    db = open_database(store_url)
    found = db.read(lambda conn: episodes.list_episodes(conn, "a"))
    assert [(one.episode_id, one.records, one.created_at) for one in found] == [
        ("ep_" + one.record_id.removeprefix("rec_"), 1, one.created_at) for one in reversed(made)
    ]
    assert all(one.split == split_of("a", one.episode_id, 0.2) for one in found)
    db.close()
