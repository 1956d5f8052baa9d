"""A kill or a full disk at the points of the store that no training run comes by: each in a process of its own, which then begins again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from everlearn.errors import NotFound
from everlearn.faultpoints import FIRED
from everlearn.store import datasets, keys
from everlearn.store.db import open_database
from everlearn.store.folders import complete_folders, sweep, verify_folder

# One process that forks for each act (it has one thread, unlike the tests' own).
ACTS = """
import json, os, sys
from pathlib import Path
from everlearn import faultpoints
from everlearn.config import faults
from everlearn.store.folders import remove_folder, write_folder

def act(home, what, fault):
    faultpoints.arm(faults({"EVERLEARN_FAULT": fault}), Path(home))
    folder = Path(home, "checkpoints", "a@1")
    if what == "remove":
        remove_folder(folder)
    else:
        write_folder(folder, {"x.bin": what.encode(), "y.bin": what.encode()}, {"step": what})

statuses = []
for arguments in json.load(sys.stdin):
    if not (child := os.fork()):
        try:
            act(*arguments)
            os._exit(0)
        except OSError:
            os._exit(1)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
SIDES = ("before", "after")
NEW = [f"folder.{effect}.{side}" for effect in ("file", "manifest", "rename", "sync") for side in SIDES]
OVER = [f"folder.{effect}.{side}" for effect in ("file", "manifest", "swap", "sync") for side in SIDES]


def act(*acts: tuple[Path, str, str]) -> list[int]:
    """Exit statuses of (home, what to do, fault)."""
    command = [sys.executable, "-c", ACTS]
    given = json.dumps([(str(home), what, fault) for home, what, fault in acts])
    ended = subprocess.run(command, input=given, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=True)
    statuses: list[int] = json.loads(ended.stdout)
    return statuses


def state(home: Path) -> str:
    """What stands under the name, after what a start does. Nothing, or all of one."""
    root = home / "checkpoints"
    sweep(root)
    try:
        manifest = verify_folder(root / "a@1")
    except NotFound:
        assert not list(root.iterdir())
        return ""
    assert list(complete_folders(root)) == list(root.iterdir()) == [root / "a@1"]
    assert (root / "a@1" / "x.bin").read_bytes() == (root / "a@1" / "y.bin").read_bytes() == manifest["step"].encode()
    step: str = manifest["step"]
    return step


@pytest.mark.parametrize("kind", ["kill", "full-disk"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_folder_is_the_old_or_the_new_one(tmp_path: Path, old: bool, kind: str) -> None:
    points = OVER if old else NEW
    if old:
        assert set(act(*((tmp_path / point, "first", "") for point in points))) == {0}
    harmed = act(*((tmp_path / point, "second", f"{point}:1:{kind}") for point in points))
    assert set(harmed) == {-9 if kind == "kill" else 1}
    for point in points:
        done = point in ("folder.rename.after", "folder.swap.after", "folder.sync.before", "folder.sync.after")
        assert state(tmp_path / point) == ("second" if done else "first" if old else ""), point
    assert set(act(*((tmp_path / point, "second", "") for point in points))) == {0}
    assert {state(tmp_path / point) for point in points} == {"second"}


@pytest.mark.parametrize("side", SIDES)
def test_a_folder_is_removed_whole(tmp_path: Path, side: str) -> None:
    assert act((tmp_path, "first", ""), (tmp_path, "remove", f"folder.remove.{side}:1:kill")) == [0, -9]
    assert state(tmp_path) == ("first" if side == "before" else "")
    assert act((tmp_path, "remove", "")) == [0] and state(tmp_path) == ""


def test_a_key_that_was_shown_is_there(tmp_path: Path) -> None:
    """`everlearn key create` shows the secret only after the commit."""
    made = {}
    for point in ("key.row.after", "key.row.committed"):
        environ = {"EVERLEARN_HOME": str(tmp_path), "EVERLEARN_FAULT": f"{point}:1:kill"}
        command = [sys.executable, "-m", "everlearn.cli.main", "key", "create", point]
        ended = subprocess.run(command, env=environ, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
        assert ended.returncode == -9 and "tml-" not in ended.stdout, point
        db = open_database(f"sqlite:///{tmp_path / 'everlearn.db'}")
        made[point] = [key.name for key in db.read(keys.list_keys)]
        db.close()
    assert made.pop("key.row.committed") == ["key.row.committed"], "committed, though nobody knows its secret"
    assert not any(made.values())
    assert len(list((tmp_path / FIRED).iterdir())) == 2


FREEZE = """
import sys
from pathlib import Path
from everlearn import faultpoints
from everlearn.config import faults
from everlearn.store import datasets
from everlearn.store.db import open_database

home, fault = sys.argv[1:]
db = open_database(f"sqlite:///{home}/everlearn.db")
faultpoints.arm(faults({"EVERLEARN_FAULT": fault}), Path(home))
drafts = [datasets.draft("train", "e", 1.0, {"n": n}, []) for n in range(3)]
db.write(lambda conn: datasets.create(conn, "a", fault, "sft", {}, drafts, {})).result(30)
"""


def test_a_dataset_is_listed_with_all_its_items_or_not_at_all(tmp_path: Path) -> None:
    listed = {}
    for point in ("before", "after", "committed"):
        fault = f"dataset.row.{point}:1:kill"
        ended = subprocess.run([sys.executable, "-c", FREEZE, str(tmp_path), fault], cwd=Path(__file__).parents[2], timeout=60, check=False)
        assert ended.returncode == -9, point
        db = open_database(f"sqlite:///{tmp_path / 'everlearn.db'}")
        listed[point] = db.read(lambda conn: datasets.list_datasets(conn, "a"))
        if listed[point]:
            (made,) = listed[point]
            assert len(db.read(lambda conn, made=made: datasets.items(conn, "a", made.dataset_id))) == made.train_items == 3
        db.close()
    assert [len(found) for found in listed.values()] == [0, 0, 1]
