from __future__ import annotations

import time
from pathlib import Path

import pytest

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.store import checkpoints, garbage, names
from everlearn.store.checkpoints import TinkerPath
from everlearn.store.db import Database
from everlearn.store.folders import write_folder
from everlearn.store.names import NamedVersion
from tests.store.acts import SAVED, append, do, finish, new_run, save_entry


def save(db: Database, run: str, seq: int, name: str, folder: str = "", kind: str = "weights", **more: object) -> TinkerPath:
    finish(db, append(db, save_entry(run, seq, name, folder=folder or f"/home/{name}@{seq}", checkpoint_kind=kind, **more)), SAVED)
    return TinkerPath(run, kind, name)


def give(db: Database, name: str, path: TinkerPath, tenant: str = "a", note: str = "") -> NamedVersion:
    return do(db, lambda conn: names.give(conn, tenant, name, path, note))


def move(db: Database, name: str, number: int, expected: int | None = None) -> NamedVersion:
    return do(db, lambda conn: names.move(conn, "a", name, number, "why", expected))


def current(db: Database, name: str) -> str:
    return str(db.read(lambda conn: names.get(conn, "a", name)))


def test_a_name_means_its_first_version_until_it_is_moved(db: Database) -> None:
    run = new_run(db)
    one, two = save(db, run, 1, "one"), save(db, run, 2, "two")
    first = give(db, "support", one, note="the first")
    assert (str(first), first.current, first.path, first.note, first.base_model) == ("support@1", True, str(one), "the first", "tiny")
    assert first.folder == "/home/one@1" and first.version == db.read(lambda conn: checkpoints.get(conn, "a", one)).version
    second = give(db, "support", two)
    assert (str(second), second.current, current(db, "support")) == ("support@2", False, "support@1")
    assert move(db, "support", 2).current and current(db, "support") == "support@2"
    assert move(db, "support", 1).current and current(db, "support") == "support@1", "back is a move as well"
    assert str(db.read(lambda conn: names.get(conn, "a", "support", 2))) == "support@2", "every version stays"
    assert [item.number for item in db.read(lambda conn: names.history(conn, "a", "support"))] == [1, 2, 1]
    assert [item.number for item in db.read(lambda conn: names.versions(conn, "a", "support"))] == [2, 1]


def test_acts_done_twice_have_one_effect(db: Database) -> None:
    run = new_run(db)
    one, two = save(db, run, 1, "one"), save(db, run, 2, "two")
    assert give(db, "support", one) == give(db, "support", one)
    give(db, "support", two)
    assert move(db, "support", 2) == move(db, "support", 2)
    assert len(db.read(lambda conn: names.history(conn, "a", "support"))) == 2


def test_a_move_that_expects_another_version_is_refused(db: Database) -> None:
    run = new_run(db)
    for seq in (1, 2, 3):
        give(db, "support", save(db, run, seq, f"ck{seq}"))
    move(db, "support", 2, expected=1)
    with pytest.raises(Conflict, match="means support@2, not support@1"):
        move(db, "support", 3, expected=1)
    with pytest.raises(NotFound, match="support@9"):
        move(db, "support", 9)


def test_a_named_checkpoint_is_kept_until_the_name_lets_go(db: Database, tmp_path: Path) -> None:
    run = new_run(db)
    folder = tmp_path / "checkpoints" / "r" / "weights" / "one@1"
    write_folder(folder, {"adapter.safetensors": b"weights"}, {})
    path = save(db, run, 1, "one", str(folder), ttl_seconds=5.0)
    give(db, "support", path)
    garbage.collect(db, time.time() + 10)
    assert db.read(lambda conn: checkpoints.get(conn, "a", path)).expires_at is None
    with pytest.raises(Conflict, match=r"is support@1 and can't be deleted; first `everlearn adapter delete support@1`"):
        do(db, lambda conn: checkpoints.delete(conn, "a", path))
    with pytest.raises(Conflict, match="given a time to live"):
        do(db, lambda conn: checkpoints.set_ttl(conn, "a", path, 60))
    with pytest.raises(Conflict, match="overwritten"):
        append(db, save_entry(run, 2, "one", overwrite=True))
    assert do(db, lambda conn: checkpoints.set_ttl(conn, "a", path, None)).expires_at is None
    do(db, lambda conn: names.delete(conn, "a", "support"))
    do(db, lambda conn: checkpoints.delete(conn, "a", path))
    garbage.collect(db, time.time())
    assert not folder.exists()


def test_the_folder_of_a_version_stays_even_if_its_path_was_taken_over(db: Database, tmp_path: Path) -> None:
    """The name may be given between the acceptance of an overwriting save and its end."""
    run = new_run(db)
    folders = [tmp_path / "checkpoints" / "r" / "weights" / f"one@{seq}" for seq in (1, 2)]
    for folder in folders:
        write_folder(folder, {"adapter.safetensors": b"weights"}, {})
    path = save(db, run, 1, "one", str(folders[0]))
    later = append(db, save_entry(run, 2, "one", folder=str(folders[1]), overwrite=True))
    version = give(db, "support", path)
    finish(db, later, SAVED)
    garbage.collect(db, time.time())
    assert folders[0].exists() and folders[1].exists()
    assert db.read(lambda conn: names.get(conn, "a", "support")) == version


def test_numbers_are_never_used_twice(db: Database) -> None:
    run = new_run(db)
    paths = [save(db, run, seq, f"ck{seq}") for seq in (1, 2, 3, 4)]
    give(db, "support", paths[0])
    give(db, "support", paths[1])
    do(db, lambda conn: names.delete(conn, "a", "support", 2))
    assert str(give(db, "support", paths[2])) == "support@3"
    with pytest.raises(Conflict, match="move it to another version first"):
        do(db, lambda conn: names.delete(conn, "a", "support", 1))
    do(db, lambda conn: names.delete(conn, "a", "support"))
    with pytest.raises(NotFound):
        current(db, "support")
    again = give(db, "support", paths[3])
    assert (str(again), again.current) == ("support@4", True)


def test_names_belong_to_their_tenant(db: Database) -> None:
    mine, theirs = new_run(db), new_run(db, tenant="b")
    finish(db, append(db, save_entry(theirs, 1, "x", tenant="b")), SAVED)
    give(db, "support", save(db, mine, 1, "one"))
    with pytest.raises(NotFound):
        give(db, "support", TinkerPath(theirs, "weights", "x"))
    do(db, lambda conn: checkpoints.set_public(conn, "b", TinkerPath(theirs, "weights", "x"), True))
    with pytest.raises(NotFound):  # a name of ours would keep them from deleting it
        give(db, "support", TinkerPath(theirs, "weights", "x"))
    assert str(give(db, "support", TinkerPath(theirs, "weights", "x"), tenant="b")) == "support@1"
    assert len(db.read(lambda conn: names.list_names(conn, "a"))) == 1
    with pytest.raises(NotFound):
        db.read(lambda conn: names.get(conn, "c", "support"))


def test_names_are_listed_in_pages(db: Database) -> None:
    run = new_run(db)
    for seq, name in enumerate(("b", "a", "c", "B"), 1):
        give(db, name, save(db, run, seq, f"ck{seq}"))
    listed = [item.name for item in db.read(lambda conn: names.list_names(conn, "a"))]
    assert sorted(listed) == ["B", "a", "b", "c"]
    paged = db.read(lambda conn: names.list_names(conn, "a", 2)), db.read(lambda conn: names.list_names(conn, "a", 9, listed[1]))
    assert [item.name for part in paged for item in part] == listed


@pytest.mark.parametrize(
    "name", ["", ".x", "a b", "a/b", "a\n", "tinker://x", "ü", "x" * 65, "a@", "a@0", "a@-1", "a@1.5", "a@" + "9" * 30]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        names.parse(name)


@pytest.mark.parametrize("note", ["\0", "\ud800", "x" * 501])
def test_a_note_that_can_not_be_kept_is_refused(db: Database, note: str) -> None:
    path = save(db, new_run(db), 1, "one")
    with pytest.raises(InvalidRequest, match="note must be"):
        give(db, "support", path, note=note)
    give(db, "support", path, note="🙂" * 500)


def test_names_parse() -> None:
    assert names.parse("gpt-4o.mini_2") == ("gpt-4o.mini_2", None)
    assert names.parse("support@12") == ("support", 12)


def test_what_is_no_name_is_not_found(db: Database) -> None:
    for name in ("", "a\0", "\ud800", "a/b"):
        with pytest.raises(NotFound):
            db.read(lambda conn, name=name: names.get(conn, "a", name))


def test_an_export_can_not_be_named(db: Database) -> None:
    run = new_run(db)
    with pytest.raises(InvalidRequest, match="is an export"):
        give(db, "support", save(db, run, 1, "x", kind="external_weights"))
    with pytest.raises(InvalidRequest, match="bare name"):
        give(db, "support@2", save(db, run, 2, "y"))
