"""Fault points: armed by one variable, each in the code, each kind once, and nothing at all without the variable."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from everlearn import faultpoints
from everlearn.config import Fault, faults, load
from everlearn.errors import InternalError, InvalidRequest, Unavailable
from everlearn.store import keys
from everlearn.store.db import open_database


@pytest.fixture
def armed(monkeypatch, tmp_path: Path):
    """Arms a fault for this test alone."""

    def arm(point: str, n: int, kind: str) -> None:
        monkeypatch.setattr(faultpoints, "_armed", None)
        faultpoints.arm([Fault(point, n, kind)], tmp_path)

    return arm


def test_every_point_stands_in_the_code_and_no_other(root: Path) -> None:
    text = "\n".join(path.read_text() for path in (root / "everlearn").rglob("*.py") if path.name != "faultpoints.py")
    effects = set(re.findall(r'\baround\("([^"]+)"\)', text))
    reached = set(re.findall(r'\breach\("([^"]+)"\)', text))
    assert {f"{effect}.{side}" for effect in effects for side in ("before", "after")} | reached == {
        point for point in faultpoints.POINTS if not point.endswith(".committed")
    }


def test_the_variable_is_read_strictly() -> None:
    assert faults({}) == [] and faults({"EVERLEARN_FAULT": ""}) == []
    assert faults({"EVERLEARN_FAULT": "store.commit.after:3:kill"}) == [Fault("store.commit.after", 3, "kill")]
    two = "store.commit.after:3:kill,folder.file.before:1:delay"
    assert faults({"EVERLEARN_FAULT": two}) == [Fault("store.commit.after", 3, "kill"), Fault("folder.file.before", 1, "delay")]
    assert load(None, {"EVERLEARN_FAULT": "store.commit.after:3:kill"}).settings == load(None, {}).settings, "it is no setting"
    for text in ("store.commit.after", "store.commit.after:3", "store.commit.after:0:kill", "store.commit.after:x:kill", ":1:kill"):
        with pytest.raises(InvalidRequest, match="POINT:N:KIND"):
            faults({"EVERLEARN_FAULT": text})


def test_unknown_points_and_kinds_are_refused(armed) -> None:
    with pytest.raises(InvalidRequest, match=r"did you mean store\.commit\.after\?"):
        armed("store.comit.after", 1, "kill")
    with pytest.raises(InvalidRequest, match="kill, error, full-disk, delay"):
        armed("store.commit.after", 1, "explode")


def test_nothing_happens_without_it() -> None:
    assert faultpoints.around("optimizer.apply") is faultpoints.around("log.append")
    with faultpoints.around("optimizer.apply"):
        faultpoints.reach("store.commit.before")


def test_the_nth_time_and_never_again(armed, tmp_path: Path) -> None:
    armed("optimizer.apply.before", 3, "error")
    done = []
    for i in range(6):
        try:
            with faultpoints.around("optimizer.apply"):
                done.append(i)
        except InternalError:
            done.append(-1)
    assert done == [0, 1, -1, 3, 4, 5]
    assert [path.name for path in (tmp_path / faultpoints.FIRED).iterdir()] == ["optimizer.apply.before:3:error"]
    armed("optimizer.apply.before", 3, "error")
    for _ in range(4):
        with faultpoints.around("optimizer.apply"):
            pass  # a process that was started again in the same home goes on


def test_after_is_reached_only_by_what_succeeds(armed) -> None:
    armed("folder.file.after", 1, "full-disk")
    with pytest.raises(ValueError, match="of its own"), faultpoints.around("folder.file"):
        raise ValueError("of its own")
    with pytest.raises(OSError, match="No space left") as caught, faultpoints.around("folder.file"):
        pass
    assert caught.value.errno == 28


def test_rows_are_committed_once_with_their_transaction(armed, tmp_path: Path) -> None:
    db = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    armed("key.row.committed", 2, "error")
    db.write(lambda conn: keys.create(conn, "a", "first")).result(10)
    with pytest.raises(ValueError, match="undone"):
        db.write(undone).result(10)
    with pytest.raises(Unavailable, match=r"key\.row\.committed"):
        db.write(lambda conn: keys.create(conn, "a", "second")).result(10)
    assert [key.name for key in db.read(keys.list_keys)] == ["first", "second"], "it was committed all the same"
    db.close()


def undone(conn: sa.Connection) -> None:
    with faultpoints.around("name.row"):
        raise ValueError("undone")


def test_a_delay_only_takes_time(armed, monkeypatch) -> None:
    monkeypatch.setattr(faultpoints, "DELAY_SECONDS", 0.2)
    armed("folder.file.before", 1, "delay")
    started = time.monotonic()
    with faultpoints.around("folder.file"):
        pass
    assert time.monotonic() - started >= 0.2


def test_a_kill_is_a_kill(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from everlearn import faultpoints
from everlearn.config import faults
faultpoints.arm(faults(), Path({str(tmp_path)!r}))
with faultpoints.around("folder.rename"):
    print("in it", flush=True)
print("beyond", flush=True)
"""
    environ = {"EVERLEARN_FAULT": "folder.rename.after:1:kill"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=Path(__file__).parent.parent)
    assert (ended.returncode, ended.stdout) == (-9, "in it\n")
