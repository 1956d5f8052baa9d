"""Attention with a mask over grouped heads, in the form that a GPU's kernels take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from everlearn.models import attention
from everlearn.models.attention import attend_masked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (6, 6), (4, 1)])
def test_grouped_heads_with_a_mask_equal_torchs_own_groups(
    heads: int, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither copies keys nor asks for what the kernels with masks don't have."""
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(5, heads, 16, generator=generator).to(dtype).transpose(0, 1)
    key, value = (torch.randn(21, groups, size, generator=generator).to(dtype).transpose(0, 1) for size in (16, 16))
    mask = torch.zeros(5, 21, dtype=dtype).masked_fill_(torch.arange(21) > torch.arange(16, 21)[:, None], float("-inf"))
    expected = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask, scale=0.3, enable_gqa=True)[0]
    sdpa, seen = F.scaled_dot_product_attention, []

    def spy(*inputs: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append((inputs, more))
        return sdpa(*inputs, **more)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    found = attend_masked(query, key, value, mask, 0.3)
    assert found.shape == (heads, 5, 16)
    torch.testing.assert_close(found, expected)
    ((inputs, more),) = seen
    assert "enable_gqa" not in more and inputs[0].shape[:2] == inputs[1].shape[:2] == inputs[2].shape[:2]
    assert [tensor.data_ptr() for tensor in inputs] == [tensor.data_ptr() for tensor in (query, key, value)]
