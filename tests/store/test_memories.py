"""Memories as rows: versions, turns, chains of corrections, and what forgetting leaves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.store import memories
from everlearn.store.db import Database, open_database
from everlearn.store.memories import TABLES, Memory, Rewrite, Turn


def memory(memory_id: str = "ann", tenant: str = "a", version: int = 0, window: bytes = b"window") -> Memory:
    return Memory(tenant, memory_id, version, "tiny", 512, 9, 2, window)


def write(db: Database, *args, **named) -> Memory:
    return db.write(lambda conn: memories.commit(conn, *args, **named)).result(30)


def test_a_change_names_the_version_it_was_made_from(db: Database):
    first = write(db, memory(), [Turn(0, "user", "hello"), Turn(1, "assistant", "hi")], now=5.0)
    assert first.version == 1 and first.created_at == 5.0
    with pytest.raises(Conflict, match="changed meanwhile"):
        write(db, memory(), [Turn(2, "user", "again")])
    second = write(
        db, msgspec.structs.replace(first, window=b"next"), [Turn(2, "user", "x")], [Rewrite(0, 2, "hello", None, "extract")], now=7.0
    )
    assert second.version == 2 and second.created_at == 5.0 and second.updated_at == 7.0
    assert db.read(lambda conn: memories.get(conn, "a", "ann")) == second
    assert [turn.number for turn in db.read(lambda conn: memories.list_turns(conn, "a", "ann", 10, 0))] == [1, 2]
    assert db.read(lambda conn: memories.list_rewrites(conn, "a", "ann", 0)) == [Rewrite(0, 2, "hello", None, "extract")]


def test_each_tenant_has_its_own(db: Database):
    write(db, memory(), [Turn(0, "user", "mine")])
    write(db, memory(tenant="b"), [Turn(0, "user", "theirs")])
    write(db, memory("bob"))
    assert [row.memory_id for row in db.read(lambda conn: memories.list_memories(conn, "a"))] == ["ann", "bob"]
    assert [row.memory_id for row in db.read(lambda conn: memories.list_memories(conn, "a", after="ann"))] == ["bob"]
    db.write(lambda conn: memories.delete(conn, "b", "ann")).result(30)
    assert db.read(lambda conn: memories.turn(conn, "a", "ann", 0)).text == "mine"
    for ask in (lambda conn: memories.get(conn, "b", "ann"), lambda conn: memories.turn(conn, "a", "ann", 9)):
        with pytest.raises(NotFound):
            db.read(ask)
    with pytest.raises(InvalidRequest, match="1 to 128 letters"):
        memories.check_id("../etc")


def test_a_chain_of_corrections_goes_together(db: Database):
    turns = [Turn(0, "user", "one"), Turn(1, "user", "two", 0), Turn(2, "user", "else"), Turn(3, "user", "three", 1)]
    there = write(db, memory(), turns, [Rewrite(1, 2, "two", "tw", "extract"), Rewrite(2, 3, "else", None, "extract")])
    for number in (0, 1, 3):
        assert db.read(lambda conn, number=number: memories.chain(conn, "a", "ann", {number})) == {0, 1, 3}
    assert db.read(lambda conn: memories.chain(conn, "a", "ann", {2})) == {2}
    assert db.read(lambda conn: memories.has_turns(conn, "a", "ann", {0, 2}) and not memories.has_turns(conn, "a", "ann", {0, 4}))
    write(db, there, forgotten={0, 1, 3})
    assert [turn.number for turn in db.read(lambda conn: memories.list_turns(conn, "a", "ann"))] == [2]
    assert db.read(lambda conn: memories.list_rewrites(conn, "a", "ann", 1)) == []
    db.scrub(TABLES)
    assert db.read(lambda conn: memories.turn(conn, "a", "ann", 2)).text == "else"


def test_an_archive_holds_the_last_turns(db: Database):
    there = write(db, memory(), [Turn(n, "user", str(n)) for n in range(20)], [Rewrite(n, n, "a", "b", "extract") for n in range(20)])
    write(db, there, [Turn(20, "user", "x"), Turn(21, "assistant", "y")], keep_turns=10)
    assert [turn.number for turn in db.read(lambda conn: memories.list_turns(conn, "a", "ann", 100))] == list(range(12, 22))
    assert [len(db.read(lambda conn, n=n: memories.list_rewrites(conn, "a", "ann", n))) for n in (11, 12)] == [0, 1]


def test_what_is_to_be_scrubbed_is_noted_with_its_deletion(db: Database):
    assert not memories.scrub(db)
    there = write(db, memory(), [Turn(0, "user", "one"), Turn(1, "user", "two")])
    write(db, there, forgotten={0})
    assert memories.scrub(db) and not memories.scrub(db)
    db.write(lambda conn: memories.delete(conn, "a", "ann")).result(30)
    assert memories.scrub(db) and not memories.scrub(db)


def test_after_a_scrub_no_byte_is_left(tmp_path: Path):
    db = open_database(f"sqlite:///{tmp_path / 'everlearn.db'}")
    there = memory()
    for number in range(300):  # enough for pages to be split and moved
        text = f"secret-{number} " * 30
        there = write(
            db,
            msgspec.structs.replace(there, window=text.encode()),
            [Turn(number, "user", text)],
            [Rewrite(number, number, text, None, "x")],
        )
    there = write(db, msgspec.structs.replace(there, window=b""), forgotten=set(range(300)))
    assert any(b"secret-" in path.read_bytes() for path in tmp_path.iterdir())
    db.scrub(TABLES)
    assert not any(b"secret-" in path.read_bytes() for path in tmp_path.iterdir())
    assert write(db, there, [Turn(300, "user", "and on")]).version == 302
    db.close()
