"""The spool: what was put is there until it is dropped, wherever the process ends, and its files stay small and private."""

from __future__ import annotations

import random
import resource
import statistics
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlearn.errors import Unavailable
from everlearn.store import spool
from everlearn.store.spool import Frame, Spool, framed, frames


def reopened(old: Spool) -> Spool:
    old.close()
    return Spool(old.folder)


def test_entries_stay_until_they_are_dropped(tmp_path: Path) -> None:
    first = Spool(tmp_path / "spool")
    for number in range(5):
        first.put(f"k{number}", bytes([number]) * 100)
    first.drop(["k1", "k3", "nobody's"])
    second = reopened(first)
    assert second.left() == [(f"k{number}", bytes([number]) * 100) for number in (0, 2, 4)]
    assert second.left() == []
    second.drop(["k0"])
    second.put("k5", b"")
    third = reopened(second)
    assert [key for key, _ in third.left()] == ["k2", "k4", "k5"]
    third.drop(["k2", "k4", "k5"])
    assert third.size == 0
    fourth = reopened(third)
    assert fourth.left() == [] and list(fourth.folder.iterdir()) == []
    fourth.close()
    fourth.close()


def test_files_are_private(tmp_path: Path) -> None:
    made = Spool(tmp_path / "spool")
    made.put("k", b"secret")
    (path,) = made.folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and made.folder.stat().st_mode & 0o777 == 0o700
    made.close()


def test_a_file_is_cut_when_nothing_in_it_is_needed(tmp_path: Path) -> None:
    made = Spool(tmp_path / "spool")
    made.put("k", b"x" * 1000)
    (path,) = made.folder.iterdir()
    assert path.stat().st_size == made.size > 1000
    made.drop(["k"])
    assert path.stat().st_size == made.size == 0
    made.close()


def test_a_stream_without_a_pause_keeps_the_disk_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 10_000)
    made = Spool(tmp_path / "spool")
    for number in range(1000):  # ten wait at any time
        made.put(f"k{number}", bytes(500))
        made.drop([f"k{number - 10}"])
        assert made.size == sum(path.stat().st_size for path in made.folder.iterdir()) < 30_000
    again = reopened(made)
    assert [key for key, _ in again.left()] == [f"k{number}" for number in range(990, 1000)]
    again.close()


def test_every_cut_of_the_last_frame_keeps_those_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = framed(Frame("a", b"1" * 40)) + framed(Frame("b", b"2" * 40))
    last = framed(Frame("c", b"3" * 40))
    for cut in range(len(last)):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / "00000007.spool").write_bytes(whole + last[:cut])
        made = Spool(folder)
        assert [key for key, _ in made.left()] == ["a", "b"]
        assert (f"the last {cut} bytes" in caplog.text) == (cut > 0)
        made.drop(["a"])
        made.put("d", b"4")
        again = reopened(made)
        assert [key for key, _ in again.left()] == ["b", "d"]
        again.close()
        caplog.clear()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.lists(st.binary(max_size=50), max_size=4), st.data())
def test_damage_is_never_read_as_an_entry(noise: bytes, entries: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(framed(Frame(str(number), entry)) for number, entry in enumerate(entries))
    found, end = frames(whole + noise)
    assert [frame.data for frame in found] == entries and end == len(whole)
    if whole:
        place = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :]
        found, end = frames(damaged)
        assert [frame.data for frame in found] == entries[: len(found)] and len(found) < len(entries) and end <= place


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write off as a full disk does."""
    made = Spool(tmp_path / "spool")
    made.put("a", bytes(1000))
    before = made.size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 500, hard))
    try:
        for _ in range(2):
            with pytest.raises(OSError):
                made.put("b", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert made.size == before
    made.put("c", bytes(1000))
    again = reopened(made)
    assert [key for key, _ in again.left()] == ["a", "c"]
    again.close()


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    made = Spool(tmp_path / "spool")
    with pytest.raises(Unavailable, match="another everlearn server"):
        Spool(tmp_path / "spool")
    reopened(made).close()


def test_putting_takes_microseconds(tmp_path: Path) -> None:
    made, times = Spool(tmp_path / "spool"), []
    entry = random.Random(0).randbytes(8000)
    for number in range(500):
        began = time.perf_counter()
        made.put(f"k{number}", entry)
        times.append(time.perf_counter() - began)
        if number % 10 == 9:
            made.drop(f"k{other}" for other in range(number - 9, number + 1))
    assert statistics.median(times) < 0.001, times  # a loaded machine; benchmarks/records.py prints the figures
    made.close()
