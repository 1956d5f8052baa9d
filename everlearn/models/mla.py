"""Multi-head latent attention: what is kept of a token is the latent that all heads expand, not their keys and values.

A layer of this kind (DeepSeek-V2, arXiv:2405.04434) computes for each token a latent c [C] and one rotated key r [P]; head h has
key (U_h c, r) and value V_h c, with U and V the rows of one linear layer, `kv_b_proj`. So q · U_h c = (U_h^T q) · c: a decoding step
takes the queries to the latents instead of the latents to the heads (the absorbed form), attends over (c, r) as if it were one key/value
head, and expands what comes out. Training and the rows of a prompt use the plain form, because many queries share the expansion.
transformers' own attention stays; the hook is that linear layer, which hands its input on. An adapter of `kv_b_proj` adds s · B A to U
and V, and is absorbed the same way.

Axes: T tokens of the row, M tokens of a context, H heads, N and P the parts of a key without and with rotation, V value size, C latent
size, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from everlearn.errors import Unsupported
from everlearn.models.attention import active_batch
from everlearn.models.lora import LoraLinear, Segment, parts_of
from everlearn.models.quant import dense_of

EXPANDED = 2**26  # numbers of expanded keys and values of a context that are held at one time


class LatentUp(nn.Module):
    """`kv_b_proj` of one layer."""

    def __init__(self, linear: LoraLinear, nope: int, rope: int, value: int):
        super().__init__()
        self.linear = linear
        self.nope, self.rope, self.value = nope, rope, value
        self.num_heads = linear.out_features // (nope + value)
        self.latent_size = linear.in_features
        self.given_TC: torch.Tensor | None = None

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        batch = active_batch()
        if batch.keeps_latents:
            self.given_TC = latent.reshape(-1, self.latent_size)
            if not batch.needs_expanded:  # nobody reads what the layer would say
                return latent.new_zeros(()).expand(*latent.shape[:-1], self.linear.out_features)
        expanded: torch.Tensor = self.linear(latent)
        return expanded

    def entry(self, key_HTD: torch.Tensor) -> torch.Tensor:
        """What a cache keeps of the tokens that have just come by: (c, r) [T, 1, C + P]."""
        assert self.given_TC is not None
        latent_TC, self.given_TC = self.given_TC, None
        return torch.cat([latent_TC, key_HTD[0, :, self.nope :]], dim=-1).unsqueeze(1)

    # --- the absorbed form ---

    def absorb(self, query_HTD: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """Queries for the latents: [H, T, N + P] -> [H, T, C + P]."""
        nope_HTN, rope_HTP = query_HTD[..., : self.nope], query_HTD[..., self.nope :]
        out_HTC = nope_HTN @ self._heads(dense_of(self.linear.weight))[:, : self.nope]
        for segment, a_RC, b_OR in parts_of(segments, self.linear.path):
            assert segment.adapter is not None
            low_HTR = nope_HTN[:, segment.rows] @ self._heads(b_OR)[:, : self.nope]
            out_HTC[:, segment.rows] += segment.adapter.scale * (low_HTR @ a_RC)
        return torch.cat([out_HTC, rope_HTP], dim=-1)

    def values(self, mixed_HTC: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """Mixtures of latents to the heads' outputs: [H, T, C] -> [H, T, V]."""
        out_HTV = mixed_HTC @ self._heads(dense_of(self.linear.weight))[:, self.nope :].transpose(1, 2)
        for segment, a_RC, b_OR in parts_of(segments, self.linear.path):
            assert segment.adapter is not None
            low_HTR = mixed_HTC[:, segment.rows] @ a_RC.t()
            out_HTV[:, segment.rows] += segment.adapter.scale * (low_HTR @ self._heads(b_OR)[:, self.nope :].transpose(1, 2))
        return out_HTV

    # --- the plain form ---

    def attend_expanded(
        self, query_HTD: torch.Tensor, entries_MD: torch.Tensor, mask_TM: torch.Tensor | None, scaling: float, segment: Segment
    ) -> torch.Tensor:
        """Attention over a kept context of one sequence, expanded for as many heads at a time as fit: [H, T, V]. `segment` names the
        sequence's adapter."""
        latent_MC, rope_MP = entries_MD[:, : self.latent_size], entries_MD[:, self.latent_size :]
        weight_HOC = self._heads(dense_of(self.linear.weight))
        parts = parts_of([segment], self.linear.path)
        step = max(1, EXPANDED // (entries_MD.shape[0] * (self.nope + self.rope + self.value)))
        outs = []
        for start in range(0, self.num_heads, step):
            heads = slice(start, start + step)
            both_HMO = latent_MC @ weight_HOC[heads].transpose(1, 2)
            for _, a_RC, b_OR in parts:
                assert segment.adapter is not None
                both_HMO += segment.adapter.scale * ((latent_MC @ a_RC.t()) @ self._heads(b_OR)[heads].transpose(1, 2))
            key_HMD = torch.cat([both_HMO[..., : self.nope], rope_MP.expand(both_HMO.shape[0], -1, -1)], dim=-1)
            value_HMV = both_HMO[..., self.nope :]
            outs.append(F.scaled_dot_product_attention(query_HTD[heads], key_HMD, value_HMV, attn_mask=mask_TM, scale=scaling))
        return torch.cat(outs)

    def _heads(self, matrix: torch.Tensor) -> torch.Tensor:
        """Rows of the layer (of its weight, or of an adapter's B) by head: [H, N + V, ...]."""
        return matrix.view(self.num_heads, self.nope + self.value, -1)


SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def install_latents(decoder: nn.Module) -> list[LatentUp]:
    """Hooks the attention of every layer that works by latents; the layers' LoRA must be installed."""
    found: list[LatentUp] = []
    for module in decoder.modules():
        linear = module._modules.get("kv_b_proj")
        if linear is None:
            continue
        attention: Any = module
        if not isinstance(linear, LoraLinear) or linear.bias is not None or any(not hasattr(attention, name) for name in SIZES):
            raise Unsupported(
                f"{type(module).__name__} is latent attention of a form that this version doesn't know; choose another base model"
            )
        attention.kv_b_proj = LatentUp(linear, attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim)
        found.append(attention.kv_b_proj)
    return found
