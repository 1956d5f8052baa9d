"""LoRA on fused experts, several adapters in one pass, without a matrix of an expert's update ever being made.

transformers keeps the experts of a layer as two stacks, gate and up projection in one [experts, ...], down projection in the other; a
router gives each token K experts and their weights. Here the pairs of a token and an expert are sorted by expert: the frozen product
is grouped by expert over all tenants, the low-rank products by (adapter, expert). With e the expert of pair s, t its token:

    u[s] = W_up[e] x[t] + b_up[e] + scale · B[e] A[e] x[t]      (gate and up: an A and a B each)
    a[s] = act(u[s])                                            (the model's own gate)
    y[t] = sum over s of w[s] · (W_down[e] a[s] + b_down[e] + scale · B[e] A[e] a[s])

Either side of a pair of matrices may be shared by all experts (a matrix instead of a stack): then its product is taken once for a
token and not for each of its pairs. The gate and its weights are the model's; gradients flow through them into the hidden states.
docs/design/experts.md derives the backward pass.

Axes: T tokens, K experts of a token, S = T·K pairs, E experts, D hidden size, F inner size, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from everlearn.models.grouped import Pairs, accumulate, add_outer, product
from everlearn.models.lora import Pair, PairShape, Segment, active_segments
from everlearn.models.quant import PackedWeight
from everlearn.models.quant_experts import PackedStack

Layout = Literal["per_expert", "shared_outer", "rank_split"]
LAYOUTS: tuple[Layout, ...] = ("per_expert", "shared_outer", "rank_split")
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def expert_rank(layout: str, rank: int, top_k: int) -> int:
    """The rank of one expert's matrices: rank_split divides it among the experts that a token meets."""
    return max(1, rank // top_k) if layout == "rank_split" else rank


def expert_pairs(layout: str, rank: int, top_k: int, num_experts: int, hidden: int, inner: int, gated: bool = True) -> dict[str, PairShape]:
    """The shapes of A and B for each projection of one layer. shared_outer shares what faces the hidden states."""
    r = expert_rank(layout, rank, top_k)
    shared = layout == "shared_outer"
    into = PairShape((r, hidden) if shared else (num_experts, r, hidden), (num_experts, inner, r))
    out = PairShape((num_experts, r, inner), (hidden, r) if shared else (num_experts, hidden, r))
    return {GATE: into, UP: into, DOWN: out} if gated else {UP: into, DOWN: out}


class Stack:
    """The frozen matrices of a layer's experts in one direction. What keeps them in another form (quantised) offers the same three."""

    def __init__(self, weight_EOI: torch.Tensor, bias_EO: torch.Tensor | None):
        self.weight, self.bias = weight_EOI, bias_EO

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, output size, input size)"""
        num, size_out, size_in = self.weight.shape
        return num, size_out, size_in

    def product(self, x_SI: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """[S, O], with the bias."""
        y_SO = product(x_SI, self.weight, pairs)
        return y_SO if self.bias is None else y_SO.add_(self.bias[pairs.expert])

    def back(self, dy_SO: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """[S, I]: dy times each row's matrix."""
        return product(dy_SO, self.weight.transpose(1, 2), pairs)


def stack_of(weight: nn.Parameter | PackedWeight, bias: torch.Tensor | None, transposed: bool) -> Stack | PackedStack:
    """`transposed`: the model keeps its matrices [experts, input, output]."""
    if isinstance(weight, PackedWeight):
        return PackedStack(weight, bias)
    return Stack(weight.detach().transpose(1, 2) if transposed else weight.detach(), bias)


@dataclass(eq=False)
class Part:
    """One adapter's tokens in a batch: its pairs are the sorted rows `rows`, and `pairs` among themselves."""

    segment: Segment
    rows: torch.Tensor | slice
    pairs: Pairs

    @property
    def scale(self) -> float:
        assert self.segment.adapter is not None
        return self.segment.adapter.expert_scale

    def matrices(self, path: str) -> Pair:
        assert self.segment.adapter is not None
        return self.segment.adapter.pairs[path]

    def grads(self, path: str) -> Pair | None:
        assert self.segment.adapter is not None
        return None if self.segment.adapter.grads is None else self.segment.adapter.grads[path]

    def add_to(self, values_SX: torch.Tensor, update_PX: torch.Tensor) -> None:
        """Adds the scaled update to this part's rows."""
        if isinstance(self.rows, slice):
            values_SX[self.rows].add_(update_PX, alpha=self.scale)
        else:
            values_SX[self.rows] = values_SX[self.rows].add_(update_PX, alpha=self.scale)


class LoraExperts(nn.Module):
    """Stands for a fused experts module: the same parameters, and each token's adapter on top."""

    def __init__(self, inner: nn.Module, path: str, top_k: int):
        super().__init__()
        self.inner, self.path, self.top_k = inner, path, top_k
        self.gated: bool = getattr(inner, "gate_up_proj", None) is not None
        first = "gate_up_proj" if self.gated else "up_proj"
        transposed = bool(getattr(inner, "is_transposed", False))
        self.up, self.down = (
            stack_of(getattr(inner, name), getattr(inner, f"{name}_bias", None), transposed) for name in (first, "down_proj")
        )
        self.num_experts, self.hidden, self.size = self.down.shape
        self.columns = _columns(inner, self.size) if self.gated else {UP: slice(None)}
        self.routing: Any = None  # records and replays experts where a batch asks for it

    def shapes(self, layout: str, rank: int) -> dict[str, PairShape]:
        """What an adapter holds for this layer, by path."""
        pairs = expert_pairs(layout, rank, self.top_k, self.num_experts, self.hidden, self.size, self.gated)
        return {f"{self.path}.{name}": shape for name, shape in pairs.items()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        router_indices: torch.Tensor | None = None,
        routing_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ids_TK = top_k_index if top_k_index is not None else router_indices
        weights_TK = top_k_weights if top_k_weights is not None else routing_weights
        assert ids_TK is not None and weights_TK is not None
        x_TD = hidden_states.reshape(-1, self.hidden)
        if weights_TK.shape != ids_TK.shape:  # some families give a weight for every expert
            weights_TK = weights_TK.gather(1, ids_TK)
        if self.routing is not None:
            ids_TK, weights_TK = self.routing.routes(ids_TK, weights_TK)
        pairs = Pairs(ids_TK, self.num_experts)
        parts = self._parts(ids_TK, pairs)
        if torch.is_grad_enabled():
            u_SU = _Up.apply(x_TD, active_segments.anchor, self, pairs, parts)
            y_TD = _Down.apply(self._activate(u_SU), weights_TK, self, pairs, parts)
        else:
            u_SU, _ = up_product(self, x_TD, pairs, parts)
            y_TD, _ = down_product(self, self._activate(u_SU), weights_TK, pairs, parts)
        return y_TD.view_as(hidden_states)

    def _activate(self, u_SU: torch.Tensor) -> torch.Tensor:
        inner: Any = self.inner
        if not self.gated:
            return inner.act_fn(u_SU)
        return inner._apply_gate(u_SU)

    def _parts(self, ids_TK: torch.Tensor, pairs: Pairs) -> list[Part]:
        """The segments whose adapter changes these experts."""
        parts, width = [], pairs.width
        for segment in active_segments.current:
            if segment.adapter is None or f"{self.path}.{DOWN}" not in segment.adapter.pairs:
                continue
            if segment.start == 0 and segment.stop >= pairs.num_tokens:
                parts.append(Part(segment, slice(None), pairs))
                continue
            own = Pairs(ids_TK[segment.rows], self.num_experts)
            places = pairs.place[segment.start * width : segment.stop * width]
            parts.append(Part(segment, places[own.order], own))
        return parts

    def named(self, part: Part) -> list[tuple[str, slice, Pair, Pair | None]]:
        """Path, columns of u, matrices and gradient buffers of a part's projections into the inner size."""
        paths = [(f"{self.path}.{name}", columns) for name, columns in self.columns.items()]
        return [(path, columns, part.matrices(path), part.grads(path)) for path, columns in paths]


def up_product(layer: LoraExperts, x_TD: torch.Tensor, pairs: Pairs, parts: list[Part]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """u [S, U], and A x of every part and projection: [T of the part, R] where A is shared, else [pairs of the part, R]."""
    x_SD = x_TD[pairs.token]
    u_SU = layer.up.product(x_SD, pairs)
    lows = []
    for part in parts:
        x_PD = x_SD[part.rows]
        for _, columns, (a, b), _ in layer.named(part):
            if a.ndim == 2:
                h_tR = x_TD[part.segment.rows] @ a.t()
                h_PR = h_tR[part.pairs.token]
                lows.append(h_tR)
            else:
                h_PR = product(x_PD, a, part.pairs)
                lows.append(h_PR)
            part.add_to(u_SU[:, columns], product(h_PR, b, part.pairs))
    return u_SU, lows


def down_product(
    layer: LoraExperts, a_SF: torch.Tensor, weights_TK: torch.Tensor, pairs: Pairs, parts: list[Part]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y [T, D], and A a of every part [pairs of the part, R]."""
    o_SD = layer.down.product(a_SF, pairs)
    w_S1 = weights_TK.reshape(-1)[pairs.order, None]
    lows, late = [], []
    for part in parts:
        a_ERF, b = part.matrices(f"{layer.path}.{DOWN}")
        h_PR = product(a_SF[part.rows], a_ERF, part.pairs)
        lows.append(h_PR)
        if b.ndim == 2:
            z_tR = part.pairs.per_token(h_PR * w_S1[part.rows]).to(b.dtype)
            late.append((part.segment.rows, z_tR @ b.t(), part.scale))
        else:
            part.add_to(o_SD, product(h_PR, b, part.pairs))
    y_TD = pairs.per_token(o_SD * w_S1).to(a_SF.dtype)
    for rows, update_tD, scale in late:
        y_TD[rows].add_(update_tD, alpha=scale)
    return y_TD, lows


class _Up(torch.autograd.Function):
    """u of every pair. backward: dx, and the gradients of A and B added into the adapters' buffers.

    With dh = scale · du B:  dx[t] = sum over s of (du W + dh A),  dA += dh^T x,  dB += scale · du^T (A x).
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, anchor: torch.Tensor, layer: LoraExperts, pairs: Pairs, parts: list[Part]) -> torch.Tensor:
        u_SU, lows = up_product(layer, x_TD, pairs, parts)
        ctx.layer, ctx.pairs, ctx.parts = layer, pairs, parts
        ctx.save_for_backward(x_TD, *lows)
        return u_SU

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, *lows = ctx.saved_tensors
        layer: LoraExperts = ctx.layer
        pairs: Pairs = ctx.pairs
        du_SU, wants_dx = grads[0], ctx.needs_input_grad[0]
        dx_SD = layer.up.back(du_SU, pairs) if wants_dx else None
        shared: list[tuple[slice, torch.Tensor]] = []
        at = iter(lows)
        for part in ctx.parts:
            x_PD = x_TD[part.segment.rows][part.pairs.token]
            for _, columns, (a, b), buffers in layer.named(part):
                low = next(at)
                du_PF = du_SU[:, columns][part.rows].contiguous()
                dh_PR = product(du_PF, b.transpose(1, 2), part.pairs)
                h_PR = low if a.ndim == 3 else low[part.pairs.token]
                if buffers is not None:
                    add_outer(buffers[1], du_PF, h_PR, part.pairs, part.scale)
                if a.ndim == 2:
                    dh_tR = part.pairs.per_token(dh_PR)
                    if buffers is not None:
                        accumulate(buffers[0], dh_tR.t(), x_TD[part.segment.rows], part.scale)
                    shared.append((part.segment.rows, (dh_tR @ a).mul_(part.scale)))
                    continue
                if buffers is not None:
                    add_outer(buffers[0], dh_PR, x_PD, part.pairs, part.scale)
                if dx_SD is not None:
                    part.add_to(dx_SD, product(dh_PR, a.transpose(1, 2), part.pairs))
        if dx_SD is None:
            return None, None, None, None, None
        dx_TD = pairs.per_token(dx_SD)
        for rows, update_tD in shared:
            dx_TD[rows].add_(update_tD)
        return dx_TD, None, None, None, None


class _Down(torch.autograd.Function):
    """y of every token. backward: da, dw, and the gradients of A and B added into the adapters' buffers.

    With v = W^T dy + scale · A^T B^T dy for each pair (dy of its token, not yet weighted):  da = w v,  dw = v · a + b_down · dy,
    dA += scale · w (B^T dy) ⊗ a,  dB += scale · w dy ⊗ (A a). What the experts gave out needs not be kept for dw.
    """

    @staticmethod
    def forward(
        ctx: Any, a_SF: torch.Tensor, weights_TK: torch.Tensor, layer: LoraExperts, pairs: Pairs, parts: list[Part]
    ) -> torch.Tensor:
        y_TD, lows = down_product(layer, a_SF, weights_TK, pairs, parts)
        ctx.layer, ctx.pairs, ctx.parts = layer, pairs, parts
        ctx.save_for_backward(a_SF, weights_TK, *lows)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a_SF, weights_TK, *lows = ctx.saved_tensors
        layer: LoraExperts = ctx.layer
        pairs: Pairs = ctx.pairs
        dy_TD = grads[0].contiguous()
        w_S1 = weights_TK.reshape(-1)[pairs.order, None].to(a_SF.dtype)
        dy_SD = dy_TD[pairs.token]
        v_SF = layer.down.back(dy_SD, pairs)
        for part, h_PR in zip(ctx.parts, lows, strict=True):
            path = f"{layer.path}.{DOWN}"
            (a_ERF, b), buffers = part.matrices(path), part.grads(path)
            w_P1, own_tD = w_S1[part.rows], dy_TD[part.segment.rows]
            dy_PD = dy_SD[part.rows]
            g_PR = (own_tD @ b)[part.pairs.token] if b.ndim == 2 else product(dy_PD, b.transpose(1, 2), part.pairs)
            part.add_to(v_SF, product(g_PR, a_ERF.transpose(1, 2), part.pairs))
            if buffers is None:
                continue
            add_outer(buffers[0], g_PR * w_P1, a_SF[part.rows], part.pairs, part.scale)
            if b.ndim == 2:
                accumulate(buffers[1], own_tD.t(), part.pairs.per_token(h_PR * w_P1), part.scale)
            else:
                add_outer(buffers[1], dy_PD * w_P1, h_PR, part.pairs, part.scale)
        dweights_TK = None
        if ctx.needs_input_grad[1]:
            dw_S = (v_SF * a_SF).sum(dim=1, dtype=torch.float32)
            if layer.down.bias is not None:
                dw_S += (dy_SD * layer.down.bias[pairs.expert]).sum(dim=1, dtype=torch.float32)
            dweights_TK = dw_S[pairs.place].view_as(weights_TK).to(weights_TK.dtype)
        return v_SF.mul_(w_S1), dweights_TK, None, None, None


def _columns(inner: nn.Module, size: int) -> dict[str, slice]:
    """Where gate and up lie in the joint stack: one after the other, or in turn."""
    in_turn = not getattr(inner, "is_concatenated", not type(inner).__name__.startswith("GptOss"))  # transformers 5.17 has no such mark
    return {GATE: slice(0, None, 2), UP: slice(1, None, 2)} if in_turn else {GATE: slice(0, size), UP: slice(size, None)}


def is_experts(module: nn.Module) -> bool:
    """transformers' fused form: two stacks, no norm behind the experts, and a gate that works on rows."""
    down = getattr(module, "down_proj", None)
    first = getattr(module, "gate_up_proj", None) if hasattr(module, "_apply_gate") else None
    first = first if first is not None else getattr(module, "up_proj", None)
    stacks = all(isinstance(weight, nn.Parameter | PackedWeight) and len(weight.shape) == 3 for weight in (first, down))
    return stacks and hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", False)


def install_experts(decoder: nn.Module, prefix: str, top_k: int) -> dict[str, LoraExperts]:
    """Replaces every fused experts module of `decoder` by a LoraExperts over the same stacks. Returns them by full path."""
    found: dict[str, LoraExperts] = {}
    for name, module in list(decoder.named_modules()):
        for child_name, child in list(module.named_children()):
            if is_experts(child):
                path = ".".join(p for p in (prefix, name, child_name) if p)
                found[path] = LoraExperts(child, path, top_k)
                setattr(module, child_name, found[path])
    return found


def top_k_of(config: Any) -> int:
    """How many routed experts a token meets; 1 where the configuration doesn't say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 1)
