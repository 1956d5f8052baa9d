"""Layers with a state in place of keys: gated delta-net linear attention (Qwen3.5).

Such a layer reads a sequence once, left to right, and keeps two tensors of it: the last inputs of its short convolution and a
matrix for each head. transformers' own layer stays; it is run over each sequence of a row by itself, so that nothing goes from one tenant's
sequence to the next, and where a sequence has begun already its state is handed over in the place of transformers' cache.

Axes: N sequences of one length, L that length, T tokens of the packed row, D hidden size, S slots (one sequence each).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from everlearn.models.attention import active_batch


class States:
    """What one layer keeps of N sequences, in the form that transformers' layers ask a cache for: read by slot, and written back into
    the same slots. A sequence that has only begun has zeros there."""

    record_past = True  # else a decoding step would write into a copy of its state

    def __init__(self, tensors: Sequence[torch.Tensor], slots_N: torch.Tensor):
        self.conv, self.matrix = tensors
        self.slots = slots_N

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.record_past

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        return self.conv[self.slots]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        return self.matrix[self.slots]

    def update_conv_state(self, new_NDL: torch.Tensor, layer_idx: int, **_: Any) -> torch.Tensor:
        """The kept inputs and the new ones [N, D, K + L]; the last K are kept."""
        width = self.conv.shape[-1]
        whole = torch.cat([self.conv[self.slots].to(new_NDL.dtype), new_NDL], dim=-1)
        self.conv.index_copy_(0, self.slots, whole[..., -width:].to(self.conv.dtype))
        return whole

    def update_recurrent_state(self, new: torch.Tensor, layer_idx: int, **_: Any) -> torch.Tensor:
        self.matrix.index_copy_(0, self.slots, new.to(self.matrix.dtype))
        return new

    # What older versions (5.17) ask for instead.

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        return True

    @property
    def layers(self) -> States:
        return self

    def __getitem__(self, layer_idx: int) -> States:
        return self

    @property
    def recurrent_states(self) -> list[torch.Tensor]:
        return [self.matrix[self.slots]]


class Recurrent(nn.Module):
    """One layer with a state, behind the batch that says which rows are one sequence."""

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return active_batch().recur(self, hidden_states[0]).unsqueeze(0)

    def run(self, hidden_NLD: torch.Tensor, states: States | None) -> torch.Tensor:
        """transformers' layer over sequences of one length. LoRA segments must count these rows."""
        out: torch.Tensor = self.layer(hidden_states=hidden_NLD, cache_params=states, attention_mask=None)
        return out


# Classes of transformers whose calling convention this is.
KNOWN = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")


def install_recurrent(decoder: nn.Module) -> list[Recurrent]:
    """Hooks every layer with a state that this module knows; LoRA must be installed."""
    found: list[Recurrent] = []
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in KNOWN:
                inner: Any = child
                hook = Recurrent(inner, inner.layer_idx)
                setattr(module, name, hook)
                found.append(hook)
    return found


def state_shapes(hook: Recurrent) -> tuple[tuple[int, ...], ...]:
    """(inputs of the convolution, matrices) that the layer keeps of a sequence."""
    layer: Any = hook.layer
    return ((layer.conv_dim, layer.conv_kernel_size), (layer.num_v_heads, layer.head_k_dim, layer.head_v_dim))
