"""Routes of tokens through experts, between requests and the model: what a sample records, what a datum replays.

A route is an int32 [L, K] for each position: the experts of the token at that position in each layer that has experts. A sample's
record covers every position but the last, which is never computed; positions that came from the prefix cache are UNKNOWN. A datum
brings a route for each of its tokens; a token with an unknown one takes its present route, and has no part in the loss.

Axes: T tokens, L layers with experts, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.losses.spec import SILENCED
from everlearn.models.load import BaseModel
from everlearn.models.routing import UNKNOWN, Watch, balance
from everlearn.types import Array, Datum

if TYPE_CHECKING:
    from everlearn.engine.paged import Chunk

# The input that multiplies a token's whole loss: where it is 0 the token has no gradient, but for terms (losses/terms.py).
ZERO_WITHOUT = {
    "cross_entropy": "weights",
    "importance_sampling": "advantages",
    "ppo": "advantages",
    "cispo": "advantages",
    "gspo": "advantages",
    "stable_reinforce": "sampled_mask",
    "mirror_descent": "sequence_ratio_mask",
}
ALSO_ZERO = {"weights", "sequence_ratio_mask"}  # text to imitate, and a token's part in the ratio of its sequence


class Shape(NamedTuple):
    layers: int
    width: int
    experts: int


def shape_of(base: BaseModel) -> Shape:
    """Raises InvalidRequest where the base model has no experts."""
    modules = list(base.expert_modules.values())
    if not modules:
        raise InvalidRequest(f"{base.info.name} has no experts, so there are no routes; leave routing out", param="routing")
    return Shape(len(modules), modules[0].top_k, modules[0].num_experts)


# ---- what a sample records ----


def watch_of(chunks: Sequence[Chunk]) -> Watch | None:
    """None where no request of the step wants its routes."""
    return Watch(records=True) if any(chunk.sequence.request.params.routing for chunk in chunks) else None


def keep(chunks: Sequence[Chunk], stops: Sequence[int], watch: Watch | None) -> None:
    """Hands each sequence that wants them the routes of its rows."""
    if watch is None:
        return
    ids_TLK = watch.ids().cpu().numpy()
    for chunk, stop in zip(chunks, stops, strict=True):
        if chunk.sequence.request.params.routing:
            chunk.sequence.routes.append((chunk.start, ids_TLK[stop - (chunk.stop - chunk.start) : stop].copy()))


def recorded(routes: list[tuple[int, np.ndarray]], num_tokens: int) -> Array | None:
    """int32 [num_tokens - 1, L, K]; None where nothing was computed."""
    if not routes:
        return None
    ids = np.full((num_tokens - 1, *routes[0][1].shape[1:]), UNKNOWN, np.int32)
    for start, part in routes:
        ids[start : start + len(part)] = part[: len(ids) - start]
    return Array.of(ids)


# ---- what a datum replays ----


class Routed:
    """What a request's tokens met, and how many of its loss's tokens followed the routes that they brought."""

    def __init__(self) -> None:
        self.counts_LE: torch.Tensor | None = None
        self.num_replayed = self.num_silenced = 0

    def add(self, counts_LE: torch.Tensor) -> None:
        self.counts_LE = counts_LE.cpu() if self.counts_LE is None else self.counts_LE + counts_LE.cpu()

    def replayed(self, replayed: int, silenced: int) -> None:
        self.num_replayed += replayed
        self.num_silenced += silenced

    def metrics(self) -> dict[str, float]:
        found = balance(self.counts_LE) if self.counts_LE is not None else {}
        if self.num_replayed or self.num_silenced:
            found |= {"routing_replayed_tokens:sum": float(self.num_replayed), "routing_masked_tokens:sum": float(self.num_silenced)}
        return found


def check(base: BaseModel, data: Sequence[Datum], loss_fn: str) -> None:
    """Raises InvalidRequest or Unsupported for routes that this model, datum or loss can't take."""
    for i, datum in enumerate(data):
        if datum.routing is None:
            continue
        shape, param = shape_of(base), f"data[{i}].routing"
        wanted = [datum.tokens.shape[0], shape.layers, shape.width]
        if int(np.prod(datum.routing.shape)) != int(np.prod(wanted)) or datum.routing.shape[0] != wanted[0]:
            raise InvalidRequest(f"{param} has shape {datum.routing.shape}; {base.info.name} needs {wanted} for this datum", param=param)
        ids = datum.routing.numpy()
        if ids.dtype.kind != "i" or ids.min() < UNKNOWN or ids.max() >= shape.experts:
            rule = f"experts are numbered 0 to {shape.experts - 1}, and {UNKNOWN} stands for none known"
            raise InvalidRequest(f"{param} holds {ids.min()} to {ids.max()} of type {ids.dtype}; {rule}", param=param)
        if ZERO_WITHOUT.get(loss_fn) not in datum.inputs:
            raise Unsupported(f"{param}: tokens of {loss_fn} can't be left out of the loss here, so routes can't be replayed", param=param)


def replay(base: BaseModel, data: Sequence[Datum]) -> Watch | None:
    """What a training row wants of its experts: that they are watched, and that they follow the routes that its datums bring."""
    if not base.expert_modules:
        return None
    if all(datum.routing is None for datum in data):
        return Watch(records=True)
    shape = shape_of(base)
    rows = [_ids(datum, shape) for datum in data]
    return Watch(torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(base.device), records=True)


def _ids(datum: Datum, shape: Shape) -> np.ndarray:
    wanted = (datum.tokens.shape[0], shape.layers, shape.width)
    if datum.routing is None:
        return np.full(wanted, UNKNOWN, np.int32)
    return datum.routing.numpy().reshape(wanted)


def silence(loss_fn: str, inputs: MutableMapping[str, torch.Tensor], data: Sequence[Datum]) -> tuple[int, int]:
    """Takes tokens whose route is not known whole out of the loss. Gives how many tokens of the loss are replayed, and how many are
    silenced."""
    if all(datum.routing is None for datum in data):
        return 0, 0
    asked = torch.cat([torch.full((datum.tokens.shape[0],), datum.routing is not None) for datum in data])
    known = torch.cat([torch.from_numpy(_known(datum)) for datum in data])
    name = ZERO_WITHOUT[loss_fn]
    values = inputs[name]
    counts = (values if values.ndim == 1 else values.abs().sum(dim=1)).cpu() != 0
    silent = asked & ~known
    for gate in {name, *ALSO_ZERO} & set(inputs):
        open_ = (~silent).to(values.device).view(-1, *[1] * (inputs[gate].ndim - 1))
        inputs[gate] = torch.where(open_, inputs[gate], 0.0)
    inputs[SILENCED] = silent.to(values.device, torch.float32)
    return int((counts & asked & known).sum()), int((counts & silent).sum())


def _known(datum: Datum) -> np.ndarray:
    if datum.routing is None:
        return np.zeros(datum.tokens.shape[0], bool)
    known: np.ndarray = np.asarray((datum.routing.numpy().reshape(datum.tokens.shape[0], -1) >= 0).all(axis=1))
    return known
