"""Safetensors files without torch: read by memory map, written tensor by tensor so that no model is ever held whole.

`safetensors.numpy` covers neither: it knows no bfloat16 views and wants every tensor in memory before the first byte is written.
The format is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data without holes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everlearn.errors import InvalidRequest

# bfloat16 has no numpy type: its bits travel as uint16 and are widened by `widen`.
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1", "F8_E5M2": "|u1", "BOOL": "|b1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100 * 2**20


class Tensor(NamedTuple):
    """One tensor to write. `load` is called when its turn comes and must give an array of `shape` in the dtype's numpy type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(NUMPY[self.dtype]).itemsize


def widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of a floating-point tensor as it is stored."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype not in FLOATS:
        raise InvalidRequest(f"a tensor of type {dtype} can't be read as float32: only {', '.join(FLOATS)} can")
    return values.astype(np.float32)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as `dtype` stores them, rounded to the nearest (ties to even); the numpy type is the stored one."""
    if dtype != "BF16":
        return values.astype(NUMPY[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    # Rounding could carry a NaN's mantissa into infinity: NaN keeps its sign and gets the quiet bit instead.
    return np.where(np.isnan(values), (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40), rounded)


class TensorFile:
    """A read-only safetensors file. Arrays are views into the map and stay valid as long as they are referenced."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(size - 8, MAX_HEADER):
                raise InvalidRequest(f"{path} is no safetensors file: its header of {length} bytes doesn't fit into {size} bytes")
            header = file.read(length)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + length
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
        try:
            self._read_header(json.loads(header), size - self._start)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path} is no safetensors file: its header can't be read ({error!r})") from None

    def _read_header(self, header: dict[str, Any], size: int) -> None:
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            probe = Tensor(name, entry["dtype"], tuple(entry["shape"]), lambda: np.empty(0))
            if probe.dtype not in NUMPY or end - begin != probe.nbytes or not 0 <= begin <= end <= size:
                what = f"tensor {name} ({probe.dtype}, {list(probe.shape)})"
                raise InvalidRequest(f"{self.path}: {what} doesn't match its bytes [{begin}, {end})")
            self._entries[name] = (probe.dtype, probe.shape, begin)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def dtype(self, name: str) -> str:
        return self._entries[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def offset(self, name: str) -> int:
        """Where the tensor's bytes begin in the file."""
        return self._start + self._entries[name][2]

    def raw(self, name: str) -> np.ndarray:
        """The tensor as stored: a view, without a copy (bfloat16 as uint16)."""
        dtype, shape, begin = self._entries[name]
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype=NUMPY[dtype], count=count, offset=self._start + begin).reshape(shape)

    def float32(self, name: str) -> np.ndarray:
        return widen(self.raw(name), self.dtype(name))

    def copy(self, name: str) -> Tensor:
        """The tensor, unchanged, as an input of `write`."""
        return Tensor(name, self.dtype(name), self.shape(name), lambda: self.raw(name))


def write(path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None,
          progress: Callable[[int, int], None] | None = None) -> tuple[int, str]:  # fmt: skip
    """Writes and fsyncs a safetensors file in the given order; gives its size and sha256. `progress` gets (bytes so far, of)."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        done = 0
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.load())
            if array.shape != tensor.shape or array.dtype != np.dtype(NUMPY[tensor.dtype]):
                came = f"{array.dtype} {list(array.shape)}"
                raise InvalidRequest(f"{tensor.name} came as {came}, announced as {tensor.dtype} {list(tensor.shape)}")
            view = array.reshape(-1).view(np.uint8).data
            file.write(view)
            digest.update(view)
            done += len(view)
            if progress:
                progress(done, offset)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset, digest.hexdigest()
