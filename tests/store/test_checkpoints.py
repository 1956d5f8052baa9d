from __future__ import annotations

import time
from pathlib import Path

import pytest

from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.store import checkpoints
from everlearn.store.checkpoints import TinkerPath, parse_id, parse_path
from everlearn.store.db import Database
from tests.store.acts import SAVED, append, do, finish, new_run, save_entry


def save(db: Database, run: str, seq: int, name: str, **more: object) -> TinkerPath:
    finish(db, append(db, save_entry(run, seq, name, **more)), SAVED)
    return TinkerPath(run, "weights", name)


def test_paths_are_read_and_written() -> None:
    path = parse_path("tinker://sess-1:train:0/sampler_weights/step-0001.a")
    assert path == TinkerPath("sess-1:train:0", "sampler_weights", "step-0001.a")
    assert parse_path(str(path)) == path
    assert path.checkpoint_id == "sampler_weights/step-0001.a"
    assert parse_id("weights/0001") == ("weights", "0001")


BAD_NAMES = ["", ".", "..", "a/b", "../x", "%2e%2e", "a\0b", "a b", "é", "x" * 129, "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_play_tricks_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_path(f"tinker://run/weights/{name}")
    with pytest.raises(InvalidRequest):
        checkpoints.checkpoint_folder(tmp_path, "run", "weights", name, 1)


@pytest.mark.parametrize(
    "path", ["", "tinker://", "http://run/weights/x", "tinker://run/other/x", "tinker:///weights/x", "tinker://../weights/x/y"]
)
def test_paths_of_another_form_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_path(path)


@pytest.mark.parametrize("run", ["..", "a/b", "", "a\0"])
def test_ids_that_play_tricks_name_no_folder(tmp_path: Path, run: str) -> None:
    with pytest.raises(InvalidRequest):
        checkpoints.snapshot_folder(tmp_path, run, 1)
    with pytest.raises(InvalidRequest):
        checkpoints.version_folder(tmp_path, run)


def test_folders_lie_where_the_design_says(tmp_path: Path) -> None:
    run = "sess-1:train:0"
    assert (
        checkpoints.checkpoint_folder(tmp_path, run, "weights", "ck", 7) == tmp_path / "checkpoints" / "sess-1_train_0" / "weights" / "ck@7"
    )
    assert checkpoints.snapshot_folder(tmp_path, run, 7) == tmp_path / "snapshots" / "sess-1_train_0" / "7"


def test_listing_pages_newest_first(db: Database) -> None:
    run, other = new_run(db), new_run(db)
    for seq in (1, 2, 3):
        save(db, run, seq, f"ck{seq}")
    save(db, other, 1, "else")
    names = [c.name for c in db.read(lambda conn: checkpoints.list_checkpoints(conn, "a", run))[0]]
    assert names == ["ck3", "ck2", "ck1"]
    page, total = db.read(lambda conn: checkpoints.list_checkpoints(conn, "a", limit=2, offset=1))
    assert ([c.name for c in page], total) == (["ck3", "ck2"], 4)
    assert len(db.read(lambda conn: checkpoints.list_checkpoints(conn, "a", offset=3))[0]) == 1
    newest = db.read(lambda conn: checkpoints.latest(conn, "a", run, "weights"))
    assert newest is not None and newest.name == "ck3"
    assert db.read(lambda conn: checkpoints.latest(conn, "a", run, "sampler_weights")) is None
    assert db.read(checkpoints.total_bytes) == 40


def test_time_to_live_ends_it(db: Database) -> None:
    run = new_run(db)
    path = save(db, run, 1, "ck", ttl_seconds=3600.0)
    assert do(db, lambda conn: checkpoints.expire(conn, time.time())) == 0
    assert do(db, lambda conn: checkpoints.set_ttl(conn, "a", path, None)).expires_at is None
    assert do(db, lambda conn: checkpoints.expire(conn, time.time() + 10_000)) == 0
    do(db, lambda conn: checkpoints.set_ttl(conn, "a", path, 60))
    assert do(db, lambda conn: checkpoints.expire(conn, time.time() + 61)) == 1
    with pytest.raises(NotFound):
        db.read(lambda conn: checkpoints.get(conn, "a", path))


def test_an_expired_one_is_gone_before_anyone_cleans_up(db: Database) -> None:
    run = new_run(db)
    path = save(db, run, 1, "ck", ttl_seconds=-1.0)
    with pytest.raises(NotFound):
        db.read(lambda conn: checkpoints.get(conn, "a", path))
    assert db.read(lambda conn: checkpoints.list_checkpoints(conn, "a")) == ([], 0)
    save(db, run, 2, "ck")


def test_another_tenant_sees_only_what_was_published(db: Database) -> None:
    path = save(db, new_run(db), 1, "ck")
    attempts = [
        lambda conn: checkpoints.get(conn, "b", path),
        lambda conn: checkpoints.get(conn, "b", path, public=True),
        lambda conn: checkpoints.delete(conn, "b", path),
        lambda conn: checkpoints.set_public(conn, "b", path, True),
        lambda conn: checkpoints.set_ttl(conn, "b", path, 1),
        lambda conn: checkpoints.list_checkpoints(conn, "b", path.run_id),
    ]
    for attempt in attempts:
        with pytest.raises(NotFound):
            do(db, attempt)
    do(db, lambda conn: checkpoints.set_public(conn, "a", path, True))
    assert db.read(lambda conn: checkpoints.get(conn, "b", path, public=True)).tenant == "a"
    assert db.read(lambda conn: checkpoints.list_checkpoints(conn, "b")) == ([], 0)
    for attempt in attempts[2:5]:
        with pytest.raises(NotFound):
            do(db, attempt)


def test_a_copy_is_listed_once(db: Database) -> None:
    path = TinkerPath(new_run(db), "weights", "copy")
    facts = {"version": "v-9", "bytes": 5, "sha256": "00", "optimizer": False}
    added = do(db, lambda conn: checkpoints.add(conn, "a", path, folder="/c/1", **facts))
    assert (added.state, added.folder) == ("complete", "/c/1")
    do(db, lambda conn: checkpoints.add(conn, "a", path, folder="/c/1", **facts))
    with pytest.raises(Conflict):
        do(db, lambda conn: checkpoints.add(conn, "a", path, folder="/c/2", **facts))
    with pytest.raises(NotFound):
        do(db, lambda conn: checkpoints.add(conn, "b", path, folder="/c/3", **facts))
