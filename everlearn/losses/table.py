"""The table of losses that the engine uses: each name's specification and its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everlearn.losses.correction import anchored, correction
from everlearn.losses.logprobs import Segments, cross_entropy, segment_sums
from everlearn.losses.mirror_descent import mirror_descent
from everlearn.losses.policy import cispo, dro, gspo, importance_sampling, ppo
from everlearn.losses.spec import SPECS, Config, ConfigKey, LossSpec
from everlearn.losses.stable_reinforce import stable_reinforce
from everlearn.losses.terms import terms
from everlearn.types import Datum

LossFn = Callable[[Tensor, Mapping[str, Tensor], Config, Segments], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss's own formula, `surrogate`, and with it what losses share."""

    spec: LossSpec
    surrogate: LossFn

    @property
    def name(self) -> str:
        return self.spec.name

    def fn(self, logprobs: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments) -> Tensor:
        """loss_T = factor_T * surrogate_T + terms_T: contributions per token, differentiable in logprobs alone. Keys that `config`
        lacks take their defaults; the factor is 1 and no term is added unless inputs or configuration ask for it."""
        config = {**self.spec.defaults, **config}
        loss_T = self.surrogate(logprobs, anchored(inputs), config, segments)
        if self.corrected(inputs, config):
            loss_T = correction(logprobs, inputs, config, segments).factor_T * loss_T
        added_T = terms(logprobs, inputs, config) if self.spec.adds_terms else None
        return loss_T if added_T is None else loss_T + added_T

    def corrected(self, inputs: Mapping[str, Tensor], config: Config) -> bool:
        """Whether the factor can be other than 1. `config` is the complete one."""
        if not self.spec.corrects:
            return False
        return "old_logprobs" in inputs or config["importance_weight"] != "full" or self.leaves_sequences_out(config)

    def leaves_sequences_out(self, config: Config) -> bool:
        """Whether a rule for whole sequences is on."""
        keys = self.spec.config
        return any(isinstance(keys[name], ConfigKey) and keys[name].sequence and config[name] != keys[name].default for name in keys)


LOSSES: dict[str, Loss] = {
    fn.__name__: Loss(SPECS[fn.__name__], fn)
    for fn in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo, stable_reinforce, mirror_descent)
}


def loss_and_grad(loss: Loss, logprobs: Tensor, inputs: Mapping[str, Tensor], config: Config, segments: Segments) -> tuple[Tensor, Tensor]:
    """(the loss summed per datum [D], dloss/dlogprobs shaped like logprobs), in float32 or better. `segments` tile the row."""
    precise = logprobs.dtype if logprobs.dtype == torch.float64 else torch.float32
    leaf = logprobs.detach().to(precise).requires_grad_()
    with torch.enable_grad():
        loss_T = loss.fn(leaf, inputs, config, segments)
        (grad,) = torch.autograd.grad(loss_T.sum(), leaf)
    return segment_sums(loss_T.detach(), segments), grad


def pack_inputs(
    loss: Loss, data: Sequence[Datum], config: Config, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """The datums' inputs one after the other, as the loss takes them (floats as float32, target_tokens as int64), and their segments.
    [T, K] targets are widened to the largest K with token 0 at weight 0. An optional input that some datums lack takes the
    configured value there, or the one that stands for it."""
    fills = {name: entry.fill for name, entry in loss.spec.inputs.items() if entry.fill is not None} | dict(config)
    width = max((datum.inputs["target_tokens"].shape[1:] or [0])[0] for datum in data)
    names = sorted(set().union(*(datum.inputs for datum in data)))
    inputs = {
        name: torch.cat([_tensor(name, datum, fills, width) for datum in data]).to(device)
        for name in names
        if all(name in datum.inputs for datum in data) or name in fills
    }
    segments, start = [], 0
    for datum in data:
        segments.append((start, start + datum.tokens.shape[0]))
        start = segments[-1][1]
    return inputs, segments


def _tensor(name: str, datum: Datum, fills: Config, width: int) -> Tensor:
    dtype = torch.int64 if name == "target_tokens" else torch.float32
    if name not in datum.inputs:
        return torch.full((datum.tokens.shape[0],), fills[name], dtype=dtype)
    tensor = torch.from_numpy(datum.inputs[name].numpy().copy()).to(dtype)
    if name not in ("target_tokens", "weights") or width == 0:
        return tensor
    columns = tensor if tensor.ndim == 2 else tensor[:, None]
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]))
