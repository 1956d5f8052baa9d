"""Just enough of the GGUF format to read the embedded model: metadata, F32, F16, Q8_0 and Q4_1 tensors, in numpy.

The `gguf` package reads the same file in five seconds (a numpy call for every token of the vocabulary); this takes milliseconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everlearn.errors import InvalidRequest

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# type id -> (name, values of a block, bytes of a block)
BLOCKS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}


class Entry(NamedTuple):
    """A tensor: `shape` is [rows, columns] in numpy's order, `rows` its bytes as uint8 [rows, bytes of a row]."""

    kind: str
    shape: tuple[int, ...]
    rows: np.ndarray


class _Cursor:
    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            return [self.value(item) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The metadata and the tensors (views into a memory map) of a GGUF file, version 2 or 3, little endian."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    magic, version = data[:4], struct.unpack_from("<I", data, 4)[0]
    if magic != b"GGUF" or version not in (2, 3):
        raise InvalidRequest(f"{path} is no GGUF file of version 2 or 3: it starts with {magic!r}, version {version}")
    cursor.at = 8
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    infos = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]))  # GGUF names the fastest dimension first
        infos.append((name, shape, cursor.scalar("<I"), cursor.scalar("<Q")))
    start = -(-cursor.at // metadata.get("general.alignment", 32)) * metadata.get("general.alignment", 32)
    tensors = {}
    for name, shape, kind, offset in infos:
        if kind not in BLOCKS:
            raise InvalidRequest(f"{path}: tensor {name} has GGUF type {kind}; only {', '.join(b[0] for b in BLOCKS.values())} can be read")
        label, values, size = BLOCKS[kind]
        row = shape[-1] // values * size
        rows = math.prod(shape[:-1])
        block = np.frombuffer(data, np.uint8, rows * row, start + offset).reshape(rows, row)
        tensors[name] = Entry(label, shape, block)
    return metadata, tensors


def dequantise(entry: Entry) -> np.ndarray:
    """The float32 values, computed as llama.cpp does (scale * q, then + minimum, each rounded to float32)."""
    rows = np.ascontiguousarray(entry.rows)
    if entry.kind == "F32":
        return rows.view("<f4").reshape(entry.shape)
    if entry.kind == "F16":
        return rows.view("<f2").astype(np.float32).reshape(entry.shape)
    if entry.kind == "Q8_0":
        blocks = rows.reshape(-1, 34)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        return (blocks[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(entry.shape)
    blocks = rows.reshape(-1, 20)
    scale, minimum = np.split(blocks[:, :4].copy().view("<f2").astype(np.float32), 2, axis=1)
    out = np.empty((len(blocks), 32), np.float32)
    out[:, :16] = blocks[:, 4:] & 15  # the low nibbles are the first half of the block
    out[:, 16:] = blocks[:, 4:] >> 4
    out *= scale
    out += minimum
    return out.reshape(entry.shape)
