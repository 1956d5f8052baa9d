"""Layers that read one input give the same together as each by itself, whatever adapters the rows use."""

import pytest
import torch
from torch import nn

from everlearn.models.lora import AdapterWeights, LoraLinear, Segment, active_segments, install
from everlearn.models.siblings import join_siblings

NAMES = ("q_proj", "k_proj", "v_proj")
SIZES = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


class Attention(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(16, SIZES[name], bias=bias))


class Block(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.self_attn = Attention(bias)


def adapter(name: str, rank: int, layers: tuple[str, ...], frozen: bool = True) -> AdapterWeights:
    pairs = {f"self_attn.{layer}": (torch.randn(rank, 16), torch.randn(SIZES[layer], rank)) for layer in layers}
    return AdapterWeights(name, 2.0, pairs, frozen=frozen)


@pytest.fixture
def active():
    yield active_segments
    active_segments.current = []


def outputs(block: Block, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [getattr(block.self_attn, name)(x) for name in NAMES]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_a_family_equals_its_layers(rows, bias, active):
    torch.manual_seed(rows)
    block = Block(bias).requires_grad_(False)
    install(block, "")
    two = adapter("two", 3, ("q_proj", "v_proj"))
    three = adapter("three", 5, NAMES)
    middle, last = rows // 3, rows - rows // 3
    active.current = [Segment(two, 0, middle), Segment(None, middle, last), Segment(three, last, rows)]
    if rows == 1:
        active.current = [Segment(three, 0, 1)]
    x = torch.randn(1, rows, 16)
    alone = outputs(block, x)
    join_siblings(block)
    assert block.self_attn.k_proj.siblings is not None
    for got, expected in zip(outputs(block, x), alone, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_another_input_and_an_adapter_that_trains_are_computed_alone(active):
    torch.manual_seed(0)
    block = Block(False).requires_grad_(False)
    layers = install(block, "")
    join_siblings(block)
    moving = adapter("moving", 2, NAMES, frozen=False)
    active.current = [Segment(moving, 0, 4)]
    x, other = torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    outputs(block, x)
    moving.pairs["self_attn.k_proj"][1].zero_()
    layer: LoraLinear = layers["self_attn.k_proj"]
    torch.testing.assert_close(outputs(block, x)[1], x @ layer.weight.t())
    active.current = []
    with torch.inference_mode():
        block.self_attn.q_proj(x)
        torch.testing.assert_close(block.self_attn.k_proj(other), other @ layer.weight.t())
