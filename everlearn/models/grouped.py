"""Products of rows that are sorted by expert with the experts' matrices.

Three of them: rows through their expert's matrix, and for gradients the sum of outer products for each expert. On a GPU in bfloat16
each is one kernel (torch's grouped product), which never asks the host how many rows an expert has, so that a decoding step can be
recorded; elsewhere it is a loop over the experts that have rows. Both sum in the same order of rows. No adapters and no routing here.

Axes: T tokens, K experts of a token, S = T·K rows (pairs of a token and an expert), E experts, I and O the sizes of a matrix.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F

from everlearn.models.few_rows import are_few, product_of_few

ALIGNED_BYTES = 16  # what the kernel asks of addresses and strides


class Pairs:
    """The pairs of some tokens and their experts `ids_TK`, sorted by expert; within an expert in the order of tokens.

    `order[s]` is the pair (token-major) in sorted row s, `place` its inverse, `token[s]` the row's token.
    """

    def __init__(self, ids_TK: torch.Tensor, num_experts: int):
        self.num_tokens, self.width = ids_TK.shape
        self.num_experts = num_experts
        self.expert, self.order = torch.sort(ids_TK.reshape(-1), stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(self.order), device=ids_TK.device)
        self.token = self.order // self.width

    @cached_property
    def stops(self) -> torch.Tensor:
        """int32 [E]: the row after each expert's last."""
        experts = torch.arange(self.num_experts, device=self.expert.device, dtype=self.expert.dtype)
        return torch.searchsorted(self.expert, experts, right=True).int()

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of the experts that have rows; on a GPU this waits for the device."""
        spans, start = [], 0
        for expert, stop in enumerate(self.stops.tolist()):
            if stop > start:
                spans.append((expert, start, stop))
            start = stop
        return spans

    def per_token(self, values_SX: torch.Tensor) -> torch.Tensor:
        """[T, X]: the sum over a token's experts."""
        return values_SX[self.place].view(self.num_tokens, self.width, -1).sum(dim=1)


def product(x_SI: torch.Tensor, stack_EOI: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """[S, O]: x[s] times the transposed matrix of row s's expert."""
    if runs_fused(x_SI):
        return fused_product(x_SI, stack_EOI, pairs.stops)
    y_SO = x_SI.new_empty(len(x_SI), stack_EOI.shape[1])
    for expert, start, stop in pairs.spans:
        linear_into(x_SI[start:stop], stack_EOI[expert], y_SO[start:stop])
    return y_SO


def fused_product(x_SI: torch.Tensor, stack_EOI: torch.Tensor, stops_E: torch.Tensor) -> torch.Tensor:
    """The same as one kernel; `stops_E` int32 is the row after each matrix's last."""
    size_out = stack_EOI.shape[1]
    x_SI, stack_EOI = _padded(x_SI, (1,)), _padded(stack_EOI, (1, 2))
    return torch._grouped_mm(x_SI, stack_EOI.transpose(1, 2), offs=stops_E)[:, :size_out]


def add_outer(into_EOI: torch.Tensor, left_SO: torch.Tensor, right_SI: torch.Tensor, pairs: Pairs, scale: float) -> None:
    """into[e] += scale · sum over e's rows of left[s] ⊗ right[s]; kept in float32 whatever the rows' type."""
    if runs_fused(left_SO):
        _, size_out, size_in = into_EOI.shape
        sums_EOI = torch._grouped_mm(_padded(left_SO, (1,)).t(), _padded(right_SI, (1,)), offs=pairs.stops)[:, :size_out, :size_in]
        empty_E = torch.diff(pairs.stops, prepend=pairs.stops.new_zeros(1)) == 0  # the kernel need not write those
        into_EOI.add_(sums_EOI.masked_fill(empty_E[:, None, None], 0.0), alpha=scale)
        return
    for expert, start, stop in pairs.spans:
        accumulate(into_EOI[expert], left_SO[start:stop].t(), right_SI[start:stop], scale)


def accumulate(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """grad += scale · left @ right; the sum is kept in float32 whatever the activations' type."""
    if grad.dtype == left.dtype:
        grad.addmm_(left, right, alpha=scale)
    else:
        grad.add_((left @ right).to(grad.dtype), alpha=scale)


def runs_fused(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def linear_into(x_NI: torch.Tensor, weight_OI: torch.Tensor, out_NO: torch.Tensor) -> None:
    """out = x W^T."""
    if are_few(x_NI):
        out_NO.copy_(product_of_few(x_NI, weight_OI))
    else:
        torch.mm(x_NI, weight_OI.t(), out=out_NO)


def _padded(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """With zeros at the end of `dims` up to what the kernel's alignment asks for: small ranks need it, model sizes don't."""
    step = ALIGNED_BYTES // tensor.element_size()
    missing = [-tensor.shape[dim] % step if dim in dims else 0 for dim in range(tensor.ndim)]
    if any(missing):
        return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)])
    dense = tensor.stride(-1) == 1 or tensor.stride(-2) == 1
    long = max(tensor.stride(-1), tensor.stride(-2))
    if not dense or long % step or tensor.data_ptr() % ALIGNED_BYTES:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor
