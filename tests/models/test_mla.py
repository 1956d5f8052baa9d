"""Latent attention: the absorbed form, with adapters, is the plain one; the cache keeps latents and is sized by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from everlearn.engine.kvcache import KVCache
from everlearn.errors import Unsupported
from everlearn.models.attention import CacheForm, PackedBatch, running
from everlearn.models.load import load_base
from everlearn.models.lora import AdapterWeights, LoraLinear, Segment
from everlearn.models.mla import LatentUp, install_latents
from everlearn.types import BaseModelInfo
from tests.engine.sampling import make_sampler
from tests.tiny_families import CONTEXT, VOCAB, make_tiny_family

HEADS, NOPE, ROPE, VALUE, LATENT, RANK = 4, 16, 8, 12, 20, 3
PATH = "self_attn.kv_b_proj"


@pytest.fixture
def layer() -> Iterator[LatentUp]:
    torch.manual_seed(0)
    linear = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False).requires_grad_(False)
    with torch.no_grad():
        yield LatentUp(LoraLinear(linear, PATH), NOPE, ROPE, VALUE)


def adapter(seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(RANK, LATENT, generator=generator), torch.randn(HEADS * (NOPE + VALUE), RANK, generator=generator)
    return AdapterWeights(f"v{seed}", 0.5, {PATH: (a, b)})


def plain(layer: LatentUp, query_HTD: torch.Tensor, entries_MD: torch.Tensor, who: AdapterWeights | None) -> torch.Tensor:
    """Softmax over expanded keys and values, written out."""
    weight = layer.linear.weight
    if who is not None:
        a, b = who.pairs[PATH]
        weight = weight + who.scale * (b @ a)
    both_MHO = (entries_MD[:, :LATENT] @ weight.t()).view(-1, HEADS, NOPE + VALUE)
    rotated = entries_MD[:, None, LATENT:].expand(-1, HEADS, -1)
    key_HMD = torch.cat([both_MHO[..., :NOPE], rotated], dim=-1).transpose(0, 1)
    weights = torch.softmax(query_HTD @ key_HMD.transpose(1, 2) * 0.2, dim=-1)
    return weights @ both_MHO[..., NOPE:].transpose(0, 1)


def test_the_absorbed_form_equals_the_plain_one_for_each_adapter(layer: LatentUp) -> None:
    segments = [Segment(adapter(1), 0, 2), Segment(None, 2, 3), Segment(adapter(2), 3, 5)]
    entries_BMD, query_HBD = torch.randn(5, 9, LATENT + ROPE), torch.randn(HEADS, 5, NOPE + ROPE)
    absorbed_HBD = layer.absorb(query_HBD, segments)
    mixed = F.scaled_dot_product_attention(
        absorbed_HBD.transpose(0, 1).unsqueeze(1), entries_BMD.unsqueeze(1), entries_BMD.unsqueeze(1)[..., :LATENT], scale=0.2
    )
    found_HBV = layer.values(mixed.squeeze(1).transpose(0, 1), segments)
    for segment in segments:
        for row in range(segment.start, segment.stop):
            expected = plain(layer, query_HBD[:, row : row + 1], entries_BMD[row], segment.adapter)
            torch.testing.assert_close(found_HBV[:, row : row + 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("held", [1, 2**26])
def test_a_context_is_expanded_as_many_heads_at_a_time_as_fit(layer: LatentUp, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everlearn.models.mla.EXPANDED", held)
    query, entries = torch.randn(HEADS, 4, NOPE + ROPE), torch.randn(11, LATENT + ROPE)
    mask = torch.zeros(4, 11)
    for who in (None, adapter(3)):
        found = layer.attend_expanded(query, entries, mask, 0.2, Segment(who, 0, 11))
        torch.testing.assert_close(found, plain(layer, query, entries, who), rtol=0, atol=1e-5)


def test_only_a_batch_that_keeps_latents_is_given_them(layer: LatentUp) -> None:
    with running(PackedBatch([3], [Segment(None, 0, 3)])):
        latent = torch.randn(1, 3, LATENT)
        torch.testing.assert_close(layer(latent), latent @ layer.linear.weight.t())
    assert layer.given_TC is None


def test_the_cache_is_sized_by_latents(tmp_path: Path) -> None:
    folder = make_tiny_family(tmp_path, "deepseek_v3")
    base = load_base(BaseModelInfo("m", str(folder), [], "DeepseekV3ForCausalLM", VOCAB, CONTEXT, [2]), torch.device("cpu"), torch.float32)
    assert base.cache_form == CacheForm(layers=(0, 1, 2), entries=((1, 16 + 8),))
    sampler = make_sampler(base)
    assert sampler.token_bytes == 3 * 24 * 4  # with keys and values of four heads it were 3 * 4 * (24 + 12) * 4
    assert sum(tensor.numel() * 4 for tensor in sampler.cache.tensors) == sampler.token_bytes * sampler.cache.num_blocks * 4


def test_a_token_of_kimi_k2_costs_70_kb() -> None:
    form = CacheForm(layers=tuple(range(61)), entries=((1, 512 + 64),))
    assert form.floats * 2 == 70_272
    cache = KVCache(form, 2, 4, torch.device("meta"), torch.bfloat16)
    assert [tuple(tensor.shape) for tensor in cache.tensors] == [(61, 12, 1, 576)]


def test_latent_attention_of_another_form_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kv_b_proj = nn.Linear(4, 4)

    with pytest.raises(Unsupported, match="Attention is latent attention of a form"):
        install_latents(nn.ModuleList([Attention()]))
