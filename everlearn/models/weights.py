"""A folder's weights, read straight into place.

First a plan is made from the model's shapes and the headers of the safetensors files: which tensor on disk fills which part of which
weight (fused experts are assembled from one tensor for each expert and projection). What is missing, too much, of another shape
or quantised in a way that isn't read is refused here, by name, before memory is taken. Then memory is taken, once, and the files
are read in their own order. What needs no conversion goes from the file into the weight; the rest passes through one small buffer.
Nothing is mapped into memory. This module knows nothing of adapters, and of formats only what quant.py says.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models import quant_fp8, quant_int4, quant_nf4
from everlearn.models.export import weight_files
from everlearn.models.quant import PackedLinear, Piece, Scheme
from everlearn.models.tensorfile import TensorFile

STAGE_BYTES = 8 * 2**20
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "compressed-tensors": quant_int4.read_scheme,
    "fp8": quant_fp8.read_scheme,
    "bitsandbytes": quant_nf4.read_scheme,
}
# The layers that a fused tensor is made of, where a folder holds each expert for itself.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def read_scheme(config: dict[str, Any]) -> Scheme | None:
    """How config.json says that the folder is quantised; None if it isn't. Raises Unsupported for what isn't read."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") or ("bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else None)
    if method not in SCHEMES:
        known = "INT4 (compressed-tensors, pack-quantized), FP8 in blocks and NF4 (bitsandbytes)"
        raise Unsupported(f"a quantisation of the kind {method!r} isn't read; {known} are: use such a folder or the unquantised model")
    return SCHEMES[method](found)


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters of modules that are built inside have a shape and no memory; buffers (tables of the rotary embedding) are real."""

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None or parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class Layer(NamedTuple):
    """Where a layer of the folder goes: the rows [first, first + num) of a weight, or of one expert of it."""

    path: str
    expert: int | None
    first: int
    num: int


@dataclass
class Target:
    """One weight of the model and what fills it: the tensor `source` as it is, or `layers`."""

    names: list[str]  # more than one where weights are tied
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str = ""
    layers: list[Layer] = field(default_factory=list)
    packed: bool = False
    buffer: torch.Tensor | None = None
    transposed: bool = False


@dataclass
class Plan:
    """`targets` with their sources; `missing` weights of the model and `extra` tensors of the folder that nothing explains."""

    targets: list[Target]
    missing: list[str]
    extra: list[str]
    problems: list[str]


class Folder:
    """The tensors of a model folder by name."""

    def __init__(self, path: Path):
        try:
            self.files: dict[str, TensorFile] = weight_files(path)
        except (InvalidRequest, OSError, ValueError, KeyError) as error:
            raise Unsupported(f"{path} can't be loaded: {error}; download or convert the folder again") from error
        index = path / "model.safetensors.index.json"
        listed = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
        if lost := sorted(set(listed) - set(self.files)):
            raise Unsupported(
                f"{path} lacks {len(lost)} of the tensors that its index lists (the first: {lost[0]} in {listed[lost[0]]}); "
                "download or convert the folder again, and check that every *.safetensors file is there"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].shape(name)

    def dtype(self, name: str) -> str:
        return self.files[name].dtype(name)


def load_weights(
    name: str, path: Path, build: Callable[[], nn.Module], scheme: Scheme | None, device: torch.device, dtype: torch.dtype
) -> nn.Module | None:
    """The model that `build` makes, with the folder's weights in it. Raises Unsupported where the folder doesn't hold exactly what the
    model needs; None where tensors of an unquantised folder have names that only transformers' own conversions may explain."""
    folder = Folder(path)
    with without_memory():
        model = build()
    plan = make_plan(model, folder, scheme, dtype)
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more)" if len(plan.problems) > 1 else ""
        raise Unsupported(
            f"base model {name!r} can't be loaded from {path}: {plan.problems[0]}{more}; download or convert the folder again"
        )
    if plan.missing and plan.extra and scheme is None:
        return None
    if plan.missing:
        raise Unsupported(
            f"base model {name!r}: {path} lacks {len(plan.missing)} of its tensors (the first: {plan.missing[0]}); "
            "download or convert the folder again, and check that every *.safetensors file is there"
        )
    if plan.extra:
        raise Unsupported(
            f"base model {name!r}: {path} holds {len(plan.extra)} tensors that the model has no place for (the first: {plan.extra[0]}); "
            "its config.json belongs to another model, or to another version of transformers"
        )
    fill(model, plan, folder, scheme, device, dtype)
    return model


def make_plan(model: nn.Module, folder: Folder, scheme: Scheme | None, dtype: torch.dtype) -> Plan:
    """Which tensors of `folder` fill which weights of `model` (whose parameters have no memory yet)."""
    marker = scheme.marker if scheme else None
    targets, missing, problems = [], [], []
    used: set[str] = set()
    for target in _targets(model, dtype):
        _find(target, folder, marker)
        if not target.source and not target.layers:
            missing.append(target.names[0])
            continue
        targets.append(target)
        used.update([name for name in target.names if name in folder] if target.source else ())
        try:
            used.update(_check(target, folder, scheme))
        except Unsupported as error:
            problems.append(error.message)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$", _beyond(model)]
    extra = [name for name in folder.files if name not in used and not any(re.search(pattern, name) for pattern in ignored)]
    return Plan(targets, sorted(missing), sorted(extra), problems)


def _beyond(model: nn.Module) -> str:
    """Layers after the last: DeepSeek's folders bring layers that predict further tokens, which nothing here runs."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)  # type: ignore[union-attr, operator]
    return rf"\.layers\.{count}\." if count else r"(?!)"


def _targets(model: nn.Module, dtype: torch.dtype) -> list[Target]:
    exact = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    found: dict[int, Target] = {}
    kept = model.state_dict(keep_vars=True)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) in found:
            found[id(tensor)].names.append(name)
        elif name in kept:
            is_buffer = not isinstance(tensor, nn.Parameter)
            kind = tensor.dtype if is_buffer else dtype
            kind = torch.float32 if any(part in name.split(".") for part in exact) and kind.is_floating_point else kind
            found[id(tensor)] = Target([name], tuple(tensor.shape), kind, buffer=tensor if is_buffer else None)
    return list(found.values())


def _find(target: Target, folder: Folder, marker: str | None) -> None:
    """Fills in `source`, or `layers` and `packed`."""
    for name in target.names:
        path, _, last = name.rpartition(".")
        if marker and last == "weight" and len(target.shape) == 2 and f"{path}.{marker}" in folder:
            target.layers, target.packed = [Layer(path, None, 0, target.shape[0])], True
            return
        if name in folder:
            target.source = name
            return
        if last not in FUSED or len(target.shape) != 3:
            continue
        first = f"{path}.0.{FUSED[last][0]}"
        if f"{first}.weight" in folder or (marker and f"{first}.{marker}" in folder):
            rows = target.shape[1] // len(FUSED[last])
            target.layers = [
                Layer(f"{path}.{expert}.{layer}", expert, at * rows, rows)
                for expert in range(target.shape[0])
                for at, layer in enumerate(FUSED[last])
            ]
            target.packed = bool(marker) and f"{first}.{marker}" in folder
            return


def _check(target: Target, folder: Folder, scheme: Scheme | None) -> list[str]:
    """The tensors that `target` takes from the folder; raises Unsupported where one is missing or doesn't fit."""
    if target.source:
        on_disk = folder.shape(target.source)
        # Some families keep fused experts as [experts, input, output]; transformers turns them too.
        target.transposed = len(on_disk) == 3 and on_disk != target.shape and (on_disk[0], on_disk[2], on_disk[1]) == target.shape
        _fits(folder, target.source, on_disk if target.transposed else target.shape, FLOATS if target.dtype.is_floating_point else ())
        return [target.source]
    names = []
    for layer in target.layers:
        shape = (layer.num, target.shape[-1])
        wanted = scheme.stored(shape) if scheme and target.packed else {"weight": (shape, FLOATS)}
        for suffix, (stored, types) in wanted.items():
            _fits(folder, f"{layer.path}.{suffix}", stored, types)
            names.append(f"{layer.path}.{suffix}")
    return names


def _fits(folder: Folder, name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
    if name not in folder:
        raise Unsupported(f"tensor {name} is missing")
    if shape != (-1,) and folder.shape(name) != shape:
        raise Unsupported(f"tensor {name} has the shape {list(folder.shape(name))}, the model's is {list(shape)}")
    if (types and folder.dtype(name) not in types) or folder.dtype(name) not in TORCH:
        raise Unsupported(f"tensor {name} is of type {folder.dtype(name)}; {', '.join(types or TORCH)} can be read there")


# ---- reading ----


def fill(model: nn.Module, plan: Plan, folder: Folder, scheme: Scheme | None, device: torch.device, dtype: torch.dtype) -> None:
    """Takes the memory of every weight on `device` and reads the folder into it."""
    reads: list[tuple[str, Piece]] = []
    for target in plan.targets:
        if target.packed:
            assert scheme is not None
            reads += _place_packed(model, target, folder, scheme, device, dtype)
        else:
            reads += _place(model, target, device)
    reader = Reader(folder, device)
    for name, piece in sorted(reads, key=lambda read: (str(folder.files[read[0]].path), folder.files[read[0]].offset(read[0]))):
        reader.read(name, piece)
    for module in model.modules():  # what was not on disk: tables that modules compute for themselves
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _place(model: nn.Module, target: Target, device: torch.device) -> list[tuple[str, Piece]]:
    tensor = torch.empty(target.shape, dtype=target.dtype, device=device)
    value = tensor if target.buffer is not None else nn.Parameter(tensor, requires_grad=False)
    for name in target.names:
        _assign(model, name, value)
    if target.source:
        return [(target.source, Piece("", tensor.transpose(1, 2) if target.transposed else tensor))]
    reads = []
    for layer in target.layers:
        whole = tensor if layer.expert is None else tensor[layer.expert]
        reads.append((f"{layer.path}.weight", Piece("", whole[layer.first : layer.first + layer.num])))
    return reads


def _place_packed(
    model: nn.Module, target: Target, folder: Folder, scheme: Scheme, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, Piece]]:
    one = [layer for layer in target.layers if layer.expert in (None, 0)]
    stored = scheme.stored((one[0].num, target.shape[-1]))
    types = {suffix: TORCH[folder.dtype(f"{one[0].path}.{suffix}")] for suffix in stored}
    weight = scheme.empty(target.shape, [layer.num for layer in one], dtype, device, types)
    for name in target.names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(weight, module.bias))
        elif len(target.shape) == 3:
            del module._parameters[last]
            setattr(module, last, weight)
        else:
            raise Unsupported(f"{name} is quantised, and a {type(module).__name__} can't be; use the unquantised model")
    return [
        (f"{layer.path}.{piece.suffix}", piece)
        for layer in target.layers
        for piece in scheme.pieces(weight, layer.expert, layer.first, layer.num)
    ]


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    (module._buffers if last in module._buffers else module._parameters)[last] = value  # type: ignore[assignment]


class Reader:
    """Reads tensors of a folder into memory on `device`."""

    def __init__(self, folder: Folder, device: torch.device):
        self.folder = folder
        self.stage = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.open: tuple[Path, int] | None = None

    def read(self, name: str, piece: Piece) -> None:
        """One tensor into `piece.into`, a part at a time where types or layouts differ."""
        into = piece.into
        if piece.decode is not None:
            layer = name.removesuffix(f".{piece.suffix}")
            into.copy_(piece.decode(self.whole(name), lambda suffix: self.whole(f"{layer}.{suffix}")))
            return
        dtype, file = TORCH[self.folder.dtype(name)], self.folder.files[name]
        if into.device.type == "cpu" and into.dtype == dtype and into.is_contiguous():
            self._bytes(file, name, 0, into.view(-1).view(torch.uint8))
            return
        rows = into.view(-1, 1) if into.dim() < 2 else into
        row_bytes = math.prod(rows.shape[1:]) * dtype.itemsize
        if row_bytes > len(self.stage):
            self.stage = torch.empty(row_bytes, dtype=torch.uint8, pin_memory=self.stage.is_pinned())
        step = max(1, len(self.stage) // max(row_bytes, 1))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            stage = self.stage[: len(part) * row_bytes]
            self._bytes(file, name, start * row_bytes, stage)
            part.copy_(stage.view(dtype).view(part.shape))  # waits for the device, so the buffer is free again

    def whole(self, name: str) -> torch.Tensor:
        """A small tensor, by itself."""
        tensor = torch.empty(self.folder.shape(name), dtype=TORCH[self.folder.dtype(name)])
        self._bytes(self.folder.files[name], name, 0, tensor.view(-1).view(torch.uint8))
        return tensor

    def _bytes(self, file: TensorFile, name: str, skip: int, into: torch.Tensor) -> None:
        if self.open is None or self.open[0] != file.path:
            self.close()
            self.open = (file.path, os.open(file.path, os.O_RDONLY))
        at, view = file.offset(name) + skip, memoryview(into.numpy())  # type: ignore[arg-type]
        while view:
            count = os.preadv(self.open[1], [view], at)
            if not count:
                raise Unsupported(f"{file.path} ends within tensor {name}; download or convert the folder again")
            at, view = at + count, view[count:]

    def close(self) -> None:
        if self.open is not None:
            os.close(self.open[1])
            self.open = None
