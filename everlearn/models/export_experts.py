"""Adapters on experts, between the checkpoint's form and those of others. Used by export.py (PEFT) and merge.py; no torch.

A checkpoint holds for a layer's experts the modules `<path>.experts.gate_proj`, `.up_proj` and `.down_proj`; each has an A and a B, with an
axis for the experts in front unless all of them share it. transformers keeps gate and up in one parameter, so PEFT adapts that
parameter with one pair of twice the rank: A one above the other, B block-diagonal; and it lays the experts side by side in two
dimensions: A [E·r, I] with the rank varying fastest, B [O, r·E] with the expert varying fastest. Shared matrices are repeated for it.

Axes: E experts, R rank, I and O a projection's sizes, D hidden size, F inner size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from everlearn.errors import Unsupported
from everlearn.models import tensorfile
from everlearn.models.tensorfile import Tensor, TensorFile

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
EXPERT = re.compile(rf"(?P<module>.+\.experts)\.(?P<projection>{GATE}|{UP}|{DOWN})")
ONE_EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)")
STACK = re.compile(rf"(?P<module>.+\.experts)\.(?P<stack>gate_up_proj|{UP}|{DOWN})")
ALSO_CALLED = {"w1": GATE, "w3": UP, "w2": DOWN}  # Mixtral and its kin on disk
MISTAKEN = (GATE, UP, DOWN, *ALSO_CALLED)  # names of shared experts and dense layers, too
IN_TURN = ("gpt_oss",)  # model types whose joint stack holds gate and up in alternating rows


class Source(Protocol):
    """What export.Adapter offers of itself."""

    folder: Path
    alpha: float

    @property
    def tensors(self) -> TensorFile: ...
    @property
    def paths(self) -> list[str]: ...
    def pair(self, path: str) -> tuple[np.ndarray, np.ndarray]: ...


class Sizes(NamedTuple):
    num: int
    rank: int
    size_in: int
    size_out: int


def is_expert(path: str) -> bool:
    return EXPERT.fullmatch(path) is not None


def sizes(adapter: Source, path: str) -> Sizes | None:
    """Of a module on experts; None where A and B don't fit each other."""
    a, b = (adapter.tensors.shape(f"{path}.lora_{side}") if f"{path}.lora_{side}" in adapter.tensors else () for side in "AB")
    nums = {shape[0] for shape in (a, b) if len(shape) == 3}
    if len(a) not in (2, 3) or len(b) not in (2, 3) or len(nums) != 1 or a[-2] != b[-1]:
        return None
    return Sizes(nums.pop(), a[-2], a[-1], b[-2])


def layers(adapter: Source) -> dict[str, list[str]]:
    """The projections of each experts module, in the order gate, up, down."""
    found: dict[str, list[str]] = {}
    for path in adapter.paths:
        if match := EXPERT.fullmatch(path):
            found.setdefault(match["module"], []).append(match["projection"])
    return {module: [name for name in (GATE, UP, DOWN) if name in names] for module, names in found.items()}


def is_in_turn(base: Path) -> bool:
    """Whether gate and up alternate in the joint stack of this base model."""
    config = json.loads((base / "config.json").read_text())
    return any(part.get("model_type", "").startswith(IN_TURN) for part in (config, config.get("text_config") or {}))


def stacked(adapter: Source, path: str) -> tuple[np.ndarray, np.ndarray]:
    """A [E, R, I] and B [E, O, R] float32; shared ones as views that repeat."""
    found = sizes(adapter, path)
    assert found is not None
    a, b = adapter.pair(path)
    shape_a, shape_b = (found.num, found.rank, found.size_in), (found.num, found.size_out, found.rank)
    return np.broadcast_to(a, shape_a), np.broadcast_to(b, shape_b)


def delta(adapter: Source, path: str, expert: int) -> np.ndarray:
    """What merging adds to one expert's matrix: scale · B A, float32 [O, I]."""
    a, b = adapter.pair(path)
    a_RI, b_OR = (m if m.ndim == 2 else m[expert] for m in (a, b))
    product: np.ndarray = (b_OR * np.float32(adapter.alpha / a_RI.shape[0])) @ a_RI
    return product


# ---- to PEFT ----


class PeftExperts(NamedTuple):
    """What an adapter's experts add to a PEFT folder: tensors, and entries of its configuration."""

    tensors: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]
    parameters: list[str]
    ranks: dict[str, int]
    alphas: dict[str, float]


def to_peft(adapter: Source, in_turn: bool) -> PeftExperts:
    """Names are those of PEFT's nested wrappers: the parameter that a module declares last is outermost."""
    out = PeftExperts([], [], {}, {})
    for module, names in layers(adapter).items():
        down = sizes(adapter, f"{module}.{DOWN}")
        first = sizes(adapter, f"{module}.{names[0]}")
        if down is None or first is None:
            raise Unsupported(f"{adapter.folder}: {module} lacks a matrix; the checkpoint is incomplete")
        width = len(names) - 1  # projections in the inner parameter
        rank = first.rank * width
        inner, upper = f"{module}.base_layer", names[:-1]
        out.tensors.extend(
            [
                (f"{inner}.lora_A.weight", (first.num * rank, first.size_in), partial(_joint_a, adapter, module, upper)),
                (f"{inner}.lora_B.weight", (first.size_out * width, rank * first.num), partial(_joint_b, adapter, module, upper, in_turn)),
                (f"{module}.lora_A.weight", (down.num * down.rank, down.size_in), partial(_joint_a, adapter, module, [DOWN])),
                (f"{module}.lora_B.weight", (down.size_out, down.rank * down.num), partial(_joint_b, adapter, module, [DOWN], False)),
            ]
        )
        stack = "gate_up_proj" if width == 2 else UP
        out.parameters.extend(name for name in (f"experts.{stack}", f"experts.{DOWN}") if name not in out.parameters)
        out.ranks.update({_pattern(stack): rank, _pattern(DOWN): down.rank})
        out.alphas.update({_pattern(stack): adapter.alpha * width, _pattern(DOWN): adapter.alpha})
    return out


def _pattern(stack: str) -> str:
    """Only the experts' parameter of this name: shared experts have linear layers of the same one."""
    return rf".*\.experts\.{stack}"


def _joint_a(adapter: Source, module: str, names: list[str]) -> np.ndarray:
    """[E·r, I]: of each expert, the projections' A one above the other."""
    joint = np.concatenate([stacked(adapter, f"{module}.{name}")[0] for name in names], axis=1)
    return joint.reshape(-1, joint.shape[2])


def _joint_b(adapter: Source, module: str, names: list[str], in_turn: bool) -> np.ndarray:
    """[O, r·E]: block-diagonal in the projections."""
    blocks = [stacked(adapter, f"{module}.{name}")[1] for name in names]
    num, size, rank = blocks[0].shape
    joint = np.zeros((num, size * len(blocks), rank * len(blocks)), np.float32)
    for i, block in enumerate(blocks):
        joint[:, _rows(i, len(blocks), size, in_turn), i * rank : (i + 1) * rank] = block
    return np.ascontiguousarray(joint.transpose(1, 2, 0)).reshape(size * len(blocks), -1)


def _rows(index: int, width: int, size: int, in_turn: bool) -> slice:
    """The rows of projection `index` in a joint stack of `width` of them."""
    return slice(index, None, width) if in_turn else slice(index * size, (index + 1) * size)


# ---- merging ----


def merged(adapter: Source, name: str, file: TensorFile, kind: str | None, in_turn: bool, owner: dict[str, str]) -> Tensor | None:
    """The tensor `name` of a base folder with the experts' updates in it; None where it holds no adapted experts. `owner` maps
    modules as they are called on disk to the adapter's."""
    if (match := ONE_EXPERT.fullmatch(name.removesuffix(".weight"))) is not None and match["module"] in owner:
        projection = ALSO_CALLED.get(match["projection"], match["projection"])
        path, expert = f"{owner[match['module']]}.{projection}", int(match["expert"])
        return _sum(file, name, kind, lambda: delta(adapter, path, expert)) if path in adapter.paths else None
    match = STACK.fullmatch(name.removesuffix(".weight"))
    if match is None or match["module"] not in owner:
        return None
    module, shape = owner[match["module"]], file.shape(name)
    names = [GATE, UP] if match["stack"] == "gate_up_proj" else [match["stack"]]
    first = sizes(adapter, f"{module}.{names[0]}")
    assert first is not None
    wanted = (first.num, first.size_out * len(names), first.size_in)
    turned = shape != wanted or (in_turn and shape == wanted and wanted[1] == wanted[2])
    if turned and shape != (wanted[0], wanted[2], wanted[1]):
        raise Unsupported(f"{name} has shape {list(shape)}; experts of this adapter are {list(wanted)}: it belongs to another base model")
    return _sum(file, name, kind, lambda: _stack_delta(adapter, module, names, in_turn, turned, wanted))


def _stack_delta(adapter: Source, module: str, names: list[str], in_turn: bool, turned: bool, shape: tuple[int, int, int]) -> np.ndarray:
    total = np.empty(shape, np.float32)
    for expert in range(shape[0]):
        for i, name in enumerate(names):
            total[expert, _rows(i, len(names), shape[1] // len(names), in_turn)] = delta(adapter, f"{module}.{name}", expert)
    return total.transpose(0, 2, 1) if turned else total


def _sum(file: TensorFile, name: str, kind: str | None, update: Callable[[], np.ndarray]) -> Tensor:
    target = kind or file.dtype(name)
    return Tensor(name, target, file.shape(name), lambda: tensorfile.narrow(file.float32(name) + update(), target))


def owners(adapter: Source, files: dict[str, TensorFile], spellings: Callable[[str], Iterator[str] | list[str]]) -> dict[str, str]:
    """Experts modules as the base folder calls them -> the adapter's. Raises Unsupported where the folder has none of that name."""
    there = {match["module"] for name in files for form in (ONE_EXPERT, STACK) if (match := form.fullmatch(name.removesuffix(".weight")))}
    found = {}
    for module in layers(adapter):
        candidates = [*spellings(module), *spellings(module.replace(".mlp.experts", ".block_sparse_moe.experts"))]
        on_disk = next((name for name in candidates if name in there), None)
        if on_disk is None:
            raise Unsupported(f"the base folder has no weights for {module!r}; is it the adapter's base model?")
        found[on_disk] = module
    return found
