"""Tensors as they cross the wire -> dense `Array`s, checked: shape against bytes, sparse CSR against its own rules.

A sparse tensor is made dense here, once: unlisted cells become `pad` (0 in training inputs, -1 where a cell asks for nothing).
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np

from everlearn.errors import InvalidRequest, TooLarge
from everlearn.types import Array

NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "bfloat16": np.dtype("<u2"),
}
WIDE = {"float32": "float32", "bfloat16": "float32", "int64": "int64", "int32": "int64"}


def from_bytes(data: bytes, dtype: str, name: str) -> np.ndarray:
    """A flat view of little-endian bytes; bfloat16 widens to float32 and int32 to int64, as the SDK does."""
    item = NUMPY[dtype]
    if len(data) % item.itemsize:
        raise InvalidRequest(f"{name} holds {len(data)} bytes, which is no multiple of the {item.itemsize} that {dtype} needs", param=name)
    flat = np.frombuffer(data, dtype=item)
    if dtype == "bfloat16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.int64) if dtype == "int32" else flat


def from_list(values: list[Any], dtype: str, name: str) -> np.ndarray:
    """A flat array of a JSON list of numbers."""
    if dtype not in ("float32", "int64"):
        raise InvalidRequest(f"{name} has dtype {dtype!r}; it must be float32 or int64", param=name)
    try:
        flat = np.asarray(values, dtype=np.float64 if dtype == "float32" else None)
        if dtype == "int64" and flat.size and flat.dtype.kind not in "iu" and not np.array_equal(flat, np.floor(flat.astype(np.float64))):
            raise ValueError("not whole numbers")
        with np.errstate(over="ignore", invalid="ignore"):
            flat = flat.astype(NUMPY[dtype])
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"{name} must be a flat list of {dtype} numbers ({error})", param=name) from None
    if flat.ndim != 1:
        raise InvalidRequest(f"{name} must be a flat list of numbers with its shape beside it, not nested lists", param=name)
    return flat


def dense(flat: np.ndarray, shape: list[int] | None, name: str) -> Array:
    """An `Array` of `shape` (without one: a vector), which must hold exactly the values given."""
    shape = [flat.size] if not shape else [int(n) for n in shape]
    if any(n < 0 for n in shape) or math.prod(shape) != flat.size:
        raise InvalidRequest(f"{name} holds {flat.size} values, but its shape {shape} needs {math.prod(shape)}", param=name)
    return Array(WIDE[str(flat.dtype)], shape, flat.tobytes())


def from_csr(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: list[int] | None, *, pad: int, max_bytes: int, name: str
) -> Array:
    """Compressed sparse rows -> dense [rows, columns], `pad` wherever no value is listed."""
    if shape is None or len(shape) != 2 or min(shape) < 0:
        raise InvalidRequest(f"{name} is sparse and has shape {shape}; a sparse tensor needs a shape of two dimensions", param=name)
    rows, columns = int(shape[0]), int(shape[1])
    if rows * columns * values.itemsize > max_bytes:
        raise TooLarge(
            f"{name} has shape {[rows, columns]}, which takes {rows * columns * values.itemsize} bytes when made dense; at most "
            f"{max_bytes} are accepted (api.max_body_bytes): send fewer datums in one request or fewer columns",
            param=name,
        )
    _check_csr(values, crow, col, rows, columns, name)
    grid = np.full((rows, columns), pad, dtype=values.dtype)
    grid[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return Array(WIDE[str(values.dtype)], [rows, columns], grid.tobytes())


def _check_csr(values: np.ndarray, crow: np.ndarray, col: np.ndarray, rows: int, columns: int, name: str) -> None:
    def fail(rule: str) -> None:
        raise InvalidRequest(f"{name} is not a valid sparse CSR tensor: {rule}", param=name)

    if crow.size != rows + 1:
        fail(f"{crow.size} row pointers for {rows} rows; there must be one more than rows")
    if col.size != values.size:
        fail(f"{col.size} column indices for {values.size} values")
    if crow[0] != 0 or crow[-1] != values.size or (np.diff(crow) < 0).any():
        fail(f"row pointers must rise from 0 to the number of values, {values.size}")
    if col.size and (col.min() < 0 or col.max() >= columns):
        fail(f"column indices must lie in 0..{columns - 1}")
    row_of = np.repeat(np.arange(rows), np.diff(crow))
    if ((np.diff(col) <= 0) & (np.diff(row_of) == 0)).any():
        fail("column indices must rise strictly within a row")


def pack_layout(crow: np.ndarray, col: np.ndarray) -> str:
    """The cells that a sparse request named, as short text: its answer comes back in the same layout."""
    lengths = np.asarray([crow.size, col.size], dtype="<i4").tobytes()
    return base64.b85encode(zlib.compress(lengths + crow.astype("<i4").tobytes() + col.astype("<i4").tobytes())).decode()


def unpack_layout(text: str) -> tuple[np.ndarray, np.ndarray]:
    """`pack_layout` undone: (crow, col)."""
    flat = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i4").astype(np.int64)
    return flat[2 : 2 + flat[0]], flat[2 + flat[0] :]


def pick(grid: np.ndarray, crow: np.ndarray, col: np.ndarray) -> np.ndarray:
    """The values of `grid` [rows, columns] at the listed cells, in CSR order."""
    return grid[np.repeat(np.arange(grid.shape[0]), np.diff(crow)), col]
