from __future__ import annotations

import time
from pathlib import Path

import msgspec

from everlearn.store import checkpoints, garbage, log, runs
from everlearn.store.checkpoints import TinkerPath
from everlearn.store.db import Database
from everlearn.store.folders import write_folder
from tests.store.acts import SAVED, append, do, entry, finish, new_run, publish_entry, save_entry


def make(folder: Path) -> str:
    write_folder(folder, {"adapter.safetensors": b"weights"}, {})
    return str(folder)


def save(db: Database, home: Path, run: str, seq: int, name: str, **more: object) -> Path:
    folder = checkpoints.checkpoint_folder(home, run, "weights", name, seq)
    request = append(db, save_entry(run, seq, name, folder=make(folder), **more))
    finish(db, request, SAVED)
    return folder


def test_deleted_and_overwritten_folders_go(db: Database, tmp_path: Path) -> None:
    run = new_run(db)
    old, deleted = save(db, tmp_path, run, 1, "ck"), save(db, tmp_path, run, 2, "other")
    new = save(db, tmp_path, run, 3, "ck", overwrite=True)
    do(db, lambda conn: checkpoints.delete(conn, "a", TinkerPath(run, "weights", "other")))
    assert garbage.collect(db, time.time()) == 2
    assert [folder.exists() for folder in (old, deleted, new)] == [False, False, True]
    assert garbage.collect(db, time.time()) == 0


def test_a_folder_stays_while_a_load_may_be_replayed(db: Database, tmp_path: Path) -> None:
    run, loader = new_run(db), new_run(db)
    folder = save(db, tmp_path, run, 1, "ck")
    finish(db, append(db, entry(loader, 1, "load", folder=str(folder), path="p")))
    do(db, lambda conn: checkpoints.delete(conn, "a", TinkerPath(run, "weights", "ck")))
    assert garbage.collect(db, time.time()) == 0
    assert folder.exists()
    do(db, lambda conn: log.add_snapshot(conn, loader, 1, str(tmp_path / "s"), 1))
    assert garbage.collect(db, time.time()) == 1
    assert not folder.exists()


def test_a_snapshot_replaces_its_predecessor(db: Database, tmp_path: Path) -> None:
    run = new_run(db)
    folders = [checkpoints.snapshot_folder(tmp_path, run, seq) for seq in (0, 1)]
    for seq, folder in enumerate(folders):
        if seq:
            finish(db, append(db, entry(run, seq)))
        assert do(db, lambda conn, seq=seq, folder=folder: log.add_snapshot(conn, run, seq, make(folder), 1))
    assert garbage.collect(db, time.time()) == 1
    assert [folder.exists() for folder in folders] == [False, True]
    do(db, lambda conn: runs.unload_run(conn, "a", run))
    garbage.collect(db, time.time())
    assert not folders[1].exists()


def test_a_sample_keeps_the_weights_that_its_inflight_sampler_has_left(db: Database, tmp_path: Path) -> None:
    run = new_run(db)
    folders = [checkpoints.version_folder(tmp_path, f"v-{seq}") for seq in (1, 2)]
    waiting = entry(runs.sampler_id(run.split(":")[0], 1), 0, "sample", folder=str(folders[0]))
    for seq, folder in enumerate(folders, 1):
        request = publish_entry(run, seq, seq, f"v-{seq}", "inflight")
        finish(db, append(db, msgspec.structs.replace(request, meta={**request.meta, "folder": make(folder)})), SAVED)
        if seq == 1:
            append(db, waiting)
    garbage.collect(db, time.time())
    assert folders[0].exists() and folders[1].exists()
    finish(db, waiting)
    garbage.collect(db, time.time())
    assert not folders[0].exists() and folders[1].exists()


def test_ephemeral_versions_go_when_nobody_can_ask_for_them(db: Database, tmp_path: Path) -> None:
    run = new_run(db)
    session = run.split(":")[0]

    def publish(seq: int, kind: str) -> Path:
        folder = checkpoints.version_folder(tmp_path, f"v-{seq}")
        request = publish_entry(run, seq, seq, f"v-{seq}", kind)
        finish(db, append(db, msgspec.structs.replace(request, meta={**request.meta, "folder": make(folder)})), SAVED)
        return folder

    folders = [publish(1, "inflight"), publish(2, "inflight"), publish(3, "snapshot"), publish(4, "snapshot")]
    garbage.collect(db, time.time())
    assert [folder.exists() for folder in folders] == [False, True, True, True], "an inflight publish replaces the one before"
    assert do(db, lambda conn: garbage.retire_versions(conn, time.time(), keep=1)) == 0, "used a moment ago"
    assert do(db, lambda conn: garbage.retire_versions(conn, time.time() + 7200, keep=1)) == 2
    append(db, entry(runs.sampler_id(session, 3), 0, "sample"))
    garbage.collect(db, time.time())
    assert [folder.exists() for folder in folders] == [False, False, True, True], "a sample still waits for version 3"
    finish(db, entry(runs.sampler_id(session, 3), 0, "sample"))
    do(db, lambda conn: runs.finish_session(conn, "a", session, "success"))
    garbage.collect(db, time.time())
    assert not any(folder.exists() for folder in folders)


def test_ephemeral_versions_of_a_client_that_fell_silent_go(db: Database, tmp_path: Path) -> None:
    """A script that was killed never said that its session is finished."""
    run = new_run(db)
    request = publish_entry(run, 1, 1, "v-1", "snapshot")
    folder = checkpoints.version_folder(tmp_path, "v-1")
    finish(db, append(db, msgspec.structs.replace(request, meta={**request.meta, "folder": make(folder)})), SAVED)
    later = time.time() + runs.SILENCE_SECONDS
    assert garbage.collect(db, later - 60) == 0
    assert garbage.collect(db, later + 60) == 1 and not folder.exists()


def test_boot_keeps_what_rows_name_and_removes_the_rest(db: Database, tmp_path: Path) -> None:
    run = new_run(db)
    kept = save(db, tmp_path, run, 1, "ck")
    pending = checkpoints.checkpoint_folder(tmp_path, run, "weights", "half", 2)
    append(db, save_entry(run, 2, "half", folder=make(pending)))
    stray = checkpoints.version_folder(tmp_path, "v-stray")
    make(stray)
    unfinished = tmp_path / "snapshots" / "r" / "7.tmp-ab12"
    unfinished.mkdir(parents=True)
    assert garbage.boot_sweep(db, tmp_path, time.time()) == 2
    assert [path.exists() for path in (kept, pending, stray, unfinished)] == [True, True, False, False]
