from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from everlearn.errors import Damaged, InternalError, NotFound
from everlearn.store.folders import MANIFEST, complete_folders, read_manifest, remove_folder, sweep, verify_folder, write_folder


def parts(file: BinaryIO) -> None:
    file.write(b"one")
    file.write(memoryview(b"two"))


def test_a_folder_holds_what_was_given_and_its_hashes(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"copied")
    final = tmp_path / "runs" / "a@1"
    size, sha256 = write_folder(final, {"x.bin": b"bytes", "y.bin": parts, "z.bin": tmp_path / "source"}, {"step": 3})
    assert [(final / name).read_bytes() for name in ("x.bin", "y.bin", "z.bin")] == [b"bytes", b"onetwo", b"copied"]
    manifest = verify_folder(final)
    assert (manifest["step"], manifest["files"]["y.bin"]["size"]) == (3, 6)
    assert size == sum(path.stat().st_size for path in final.iterdir())
    assert len(sha256) == 64
    assert list(complete_folders(tmp_path)) == [final]


def test_writing_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    final = tmp_path / "a@1"
    write_folder(final, {"old.bin": b"1"}, {})
    write_folder(final, {"new.bin": b"2"}, {})
    verify_folder(final)
    assert {path.name for path in tmp_path.iterdir()} == {"a@1"}
    assert {path.name for path in final.iterdir()} == {"new.bin", MANIFEST}


def test_a_writer_that_fails_leaves_the_old_folder_and_no_trace(tmp_path: Path) -> None:
    final = tmp_path / "a@1"
    write_folder(final, {"old.bin": b"1"}, {})

    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(final, {"new.bin": broken}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"a@1"}
    assert "old.bin" in verify_folder(final)["files"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", MANIFEST])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(InternalError, match="plain name"):
        write_folder(tmp_path / "a@1", {name: b"x"}, {})


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    final = tmp_path / "a@1"
    write_folder(final, {"x.bin": b"0123456789"}, {})
    (final / "x.bin").write_bytes(b"0123456780")
    with pytest.raises(Damaged, match=r"x\.bin has 10 bytes"):
        verify_folder(final)
    (final / "x.bin").unlink()
    with pytest.raises(Damaged, match="manifest lists"):
        verify_folder(final)
    (final / MANIFEST).write_text("{")
    with pytest.raises(Damaged, match="damaged"):
        read_manifest(final)
    with pytest.raises(NotFound):
        verify_folder(tmp_path / "nowhere")


def test_boot_removes_what_a_crash_left(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # dies in the middle of the second file
        write_folder(tmp_path / "run" / "weights" / "a@1", {"x.bin": b"whole", "y.bin": lambda file: os._exit(9)}, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    write_folder(tmp_path / "run" / "weights" / "b@2", {"x.bin": b"whole"}, {})
    assert len(list((tmp_path / "run" / "weights").iterdir())) == 2
    assert len(sweep(tmp_path)) == 1
    assert [path.name for path in (tmp_path / "run" / "weights").iterdir()] == ["b@2"]
    assert sweep(tmp_path) == []


def test_removing_is_final_and_may_be_repeated(tmp_path: Path) -> None:
    write_folder(tmp_path / "a@1", {"x.bin": b"1"}, {})
    remove_folder(tmp_path / "a@1")
    remove_folder(tmp_path / "a@1")
    assert list(tmp_path.iterdir()) == []
