"""Folders on disk that are whole or absent: checkpoints, sampler versions, snapshots.

A folder is written beside its final name, every file fsynced and hashed, the manifest last; then the folder is fsynced, renamed,
and its parent fsynced. Whoever sees the final name sees a complete folder. This module knows no database rows.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from everlearn.errors import Damaged, InternalError, NotFound
from everlearn.faultpoints import around

MANIFEST = "manifest.json"
UNFINISHED = ".tmp-"  # no checkpoint, run or version name can end in it with an id: names are put into folders as name@seq
CHUNK = 1 << 20
WAY_OUT = "restore the folder from a backup, or delete the checkpoint"

Content = bytes | Callable[[BinaryIO], None] | Path


class _Hashing:
    """A write-only file that hashes and counts what passes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_folder(final: Path, files: Mapping[str, Content], manifest: Mapping[str, Any]) -> tuple[int, str]:
    """Writes `files` (name -> bytes, a function that writes into a binary file, or a file to copy) and manifest.json into `final`,
    all or nothing, replacing a folder that is there. Returns the bytes of all files and the sha256 of the manifest, which holds
    the sha256 and size of every file under `files`, and so stands for the whole."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{final.name}{UNFINISHED}{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        listed = {}
        for name, content in files.items():
            with around("folder.file"):
                listed[name] = _write_file(temporary / _plain(name), content)
        body = json.dumps({**manifest, "files": listed}, indent=1, sort_keys=True).encode()
        with around("folder.manifest"):
            _write_file(temporary / MANIFEST, body)
        fsync_folder(temporary)
        _rename_over(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(entry["size"] for entry in listed.values()) + len(body), hashlib.sha256(body).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as written, hashes unchecked. Raises NotFound where there is none, Damaged where it can't be read."""
    try:
        return cast(dict[str, Any], json.loads((folder / MANIFEST).read_bytes()))
    except FileNotFoundError as error:
        raise NotFound(f"folder {folder} has no {MANIFEST}: it is not a complete checkpoint") from error
    except ValueError as error:
        raise Damaged(f"{folder / MANIFEST} is damaged ({error}); {WAY_OUT}") from error


def verify_folder(folder: Path) -> dict[str, Any]:
    """Reads every file, compares size and sha256 with the manifest, and returns the manifest. Raises Damaged where they
    differ, or a file is too many."""
    manifest = read_manifest(folder)
    listed = manifest.get("files", {})
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != set(listed):
        raise Damaged(f"folder {folder} holds {sorted(found)} but its manifest lists {sorted(listed)}; {WAY_OUT}")
    for name, entry in listed.items():
        size, digest = hash_file(folder / name)
        if size != entry["size"] or digest != entry["sha256"]:
            raise Damaged(
                f"{folder / name} has {size} bytes with sha256 {digest[:12]}..., its manifest says {entry['size']} bytes with "
                f"{entry['sha256'][:12]}...: the file is damaged; {WAY_OUT}"
            )
    return manifest


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def remove_folder(folder: Path) -> None:
    """Removes a folder so that a crash on the way leaves an unfinished one (swept at boot), never half of a complete one."""
    doomed = folder.parent / f"{folder.name}{UNFINISHED}{secrets.token_hex(4)}"
    with around("folder.remove"):
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> list[Path]:
    """Removes what writers and removers left unfinished under `root`, at any depth. Only for boot: nobody may be writing."""
    removed = []
    for path in list(_folders(root)):
        if UNFINISHED in path.name:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def complete_folders(root: Path) -> Iterator[Path]:
    """Every folder under `root` that has a manifest."""
    return (path for path in _folders(root) if UNFINISHED not in path.name and (path / MANIFEST).is_file())


def _folders(root: Path) -> Iterator[Path]:
    for parent, names, _ in os.walk(root):
        for name in list(names):
            if UNFINISHED in name or (Path(parent) / name / MANIFEST).is_file():
                names.remove(name)  # nothing below is anyone else's
                yield Path(parent) / name


def _plain(name: str) -> str:
    if not name or Path(name).name != name or name == MANIFEST:
        raise InternalError(f"file name {name!r} must be a plain name other than {MANIFEST}")
    return name


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    with path.open("xb") as file:
        sink = _Hashing(file)
        if isinstance(content, bytes):
            sink.write(content)
        elif isinstance(content, Path):
            with content.open("rb") as source:
                while chunk := source.read(CHUNK):
                    sink.write(chunk)
        else:
            content(cast(BinaryIO, sink))
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": sink.sha256.hexdigest(), "size": sink.size}


def _rename_over(temporary: Path, final: Path) -> None:
    if not final.exists():
        with around("folder.rename"):
            temporary.rename(final)
        with around("folder.sync"):
            fsync_folder(final.parent)
        return
    # The same save, run again after a crash that came before its row was committed. Swapping the names leaves no moment without
    # a complete folder; where the system can't, a crash between the two renames loses a folder that the log can make again.
    with around("folder.swap"):
        swapped = _exchange(temporary, final)
        if not swapped:
            remove_folder(final)
            temporary.rename(final)
    with around("folder.sync"):
        fsync_folder(final.parent)
    if swapped:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names atomically (Linux renameat2); False where there is no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable: a rename or a new file lasts only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
