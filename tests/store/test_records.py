from __future__ import annotations

import json
import random
from typing import Any

import pytest
import sqlalchemy as sa

from everlearn.errors import NotFound
from everlearn.store import records, tables, usage
from everlearn.store.db import Database
from everlearn.store.records import Record, RecordedChoice
from tests.store.acts import do

NOW = 1_800_000_000.0


def record(number: int = 0, *, tenant: str = "a", tokens: int = 3, **more: Any) -> Record:
    now = NOW + number
    choice = RecordedChoice(records.int32(range(tokens)), records.float32([-0.25] * tokens), "stop")
    values: dict[str, Any] = {
        "record_id": records.new_id(now),
        "tenant": tenant,
        "key_id": "key-1",
        "route": "chat.completions",
        "model": "support@3",
        "base_model": "tiny",
        "version": "v-1",
        "prompt": records.int32([7, 8, 9, 10]),
        "choices": [choice],
        "messages": [{"role": "user", "content": "héllo 🙂"}],
        "answer": [{"role": "assistant", "content": "yes"}],
        "params": {"temperature": 0.5, "seed": 7},
        "user": "someone",
        "metadata": {"order": "12"},
        "cached_tokens": 2,
        "seconds": 0.5,
        "created_at": now,
    }
    return Record(**values | more)


def write(db: Database, *made: Record) -> int:
    return do(db, lambda conn: records.write(conn, [records.pack(records.draft(item)) for item in made]))


def total(db: Database, tenant: str = "a") -> list[tuple[Any, ...]]:
    day = usage.day_of(NOW)
    found = db.read(lambda conn: usage.lines(conn, tenant, day, day + 1))
    return [(line.key_id, line.subject, line.kind, line.requests, line.tokens_in, line.tokens_cached, line.tokens_out) for line in found]


def test_a_record_comes_back_as_it_was(db: Database) -> None:
    made = record()
    assert write(db, made) == 1
    row, body = db.read(lambda conn: records.get(conn, "a", made.record_id))
    assert (row.prompt_tokens, row.completion_tokens, row.finish_reasons, row.user) == (4, 3, ["stop"], "someone")
    assert body is not None and (body.prompt, body.choices) == (made.prompt, made.choices)
    texts = json.loads(body.texts)
    assert texts == {"messages": made.messages, "answer": made.answer, "params": made.params, "metadata": made.metadata}
    with pytest.raises(NotFound):
        db.read(lambda conn: records.get(conn, "b", made.record_id))


def test_without_content_only_figures_are_kept(db: Database) -> None:
    made = record(content=False)
    write(db, made)
    row, body = db.read(lambda conn: records.get(conn, "a", made.record_id))
    assert body is None and (row.body_bytes, row.user, row.completion_tokens) == (0, None, 3)
    kept = db.read(
        lambda conn: str(conn.execute(sa.select(tables.records)).all()) + str(conn.execute(sa.select(tables.record_bodies)).all())
    )
    assert "someone" not in kept and "llo" not in kept


def test_records_are_counted_once_however_often_they_are_written(db: Database) -> None:
    first, second = record(1), record(2, key_id=None, model="tiny")
    assert write(db, first) == 1
    assert write(db, first, second) == 1
    assert write(db, first, second) == 0
    assert total(db) == [("", "tiny", "chat.completions", 1, 4, 2, 3), ("key-1", "support@3", "chat.completions", 1, 4, 2, 3)]
    assert total(db, "b") == []


def test_the_usage_outlives_the_records(db: Database) -> None:
    write(db, *(record(number) for number in range(5)))
    before = total(db)
    assert before[0][3:] == (5, 20, 10, 15)
    assert do(db, lambda conn: records.sweep(conn, NOW + 100)) == 5
    assert total(db) == before
    assert db.read(lambda conn: conn.execute(sa.select(sa.func.count()).select_from(tables.record_bodies)).scalar()) == 0


def test_a_sweep_takes_the_old_in_pieces_and_leaves_the_young(db: Database) -> None:
    made = [record(number) for number in range(10)]
    write(db, *made)
    assert [do(db, lambda conn: records.sweep(conn, NOW + 7, 4)) for _ in range(3)] == [4, 3, 0]
    assert [row.record_id for row in db.read(lambda conn: records.list_rows(conn, "a"))] == [item.record_id for item in made[:6:-1]]


def test_the_bound_of_bytes_takes_the_oldest(db: Database) -> None:
    write(db, *(record(number) for number in range(10)))
    size = db.read(records.size)
    assert db.read(lambda conn: records.oldest_beyond(conn, size)) is None
    edge = db.read(lambda conn: records.oldest_beyond(conn, size - 1))
    assert edge is not None and do(db, lambda conn: records.sweep(conn, edge)) == 1
    edge = db.read(lambda conn: records.oldest_beyond(conn, size // 2))
    assert edge is not None
    do(db, lambda conn: records.sweep(conn, edge))
    assert 0 < db.read(records.size) <= size // 2


def test_listing_pages_and_filters(db: Database) -> None:
    made = [record(number, model=model) for number, model in enumerate(("support@1", "support@2", "support-two@1", "tiny", "s%pport@1"))]
    write(db, *made, record(9, tenant="b"))
    ids = [item.record_id for item in reversed(made)]
    listed = db.read(lambda conn: records.list_rows(conn, "a"))
    assert [row.record_id for row in listed] == ids
    assert [row.record_id for row in db.read(lambda conn: records.list_rows(conn, "a", 2, ids[1]))] == ids[2:4]

    def models(**filters: str) -> list[str]:
        return [row.model for row in db.read(lambda conn: records.list_rows(conn, "a", **filters))]

    assert models(model="support") == ["support@2", "support@1"]
    assert models(model="support@1") == ["support@1"]
    assert models(model="s%pport") == ["s%pport@1"], "a name is no pattern"
    assert models(key_id="key-2") == [] and models(user="someone") == [item.model for item in reversed(made)]


def test_deleting_a_record_asks_for_the_tenant(db: Database) -> None:
    made = record()
    write(db, made)
    with pytest.raises(NotFound):
        do(db, lambda conn: records.delete(conn, "b", made.record_id))
    do(db, lambda conn: records.delete(conn, "a", made.record_id))
    with pytest.raises(NotFound, match=made.record_id):
        db.read(lambda conn: records.get(conn, "a", made.record_id))


@pytest.mark.parametrize("text", ["\x00", "\ud800", "a\x1b[2J", "x" * 100_000, "🙂\udfff"])
def test_whatever_clients_write_can_be_kept(db: Database, text: str) -> None:
    made = record(user=text, messages=[{"role": "user", "content": text}], metadata={"k": text})
    write(db, made)
    _, body = db.read(lambda conn: records.get(conn, "a", made.record_id))
    assert body is not None and json.loads(body.texts)["messages"][0]["content"] == text


def test_ids_sort_by_time_and_are_ours() -> None:
    ids = [records.new_id(NOW + number) for number in range(100)]
    assert ids == sorted(ids) and len(set(ids)) == 100 and all(len(item) == len(ids[0]) for item in ids)


def test_a_record_is_small(db: Database) -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(49_152) for _ in range(500)]
    choice = RecordedChoice(records.int32(tokens), records.float32([rng.random() for _ in tokens]), "length")
    row, data, _ = records.pack(records.draft(record(prompt=records.int32(tokens), choices=[choice])))
    assert row.body_bytes == len(data) < 6500  # 6,000 bytes of numbers before compression
