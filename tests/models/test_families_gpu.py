"""The families on a GPU: attention's half-precision paths, and recorded decoding steps of every form of cache. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everlearn.models.architecture import auto_class
from everlearn.models.attention import Form, PackedBatch
from everlearn.models.load import BaseModel, wrap
from everlearn.types import BaseModelInfo
from tests.models.test_families import sampler_against_trainer
from tests.tiny_families import CONFIGS, CONTEXT, VOCAB, randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")


def built(family: str, dtype: torch.dtype) -> BaseModel:
    try:
        config = CONFIGS[family]()
        kind = auto_class(config)
    except (ImportError, ValueError) as error:
        pytest.skip(f"this version of transformers has no {family}: {error}")
    torch.manual_seed(0)
    model = kind.from_config(config).to(dtype)
    randomise(model)
    return wrap(BaseModelInfo(family, "", [], type(model).__name__, VOCAB, CONTEXT, [2]), model.to(GPU), GPU, dtype)


@pytest.mark.parametrize("family", CONFIGS)
def test_in_single_precision_the_sampler_computes_what_the_trainer_does(family: str) -> None:
    worst, mean = sampler_against_trainer(built(family, torch.float32))
    print(f"{family} float32: largest {worst:.2e}, mean {mean:.2e}")
    assert worst <= 1e-4


@pytest.mark.parametrize("family", CONFIGS)
def test_in_half_precision_they_agree_but_for_rounding(family: str) -> None:
    worst, mean = sampler_against_trainer(built(family, torch.bfloat16))
    print(f"{family} bfloat16: largest {worst:.2e}, mean {mean:.2e}")
    assert mean <= 0.03


@pytest.mark.parametrize("window", [None, 48])
def test_flash_attention_with_sinks_equals_the_plain_form(window: int | None) -> None:
    lengths, heads, size = [200, 33, 1], 4, 64
    total = sum(lengths)
    generator = torch.Generator(GPU).manual_seed(0)
    query, key, value = (torch.randn(heads, total, size, device=GPU, generator=generator, dtype=torch.bfloat16) for _ in range(3))
    sinks = torch.randn(heads, device=GPU, generator=generator, dtype=torch.bfloat16)
    out_gradient = torch.randn(heads, total, size, device=GPU, generator=generator)

    def run(cast: Any) -> list[torch.Tensor]:
        inputs = [tensor.detach().to(cast, copy=True).requires_grad_() for tensor in (query, key, value)]
        out = PackedBatch(lengths, []).attend(0, *inputs, Form(size**-0.5, window, sinks.to(cast)))
        out.backward(out_gradient.to(cast))
        return [out.detach().float(), *(tensor.grad.float() for tensor in inputs if tensor.grad is not None)]

    for half, full in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        torch.testing.assert_close(half, full, rtol=0, atol=0.03 * float(full.abs().max()))
