"""The tensors of a model folder, and reading them into memory that is there already.

What needs no conversion goes from the file into place; the rest passes through one small buffer. Nothing is mapped into memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models.export import read_index, weight_files
from everlearn.models.quant import Piece
from everlearn.models.tensorfile import TensorFile

STAGE_BYTES = 8 * 2**20
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip


class Folder:
    """The tensors of a model folder by name: their own, or what `rename` calls them."""

    def __init__(self, path: Path):
        try:
            listed = read_index(path) or {}
        except InvalidRequest as error:
            raise Unsupported(error.message) from error
        try:
            self.files: dict[str, TensorFile] = weight_files(path)
        except (InvalidRequest, OSError, ValueError, KeyError) as error:
            raise Unsupported(f"{path} can't be loaded: {error}; download or convert the folder again") from error
        if lost := sorted(set(listed) - set(self.files)):
            raise Unsupported(
                f"{path} lacks {len(lost)} of the tensors that its index lists (the first: {lost[0]} in {listed[lost[0]]}); "
                "download or convert the folder again, and check that every *.safetensors file is there"
            )
        self.stored = {name: name for name in self.files}  # as it is called in its file

    def rename(self, names: Mapping[str, str]) -> None:
        """`names` gives each tensor's new name; no two may be the same."""
        self.stored = {names[name]: stored for name, stored in self.stored.items()}
        self.files = {names[name]: file for name, file in self.files.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].shape(self.stored[name])

    def dtype(self, name: str) -> str:
        return self.files[name].dtype(self.stored[name])

    def place(self, name: str) -> tuple[Path, int]:
        """The file, and where in it the tensor begins."""
        return self.files[name].path, self.files[name].offset(self.stored[name])


class Reader:
    """Reads tensors of a folder into memory on `device`."""

    def __init__(self, folder: Folder, device: torch.device):
        self.folder = folder
        self.stage = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.open: tuple[Path, int] | None = None

    def read(self, name: str, piece: Piece) -> None:
        """One tensor into `piece.into`, a part at a time where types or layouts differ."""
        into = piece.into
        if piece.store is not None:
            piece.store(self.whole(name))
            return
        if piece.decode is not None:
            layer = name.removesuffix(f".{piece.suffix}")
            into.copy_(piece.decode(self.whole(name), lambda suffix: self.whole(f"{layer}.{suffix}")))
            return
        dtype = TORCH[self.folder.dtype(name)]
        if into.device.type == "cpu" and into.dtype == dtype and into.is_contiguous():
            self._bytes(name, 0, into.view(-1).view(torch.uint8))
            return
        rows = into.view(-1, 1) if into.dim() < 2 else into
        row_bytes = math.prod(rows.shape[1:]) * dtype.itemsize
        if row_bytes > len(self.stage):
            self.stage = torch.empty(row_bytes, dtype=torch.uint8, pin_memory=self.stage.is_pinned())
        step = max(1, len(self.stage) // max(row_bytes, 1))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            stage = self.stage[: len(part) * row_bytes]
            self._bytes(name, start * row_bytes, stage)
            part.copy_(stage.view(dtype).view(part.shape))  # waits for the device, so the buffer is free again

    def whole(self, name: str) -> torch.Tensor:
        """A tensor by itself."""
        tensor = torch.empty(self.folder.shape(name), dtype=TORCH[self.folder.dtype(name)])
        self._bytes(name, 0, tensor.view(-1).view(torch.uint8))
        return tensor

    def _bytes(self, name: str, skip: int, into: torch.Tensor) -> None:
        path, begin = self.folder.place(name)
        if self.open is None or self.open[0] != path:
            self.close()
            self.open = (path, os.open(path, os.O_RDONLY))
        at, view = begin + skip, memoryview(into.numpy())  # type: ignore[arg-type]
        while view:
            count = os.preadv(self.open[1], [view], at)
            if not count:
                raise Unsupported(f"{path} ends within tensor {name}; download or convert the folder again")
            at, view = at + count, view[count:]

    def close(self) -> None:
        if self.open is not None:
            os.close(self.open[1])
            self.open = None
