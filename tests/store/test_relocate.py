"""A home that stands elsewhere than its rows say keeps every checkpoint."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from everlearn.engine import protocol
from everlearn.errors import Unavailable
from everlearn.store import checkpoints, garbage, log, names, tables
from everlearn.store.checkpoints import TinkerPath
from everlearn.store.db import Database
from everlearn.store.folders import write_folder
from everlearn.store.relocate import OWNERS, here, relocate
from everlearn.types import LoraSpec
from tests.store.acts import SAVED, append, do, entry, finish, new_run, publish_entry, save_entry


def make(folder: Path) -> Path:
    write_folder(folder, {"adapter.safetensors": b"weights"}, {})
    return folder


def fill(db: Database, home: Path) -> tuple[str, list[Path]]:
    """A run with everything that names a folder: a checkpoint under a name, a sampler, a snapshot, and a load and a save that wait."""
    run = new_run(db)
    saved = make(checkpoints.checkpoint_folder(home, run, "weights", "ck", 1))
    finish(db, append(db, save_entry(run, 1, "ck", folder=str(saved))), SAVED)
    named = make(checkpoints.checkpoint_folder(home, run, "sampler_weights", "best", 2))
    publish = publish_entry(run, 2, 1, "v-2")
    meta = {**publish.meta, "folder": str(named), "name": "best"}
    finish(db, append(db, msgspec.structs.replace(publish, meta=meta)), SAVED)
    do(db, lambda conn: names.give(conn, "a", "support", TinkerPath(run, "sampler_weights", "best")))
    frozen = make(checkpoints.version_folder(home, "v-3"))
    publish = publish_entry(run, 3, 2, "v-3")
    finish(db, append(db, msgspec.structs.replace(publish, meta={**publish.meta, "folder": str(frozen)})), SAVED)
    snapshot = make(checkpoints.snapshot_folder(home, run, 3))
    do(db, lambda conn: log.add_snapshot(conn, run, 3, str(snapshot), 1))
    load = protocol.Load(f"{run}:4", run, 4, "a", "tiny", LoraSpec(8), str(saved), True)
    append(db, entry(run, 4, "load", folder=str(saved), path="p", create=False), protocol.encode(load))
    unfinished = checkpoints.checkpoint_folder(home, run, "weights", "next", 5)
    save = protocol.Save(f"{run}:5", run, 5, str(unfinished), True, {})
    append(db, save_entry(run, 5, "next", folder=str(unfinished)), protocol.encode(save))
    return run, [saved, named, frozen, snapshot]


def all_folders(db: Database) -> set[str]:
    found = [db.read(lambda conn, table=table: conn.execute(sa.select(table.c.folder)).scalars().all()) for table in OWNERS]
    return {folder for folders in found for folder in folders if folder}


@pytest.mark.parametrize("way", ["moved", "deeper", "copied", "by a link"])
def test_nothing_is_lost_when_the_home_stands_elsewhere(db: Database, tmp_path: Path, way: str) -> None:
    old = tmp_path / "versions" / "home"  # a name of the layout above the home misleads nobody
    run, folders = fill(db, old)
    new = old / "inner" if way == "deeper" else tmp_path / "other"
    if way == "deeper":
        old.rename(tmp_path / "aside")
        old.mkdir()
        (tmp_path / "aside").rename(new)
    else:
        {"moved": shutil.move, "copied": shutil.copytree, "by a link": lambda there, link: link.symlink_to(there)}[way](old, new)
    assert garbage.boot_sweep(db, new, time.time()) == 0
    assert all((new / folder.relative_to(old)).is_dir() for folder in folders)
    assert all(Path(folder).is_relative_to(new) and (way != "deeper" or "inner/inner" not in folder) for folder in all_folders(db))
    saved = str(new / folders[0].relative_to(old))
    assert do(db, lambda conn: checkpoints.get(conn, "a", TinkerPath(run, "weights", "ck"))).folder == saved
    bodies = [db.read(lambda conn, seq=seq: log.payload(conn, f"{run}:{seq}")) for seq in (4, 5)]
    load, save = [protocol.decode_command(body) for body in bodies if body is not None]
    assert load.folder == saved and load.optimizer and Path(save.folder).is_relative_to(new)
    rows = sa.select(tables.requests.c.payload_bytes).where(tables.requests.c.seq >= 4).order_by(tables.requests.c.seq)
    assert db.read(lambda conn: conn.execute(rows).scalars().all()) == [len(body) for body in bodies if body is not None]
    waiting = db.read(lambda conn: log.find(conn, "a", run, 5))
    assert waiting is not None and waiting.meta["folder"] == save.folder
    assert do(db, lambda conn: relocate(conn, new)) == 0


def test_a_copy_of_a_home_removes_nothing_of_the_other(db: Database, tmp_path: Path) -> None:
    run, (saved, *_) = fill(db, tmp_path / "old")
    finish(db, entry(run, 4, "load"), None, {"code": "internal", "message": "no", "param": None})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    do(db, lambda conn: checkpoints.delete(conn, "a", TinkerPath(run, "weights", "ck")))
    assert garbage.boot_sweep(db, tmp_path / "new", time.time()) == 1
    assert saved.is_dir() and not Path(here(str(saved), tmp_path / "new")).exists()


def test_checkpoints_beside_another_database_are_left_alone(db: Database, tmp_path: Path) -> None:
    folder = make(checkpoints.checkpoint_folder(tmp_path, "s:train:0", "weights", "ck", 1))
    with pytest.raises(Unavailable, match=r"holds 1 checkpoints and the database names none.*store\.url"):
        garbage.boot_sweep(db, tmp_path, time.time())
    assert folder.is_dir()


def test_what_is_no_folder_of_a_home_stays(tmp_path: Path) -> None:
    for folder in ("", "/models/tiny", "/x/versions", "/x/checkpoints/r/other/ck@1"):
        assert here(folder, tmp_path) == folder
    assert here("/checkpoints/r/weights/ck@1", Path("/")) == "/checkpoints/r/weights/ck@1"
