"""What must outlive this process and isn't in the database yet: frames in files, each appended by one write.

The kernel has a frame when `put` returns, so kill -9 takes nothing of it along. Nothing is synced: a loss of power may take the last
moments. A file is cut as soon as nothing in it is needed, and what a process leaves is taken up by the next one.

A frame is its length, its CRC-32, and msgpack: an entry, or the keys of entries in the same file that are needed no more. A frame that was
cut off, and what follows it, is dropped. Nothing here knows what an entry is; what is taken up may be in the database already. Thread-safe.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from everlearn.errors import Unavailable
from everlearn.faultpoints import around

log = logging.getLogger(__name__)

HEAD = struct.Struct("<II")  # length of the body, CRC-32 of the body
SEGMENT_BYTES = 2**20  # a file that has grown this far gets a successor, so that it can be cut while others still come
SUFFIX = ".spool"


class Frame(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """An entry (`key`, `data`), or the keys that are `done`."""

    key: str = ""
    data: bytes = b""
    done: list[str] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


def framed(frame: Frame) -> bytes:
    body = _encode(frame)
    return HEAD.pack(len(body), zlib.crc32(body)) + body


def frames(data: bytes) -> tuple[list[Frame], int]:
    """The whole frames at the beginning, and where they end."""
    found: list[Frame] = []
    at, view = 0, memoryview(data)
    while at + HEAD.size <= len(data):
        length, crc = HEAD.unpack_from(data, at)
        body = view[at + HEAD.size : at + HEAD.size + length]
        if not length or len(body) < length or zlib.crc32(body) != crc:
            break
        found.append(_decode(body))
        at += HEAD.size + length
    return found, at


class Segment:
    """One file, open for appending. `keys`: those of its entries that are still needed."""

    def __init__(self, path: Path):
        self.path, self.keys = path, set[str]()
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self.fd).st_size

    def append(self, frame: bytes) -> None:
        """All of it or nothing; OSError otherwise."""
        if (written := os.write(self.fd, frame)) == len(frame):
            self.size += written
            return
        os.ftruncate(self.fd, self.size)  # half a frame would hide those after it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def cut(self, size: int = 0) -> None:
        os.ftruncate(self.fd, size)
        self.size = size

    def remove(self) -> None:
        os.close(self.fd)
        self.path.unlink(missing_ok=True)


class Spool:
    """The files of one folder, which belong to this process alone until `close`. Raises Unavailable if another one has them."""

    def __init__(self, folder: Path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._lock = threading.Lock()
        self._where: dict[str, Segment] = {}
        self._segments: set[Segment] = set()
        self._current: Segment | None = None
        self._number = 0
        self._claim = _claim(folder)
        try:
            self._left = self._take_up()
        except BaseException:
            self.close()
            raise

    def left(self) -> list[tuple[str, bytes]]:
        """Entries of earlier processes, the oldest first. They stay until they are dropped; only the first call gets them."""
        left, self._left = self._left, []
        return left

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in tuple(self._segments))

    def put(self, key: str, data: bytes) -> None:
        """Keeps an entry until it is dropped. Microseconds. OSError if the disk doesn't take it: then nothing of it stays."""
        frame = framed(Frame(key, data))
        with self._lock:
            if self._current is None or self._current.size >= SEGMENT_BYTES:
                self._number += 1
                self._current = Segment(self.folder / f"{self._number:08}{SUFFIX}")
                self._segments.add(self._current)
            with around("spool.put"):
                self._current.append(frame)
            self._current.keys.add(key)
            self._where[key] = self._current

    def drop(self, keys: Iterable[str]) -> None:
        """These entries are needed no more, whoever looks: also a process that takes up what this one leaves."""
        with around("spool.drop"), self._lock:
            touched: dict[Segment, list[str]] = {}
            for key in keys:
                if segment := self._where.pop(key, None):
                    segment.keys.remove(key)
                    touched.setdefault(segment, []).append(key)
            over = [segment for segment in touched if not segment.keys and segment is not self._current]
            self._segments.difference_update(over)
            for segment in touched.keys() - set(over):
                try:
                    if segment.keys:
                        segment.append(framed(Frame(done=touched[segment])))
                    else:
                        segment.cut()
                except OSError as error:  # their entries may be taken up once more, and found in the database then
                    log.warning("%s: %s", segment.path, error)
        for segment in over:
            segment.remove()

    def close(self) -> None:
        """What wasn't dropped is left for the next process. May be called twice."""
        with self._lock:
            for segment in self._segments:
                if segment.keys:
                    os.close(segment.fd)
                else:
                    segment.remove()
            self._segments.clear()
            self._current = None
            if self._claim >= 0:
                os.close(self._claim)
                self._claim = -1

    def _take_up(self) -> list[tuple[str, bytes]]:
        entries: dict[str, bytes] = {}
        for path in sorted(self.folder.glob(f"[0-9]*{SUFFIX}")):
            self._number = max(self._number, int(path.stem))
            segment = Segment(path)
            found, end = frames(path.read_bytes())
            if end < segment.size:
                log.warning("%s: the last %d bytes are no whole frame and are dropped", path, segment.size - end)
                segment.cut(end)
            done = {key for frame in found for key in frame.done}
            mine = {frame.key: frame.data for frame in found if frame.key and frame.key not in done and frame.key not in entries}
            if not mine:
                segment.remove()
                continue
            segment.keys.update(mine)
            self._segments.add(segment)
            self._where.update(dict.fromkeys(mine, segment))
            entries.update(mine)
        return list(entries.items())


def _claim(folder: Path) -> int:
    """A lock on the folder, which goes with the process however that ends."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"another everlearn server uses {folder}; stop it, or give this one its own home folder") from error
    return fd
