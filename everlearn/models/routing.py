"""Which experts a token met: watched, and played again.

A sampler's and a trainer's routers choose from logits that differ in the last digits, and a changed choice moves a log-probability far
more than any rounding. So the sampler may record the experts' ids, and the trainer use those (routing replay, arXiv:2510.11370): only
the choice is taken over; the weights are computed from the present logits at those ids, and gradients flow through them as ever.

How a family turns logits into weights is found, not listed: of a few rules, the one that gives the router's own weights for its own
choice. While a layer has only met tokens for which several do (a router that is sure of itself, few tokens), the closest is taken and
none is settled on. A router that follows none of them can be watched, not replayed.

Axes: T tokens of a packed row, L layers with experts, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from everlearn.errors import Unsupported
from everlearn.models.attention import active_batch
from everlearn.models.experts import LoraExperts

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ROUTERS = ("gate", "router")
UNKNOWN = -1  # in recorded ids: nothing is known of this token


def _normalised(weights_TK: torch.Tensor) -> torch.Tensor:
    return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)


RULES: dict[str, Rule] = {
    "softmax": lambda logits, ids: logits.softmax(dim=-1).gather(1, ids),
    "softmax of the chosen": lambda logits, ids: logits.gather(1, ids).softmax(dim=-1),
    "sigmoid": lambda logits, ids: logits.sigmoid().gather(1, ids),
    "normalised sigmoid": lambda logits, ids: _normalised(logits.sigmoid().gather(1, ids)),
}


@dataclass(eq=False)
class Watch:
    """What a batch wants of its experts' choice: `replay` [T, L, K] holds ids to use (UNKNOWN: the router's own), `met` is filled with the
    ids of each layer where `records`."""

    replay: torch.Tensor | None = None
    records: bool = False
    met: dict[int, torch.Tensor] = field(default_factory=dict)

    def ids(self) -> torch.Tensor:
        """int32 [T, L, K]"""
        return torch.stack([self.met[layer] for layer in sorted(self.met)], dim=1)


def active_watch() -> Watch | None:
    """That of the batch that is being run, also while a backward pass computes its layers again."""
    watch: Watch | None = getattr(active_batch(), "watch", None)
    return watch


class Routing:
    """The choice of experts in one layer. `routes` stands between the router and its experts."""

    def __init__(self, layer: int, num_experts: int, router: nn.Module | None, factor: float):
        self.layer, self.num_experts, self.factor = layer, num_experts, factor
        self.rules = list(RULES.values())  # those that fitted all tokens so far
        self.logits: torch.Tensor | None = None
        if router is not None:
            router.register_forward_hook(self._keep_logits)

    def _keep_logits(self, module: nn.Module, args: Any, output: Any) -> None:
        watch = active_watch()
        if watch is not None and watch.replay is not None:
            outputs = output if isinstance(output, tuple) else (output,)
            self.logits = next((o for o in outputs if o.is_floating_point() and o.shape[-1] == self.num_experts), None)

    def routes(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and weights that the experts are to use."""
        watch = active_watch()
        if watch is None:
            return ids_TK, weights_TK
        if watch.replay is not None:
            ids_TK, weights_TK = self._replay(ids_TK, weights_TK, watch.replay[:, self.layer])
        if watch.records:
            watch.met[self.layer] = ids_TK.detach().int()
        return ids_TK, weights_TK

    def _replay(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, wanted_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known_T1 = (wanted_TK >= 0).all(dim=1, keepdim=True)
        chosen_TK = torch.where(known_T1, wanted_TK, ids_TK)
        logits_TE, self.logits = self.logits, None
        if logits_TE is None:
            raise self._unknown()
        logits_TE = logits_TE.reshape(-1, self.num_experts).float()
        if len(self.rules) > 1:
            self.rules = self._fitting(logits_TE, ids_TK, weights_TK)
        found_TK = (self.rules[0](logits_TE, chosen_TK) * self.factor).to(weights_TK.dtype)
        return chosen_TK, torch.where(known_T1, found_TK, weights_TK)  # a neighbour in the row that replays nothing keeps its own bits

    @torch.no_grad()  # else the first pass would keep more than the same pass computed again
    def _fitting(self, logits_TE: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> list[Rule]:
        """The rules that give the router's weights for its choice, the closest first. Rows that are no numbers tell nothing."""
        finite_T = logits_TE.isfinite().all(dim=1) & weights_TK.isfinite().all(dim=1)
        if not bool(finite_T.any()):
            return self.rules
        logits_TE, ids_TK, weights_TK = logits_TE[finite_T], ids_TK[finite_T], weights_TK[finite_T]
        tolerance = 1e-5 if weights_TK.dtype == torch.float32 else 2e-2
        fitting = []
        for rule in self.rules:
            errors_TK = rule(logits_TE, ids_TK) * self.factor - weights_TK
            if bool((errors_TK.abs() <= tolerance * weights_TK.abs().amax()).all()):
                fitting.append((float(errors_TK.norm()), rule))
        if not fitting:
            raise self._unknown()
        return [rule for _, rule in sorted(fitting, key=lambda pair: pair[0])]

    def _unknown(self) -> Unsupported:
        rules = ", ".join(RULES)
        return Unsupported(f"this base model's router follows none of the rules known here ({rules}), so its choices can't be replayed")


def install_routing(decoder: nn.Module, modules: dict[str, LoraExperts]) -> None:
    """Puts a Routing before each layer's experts. The router is the experts' neighbour."""
    owners = {child: module for module in decoder.modules() for child in module.children() if isinstance(child, LoraExperts)}
    for layer, experts in enumerate(modules.values()):
        block = owners[experts]
        router = next((child for name in ROUTERS if (child := getattr(block, name, None)) is not None), None)
        factors: list[Any] = [getattr(own, "routed_scaling_factor", None) for own in (router, block)]
        factor = next((float(value) for value in factors if value is not None), 1.0)
        experts.routing = Routing(layer, experts.num_experts, router, factor)


# ---- the protocol's metrics ----


def counts(ids_TLK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int64 [L, E]: how many tokens met each expert."""
    num_layers = ids_TLK.shape[1]
    first_L1 = torch.arange(num_layers, device=ids_TLK.device)[:, None] * num_experts
    return torch.bincount((ids_TLK.long() + first_L1).flatten(), minlength=num_layers * num_experts).view(num_layers, num_experts)


def balance(counts_LE: torch.Tensor) -> dict[str, float]:
    """How evenly tokens were spread, the mean over layers; an expert's fair share is the mean of its layer."""
    if not int(counts_LE.sum()):
        return {}
    share_LE = counts_LE.double() / counts_LE.double().mean(dim=1, keepdim=True)
    most_L, least_L = share_LE.amax(dim=1) - 1, share_LE.amin(dim=1) - 1
    return {
        "e_frac_with_tokens:mean": float((share_LE > 0).double().mean()),
        "e_frac_oversubscribed:mean": float((share_LE > 1).double().mean()),
        "e_max_violation:mean": float(most_L.mean()),
        "e_max_violation:max": float(most_L.max()),
        "e_min_violation:mean": float(least_L.mean()),
    }
