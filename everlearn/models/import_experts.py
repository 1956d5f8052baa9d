"""Adapters on experts out of a PEFT folder: those of PEFT's target_parameters, and those that name every expert as a module.

The layout is found, not asked for: what is the same for all experts is shared, a rank below the others' is one divided among the experts
of a token. Imports torch, because the model's outline says which parameter lies where.

Axes: E experts, R rank, I and O a projection's sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models.architecture import outline, read_config
from everlearn.models.experts import LoraExperts, expert_rank, install_experts, top_k_of
from everlearn.models.export_experts import ALSO_CALLED, DOWN, GATE, ONE_EXPERT, UP
from everlearn.models.tensorfile import Tensor, TensorFile

Pair = tuple[np.ndarray, np.ndarray]  # A [E, R, I], B [E, O, R]


class Found(NamedTuple):
    """`pairs` by path, B scaled so that alpha / rank is its factor; `names` are the file's tensors that they came from."""

    layout: str
    rank: int
    pairs: dict[str, Pair]
    names: set[str]
    missing: list[str]


def expert_layers(base: Path) -> dict[str, LoraExperts]:
    """The experts modules of a base model, by path, without its weights."""
    config = read_config(base)
    model: Any = outline(config)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return install_experts(decoder, prefix, top_k_of(config.get_text_config()))


def from_peft(folder: Path, given: TensorFile, config: Mapping[str, Any], base: Path, prefix: str, alpha: float, hint: str) -> Found | None:
    """None where the folder adapts no experts. `alpha` is that of the checkpoint to be; `hint` decides between equal layouts."""
    if not any(".experts." in name for name in given.names()):
        return None
    layers = expert_layers(base)
    if not layers:
        first = next(name for name in given.names() if ".experts." in name)
        raise InvalidRequest(f"{folder} adapts experts ({first}), and the base in {base} has none; name the adapter's own base model")
    stacks, names = _stacks(folder, given, config, layers, prefix)
    pairs: dict[str, Pair] = {}
    for module, found in stacks.items():
        pairs |= {f"{module}.{name}": pair for name, pair in _projections(folder, layers[module], found).items()}
    if not pairs:
        known = f"{next(iter(layers))} and {len(layers) - 1} more" if len(layers) > 1 else next(iter(layers))
        first = next(name for name in given.names() if ".experts." in name)
        raise Unsupported(f"{folder}: {first} belongs to none of the base's experts ({known}); name the adapter's own base model")
    ranks = {a.shape[1] for a, _ in pairs.values()}
    if len(ranks) != 1:
        raise Unsupported(f"{folder}: experts have matrices of ranks {sorted(ranks)}; a checkpoint keeps one rank for all of them")
    own, top_k = ranks.pop(), next(iter(layers.values())).top_k
    only = all(".experts." in name for name in given.names())
    layout, rank = _layout(folder, pairs, own, own if only and hint != "rank_split" else int(config["r"]), top_k, hint)
    for path, (a, b) in pairs.items():
        factor = _scale(config, path, own, a.shape[1]) / (alpha / own)
        pairs[path] = (a, b if factor == 1.0 else b * np.float32(factor))
    missing = [f"{module}.{name}" for module, layer in layers.items() for name in layer.columns | {DOWN: None}]
    return Found(layout, rank, pairs, names, [path for path in missing if path not in pairs])


def tensors_of(found: Found, base: Path, seed: int, fresh: Any) -> dict[str, Tensor]:
    """The checkpoint's tensors on experts; modules that the adapter lacked get a fresh A and B = 0."""
    shared = found.layout == "shared_outer"
    shapes = {path: shape for layer in expert_layers(base).values() for path, shape in layer.shapes(found.layout, found.rank).items()}
    out: dict[str, Tensor] = {}
    for path, shape in shapes.items():
        for side, wanted in zip("AB", shape, strict=True):
            name = f"{path}.lora_{side}"
            if path in found.pairs:
                matrix = found.pairs[path]["AB".index(side)]
                value = matrix[0] if shared and len(wanted) == 2 else matrix
                out[name] = Tensor(name, "F32", wanted, partial(np.ascontiguousarray, value, np.float32))
            elif side == "A":
                out[name] = Tensor(name, "F32", wanted, partial(_fresh, fresh, seed, path, wanted))
            else:
                out[name] = Tensor(name, "F32", wanted, partial(np.zeros, wanted, np.float32))
    return out


def _fresh(fresh: Any, seed: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
    made: np.ndarray = fresh(seed, path, math.prod(shape[:-1]), shape[-1])
    return made.reshape(shape)


def _stacks(
    folder: Path, given: TensorFile, config: Mapping[str, Any], layers: dict[str, LoraExperts], prefix: str
) -> tuple[dict[str, dict[str, Pair]], set[str]]:
    """For each module, the pairs of its parameters as they are in the folder; and the names of the tensors read."""
    stacks: dict[str, dict[str, Pair]] = {}
    names: set[str] = set()
    targets = list(config.get("target_parameters") or ())
    for module, layer in layers.items():
        declared = [name for name, _ in layer.inner.named_parameters(recurse=False)]
        wrapped = [name for name in declared if any(f"{module}.{name}".endswith(f".{target}") for target in targets)]
        if odd := [name for name in wrapped if name not in ("gate_up_proj", UP, DOWN)]:
            raise Unsupported(f"{folder}: target_parameters adapts {odd[0]!r} of {module}, which a checkpoint can't express")
        for depth, name in enumerate(reversed(wrapped)):  # the parameter declared last is the outermost wrapper
            at = f"{prefix}{module}" + ".base_layer" * depth
            pair = [f"{at}.lora_{side}.weight" for side in "AB"]
            if all(part in given for part in pair):
                stacks.setdefault(module, {})[name] = _unfold(folder, given, pair, layer.num_experts)
                names.update(pair)
    _single(folder, given, layers, prefix, stacks, names)
    return stacks, names


def _unfold(folder: Path, given: TensorFile, names: list[str], num: int) -> Pair:
    a, b = (given.float32(name) for name in names)
    if a.shape[0] % num or a.shape[0] != b.shape[1]:
        raise InvalidRequest(f"{folder}: {names[0]} has shape {list(a.shape)} beside B {list(b.shape)}; the base has {num} experts")
    return a.reshape(num, -1, a.shape[1]), b.reshape(b.shape[0], -1, num).transpose(2, 0, 1)


def _single(
    folder: Path, given: TensorFile, layers: dict[str, LoraExperts], prefix: str, stacks: dict[str, dict[str, Pair]], names: set[str]
) -> None:
    """Modules of one expert each (experts.3.up_proj): stacked by projection; an expert without one gets zeros."""
    matrices: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for name in given.names():
        path, _, side = name.removeprefix(prefix).removesuffix(".weight").rpartition(".lora_")
        match = ONE_EXPERT.fullmatch(path)
        module = match["module"].replace(".block_sparse_moe.", ".mlp.") if match else ""
        if match is None or module not in layers:
            continue
        projection = ALSO_CALLED.get(match["projection"], match["projection"])
        matrices.setdefault((module, projection), {})[int(match["expert"]), side] = name
        names.add(name)
    for (module, projection), found in matrices.items():
        num = layers[module].num_experts
        sides = []
        for side in "AB":
            shapes = {given.shape(name) for (_, own), name in found.items() if own == side}
            if len(shapes) != 1:
                raise InvalidRequest(
                    f"{folder}: the matrices {side} of {module}.{projection} have shapes {sorted(shapes)}; they must be one"
                )
            zeros = np.zeros(shapes.pop(), np.float32)
            sides.append(np.stack([given.float32(found[e, side]) if (e, side) in found else zeros for e in range(num)]))
        stacks.setdefault(module, {})[projection] = (sides[0], sides[1])


def _projections(folder: Path, layer: LoraExperts, stacks: dict[str, Pair]) -> dict[str, Pair]:
    """A pair for each projection: the joint parameter's comes apart."""
    pairs = {name: pair for name, pair in stacks.items() if name != "gate_up_proj"}
    sizes = {GATE: (layer.size, layer.hidden), UP: (layer.size, layer.hidden), DOWN: (layer.hidden, layer.size)}
    if (joint := stacks.get("gate_up_proj")) is not None:
        a, b = joint
        half = a.shape[1] // 2
        parts = {name: b[:, columns] for name, columns in layer.columns.items()}
        apart = a.shape[1] % 2 == 0 and not parts[GATE][..., half:].any() and not parts[UP][..., :half].any()
        beside = {pair[0].shape[1] for pair in pairs.values()}
        if apart and beside != {a.shape[1]}:
            pairs |= {GATE: (a[:, :half], parts[GATE][..., :half]), UP: (a[:, half:], parts[UP][..., half:])}
        else:
            pairs |= {name: (a, part) for name, part in parts.items()}
    for name, (a, b) in pairs.items():
        if name not in sizes or (b.shape[1], a.shape[2]) != sizes[name] or a.shape[1] != b.shape[2]:
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise InvalidRequest(f"{folder}: {layer.path}.{name} has {shapes}; the base needs {list(sizes.get(name, ()))}")
    return pairs


def _layout(folder: Path, pairs: dict[str, Pair], own: int, rank: int, top_k: int, hint: str) -> tuple[str, int]:
    """The layout, and the rank that the checkpoint states."""
    split = expert_rank("rank_split", rank, top_k)
    if hint == "rank_split" and own == split:
        return hint, rank
    if own == rank:
        outer = [b if path.endswith(DOWN) else a for path, (a, b) in pairs.items()]
        return ("shared_outer" if all((m == m[:1]).all() for m in outer) else "per_expert"), rank
    if own == split:
        return "rank_split", rank
    raise Unsupported(
        f"{folder}: experts have rank {own}, other layers {rank}; a checkpoint takes {rank} or {split} (rank / experts of a token)"
    )


def _scale(config: Mapping[str, Any], path: str, own: int, rank: int) -> float:
    """PEFT's factor of the parameter that holds this projection."""
    stack = "gate_up_proj" if path.endswith((GATE, UP)) else DOWN
    key = f"{path.rpartition('.')[0]}.{stack}"
    alpha = _pattern(config.get("alpha_pattern"), key, path, config["lora_alpha"])
    stored = _pattern(config.get("rank_pattern"), key, path, config["r"])
    return float(alpha) / (math.sqrt(stored) if config.get("use_rslora") else stored)


def _pattern(patterns: Mapping[str, Any] | None, key: str, path: str, default: Any) -> Any:
    names = (key, path)
    return next((value for pattern, value in (patterns or {}).items() if any(re.match(rf"(.*\.)?({pattern})$", n) for n in names)), default)


def has_pattern(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT's patterns give a linear layer a rank or an alpha of its own."""
    return any(_pattern(config.get(key), path, path, None) is not None for key in ("rank_pattern", "alpha_pattern"))
