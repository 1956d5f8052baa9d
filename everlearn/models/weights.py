"""A folder's weights, read straight into place.

First a plan is made from the model's shapes and the headers of the safetensors files: which tensor on disk fills which part of which
weight (fused experts are assembled from one tensor for each expert and projection; other names and forms are conversion.py's). What is
missing, too much, of another shape or quantised in a way that isn't read is refused here, by name, before memory is taken. Then memory
is taken, once, and the files are read in their own order. What needs no conversion goes from the file into the weight; the rest passes
through one small buffer. Nothing is mapped into memory. This module knows nothing of adapters, and of formats only what quant.py says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from everlearn.errors import Unsupported
from everlearn.models import quant_fp8, quant_int4, quant_nf4
from everlearn.models.conversion import Conversion, conversions_of, new_names
from everlearn.models.lora import kind_of
from everlearn.models.quant import PackedLinear, PackedWeight, Piece, Scheme, pack_into
from everlearn.models.reading import TORCH, Folder, Reader

FLOATS = ("F64", "F32", "F16", "BF16")
SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "compressed-tensors": quant_int4.read_scheme,
    "fp8": quant_fp8.read_scheme,
    "bitsandbytes": quant_nf4.read_scheme,
}
# How weights of an unquantised folder are packed while they are read, where the owner asks for it.
PACKING: dict[str, Scheme] = {
    "int4": quant_int4.Int4Scheme(32, "INT4"),
    "fp8": quant_fp8.Fp8Scheme((128, 128), "FP8"),
    "nf4": quant_nf4.Nf4Scheme(False, "NF4"),
}
FRESH = {"weight_scale": torch.bfloat16, "weight_scale_inv": torch.float32}  # types of scales that are made here
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
    """One weight of the model and what fills it: the tensor `source` as it is, or `layers`, or, where it has neither, a conversion."""

    names: list[str]  # more than one where weights are tied
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str = ""
    layers: list[Layer] = field(default_factory=list)
    packed: bool = False
    packing: Scheme | None = None  # it is packed while it is read
    buffer: torch.Tensor | None = None
    transposed: bool = False


@dataclass
class Plan:
    """`targets` with their sources, those of `conversions` among them; `missing` weights of the model and `extra` tensors of the folder
    that nothing explains."""

    targets: list[Target]
    missing: dict[str, Target]
    extra: list[str]
    problems: list[str]
    conversions: list[Conversion] = field(default_factory=list)


def load_weights(
    name: str,
    path: Path,
    build: Callable[[], nn.Module],
    scheme: Scheme | None,
    device: torch.device,
    dtype: torch.dtype,
    packing: Scheme | None = None,
) -> nn.Module:
    """The model that `build` makes, with the folder's weights in it, those of linear layers and experts packed by `packing`. Raises
    Unsupported where the folder doesn't hold exactly what the model needs."""
    folder = Folder(path)
    with without_memory():
        model = build()
    plan = make_plan(model, folder, scheme, dtype, packing)
    if plan.missing and plan.extra:  # its makers may have names of their own
        folder.rename(new_names(model, folder.files))
        plan = make_plan(model, folder, scheme, dtype, packing)
        _add_conversions(plan, model, folder, packing)
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more)" if len(plan.problems) > 1 else ""
        raise Unsupported(
            f"base model {name!r} can't be loaded from {path}: {plan.problems[0]}{more}; download or convert the folder again"
        )
    _refuse_rest(name, path, plan)
    if packing is not None and not any(target.packed or target.packing for target in plan.targets):
        raise Unsupported(f"base model {name!r} has no layers that {packing.name} fits; set engine.weights to 'stored'")
    fill(model, plan, folder, scheme, device, dtype)
    return model


def _refuse_rest(name: str, path: Path, plan: Plan) -> None:
    beside = f", and holds {len(plan.extra)} that it has no place for (the first: {plan.extra[0]})" if plan.extra else ""
    if plan.missing:
        raise Unsupported(
            f"base model {name!r}: {path} lacks {len(plan.missing)} of its tensors (the first: {min(plan.missing)}){beside}; "
            "download or convert the folder again, and check that every *.safetensors file is there"
        )
    if plan.extra:
        raise Unsupported(
            f"base model {name!r}: {path} holds {len(plan.extra)} tensors that the model has no place for (the first: {plan.extra[0]}); "
            "its config.json belongs to another model, or to another version of transformers"
        )


def make_plan(model: nn.Module, folder: Folder, scheme: Scheme | None, dtype: torch.dtype, packing: Scheme | None = None) -> Plan:
    """Which tensors of `folder` fill which weights of `model` (whose parameters have no memory yet)."""
    marker = scheme.marker if scheme else None
    targets, problems = [], []
    missing: dict[str, Target] = {}
    used: set[str] = set()
    for target in _targets(model, dtype):
        _find(target, folder, marker)
        if not target.source and not target.layers:
            missing[target.names[0]] = target
            continue
        if packing is not None and not target.packed and _can_be_packed(model, target, packing):
            target.packing = packing
        targets.append(target)
        used.update([name for name in target.names if name in folder] if target.source else ())
        try:
            used.update(_check(target, folder, scheme))
        except Unsupported as error:
            problems.append(error.message)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$", _beyond(model)]
    extra = [name for name in folder.files if name not in used and not any(re.search(pattern, name) for pattern in ignored)]
    return Plan(targets, missing, sorted(extra), problems)


def _add_conversions(plan: Plan, model: nn.Module, folder: Folder, packing: Scheme | None) -> None:
    """Explains what is missing by what is too much, where transformers knows how the one becomes the other."""
    for conversion in conversions_of(model, plan.extra):
        try:
            made = conversion.run(model, lambda name: torch.empty(folder.shape(name), device="meta"))
        except Unsupported as error:
            plan.problems.append(error.message)
            continue
        if not set(made) <= set(plan.missing):
            continue
        for name, tensor in made.items():
            target = plan.missing.pop(name)
            if tuple(tensor.shape) != target.shape:
                what = f"{name}, made from {conversion.sources[0][0]},"
                plan.problems.append(f"{what} would have the shape {list(tensor.shape)}, the model's is {list(target.shape)}")
            if packing is not None and _can_be_packed(model, target, packing):
                target.packing = packing
            plan.targets.append(target)
        plan.conversions.append(conversion)
        sources = {name for name, _ in conversion.sources}
        plan.extra = [name for name in plan.extra if name not in sources]


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


def _can_be_packed(model: nn.Module, target: Target, packing: Scheme) -> bool:
    """Layers that adapters may go on, and fused experts whose matrices are [output, input]; head, routers and towers stay as they are."""
    path, _, last = target.names[0].rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        wanted = last == "weight" and kind_of(path) in ("attn", "mlp") and "vision" not in path
    else:
        wanted = last in FUSED and len(target.shape) == 3 and not getattr(module, "is_transposed", False)
    try:
        return wanted and len(target.names) == 1 and bool(packing.stored(target.shape[-2:]))
    except Unsupported:  # a size that the format has no groups for
        return False


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
    made: dict[str, Piece] = {}
    for target in plan.targets:
        if target.packing is not None:
            found = _place_and_pack(model, target, target.packing, device, dtype)
        elif target.packed:
            assert scheme is not None
            found = _place_packed(model, target, folder, scheme, device, dtype)
        else:
            found = _place(model, target, device)
        if target.source or target.layers:
            reads += found
        else:
            made[target.names[0]] = found[0][1]
    with closing(Reader(folder, device)) as reader:
        for name, piece in sorted(reads, key=lambda read: folder.place(read[0])):
            reader.read(name, piece)
        for conversion in plan.conversions:
            for name, tensor in conversion.run(model, reader.whole).items():
                store = made[name].store or made[name].into.copy_
                store(tensor)
    for module in model.modules():  # what was not on disk: tables that modules compute for themselves
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _place(model: nn.Module, target: Target, device: torch.device) -> list[tuple[str, Piece]]:
    tensor = torch.empty(target.shape, dtype=target.dtype, device=device)
    value = tensor if target.buffer is not None else nn.Parameter(tensor, requires_grad=False)
    for name in target.names:
        _assign(model, name, value)
    if not target.layers:
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
    _install(model, target, weight)
    return [
        (f"{layer.path}.{piece.suffix}", piece)
        for layer in target.layers
        for piece in scheme.pieces(weight, layer.expert, layer.first, layer.num)
    ]


def _place_and_pack(model: nn.Module, target: Target, packing: Scheme, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Piece]]:
    rows = [layer.num for layer in target.layers if layer.expert in (None, 0)] or [target.shape[-2]]
    weight = packing.empty(target.shape, rows, dtype, device, FRESH)
    _install(model, target, weight)

    def store(expert: int | None, first: int, dense: torch.Tensor) -> None:
        if dense.dim() == 3:  # all experts of a layer
            for each, matrix in enumerate(dense.transpose(1, 2) if target.transposed else dense):
                store(each, 0, matrix)
        else:
            pack_into(packing, weight, expert, first, dense.to(device))

    layers = [(f"{layer.path}.weight", layer.expert, layer.first) for layer in target.layers] or [(target.source, None, 0)]
    return [(name, Piece("", next(weight.buffers()), store=partial(store, expert, first))) for name, expert, first in layers]


def _install(model: nn.Module, target: Target, weight: PackedWeight) -> None:
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


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    (module._buffers if last in module._buffers else module._parameters)[last] = value  # type: ignore[assignment]
