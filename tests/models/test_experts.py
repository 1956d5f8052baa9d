"""LoRA on experts against a plain implementation that writes each expert's update out and lets autograd differentiate it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from everlearn.models import grouped
from everlearn.models.experts import LAYOUTS, LoraExperts, install_experts
from everlearn.models.lora import AdapterWeights, Segment, active_segments
from everlearn.models.quant_experts import PackedStack, runs
from everlearn.models.quant_int4 import pack

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 16, 24, 6, 3, 19


def _qwen3() -> nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS))


def _gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS))


def _mixtral() -> nn.Module:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS))


class Ungated(nn.Module):
    """Two plain stacks with an activation between them."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.act_fn = nn.SiLU()


FAMILIES: dict[str, Callable[[], nn.Module]] = {"qwen3": _qwen3, "gpt_oss": _gpt_oss, "mixtral": _mixtral, "ungated": Ungated}


def made(family: str) -> LoraExperts:
    holder = nn.Module()
    holder.experts = FAMILIES[family]()
    generator = torch.Generator().manual_seed(0)
    for weight in holder.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    holder.requires_grad_(False)
    return install_experts(holder, "layer", TOP_K)["layer.experts"]


def adapter(layer: LoraExperts, layout: str, rank: int, seed: int, trains: bool = True) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = layer.shapes(layout, rank)
    pairs = {p: (torch.randn(s.a, generator=generator) * 0.2, torch.randn(s.b, generator=generator) * 0.2) for p, s in shapes.items()}
    grads = {p: (torch.zeros_like(a), torch.zeros_like(b)) for p, (a, b) in pairs.items()} if trains else None
    return AdapterWeights(f"{layout}-{seed}", 0.9, pairs, grads, expert_scale=1.3 / rank)


def plain(layer: LoraExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """One token and one expert after the other, with W + scale · B A as a matrix."""
    rows = []
    for t in range(len(x)):
        segment = next(s for s in segments if s.start <= t < s.stop)
        total = torch.zeros(HIDDEN)
        for k in range(TOP_K):
            e = int(ids[t, k])
            up, down = layer.up.weight[e].clone(), layer.down.weight[e].clone()
            if segment.adapter is not None:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    if (pair := segment.adapter.pairs.get(f"layer.experts.{name}")) is None:
                        continue
                    a, b = (m if m.ndim == 2 else m[e] for m in pair)
                    target = down if name == "down_proj" else up[layer.columns[name]]
                    target += segment.adapter.expert_scale * (b @ a)
            u = up @ x[t] if layer.up.bias is None else up @ x[t] + layer.up.bias[e]
            h = layer._activate(u[None])[0]
            y = down @ h if layer.down.bias is None else down @ h + layer.down.bias[e]
            total = total + weights[t, k] * y
        rows.append(total)
    return torch.stack(rows)


def routed(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(TOKENS)])  # the last expert gets none
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return x, ids, weights


def run(layer: LoraExperts, segments: list[Segment], *args: torch.Tensor) -> torch.Tensor:
    active_segments.current = segments
    try:
        return layer(*args)
    finally:
        active_segments.current = []


@pytest.fixture(params=["loop", "grouped"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loop of a CPU and the grouped products of a GPU, which torch computes on a CPU as well."""
    monkeypatch.setattr(grouped, "runs_fused", lambda x: request.param == "grouped")
    return str(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_autograd(family: str, layout: str, kernels: str) -> None:
    layer = made(family)
    first, second = adapter(layer, layout, 5, 1), adapter(layer, "per_expert", 2, 2)
    segments = [Segment(first, 0, 7), Segment(None, 7, 10), Segment(second, 10, 16), Segment(first, 16, TOKENS)]
    x, ids, weights = routed()
    out_grad = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9))

    mine_x, mine_w = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(layer, segments, mine_x, ids, mine_w)
    y.backward(out_grad)

    leaves = [m.requires_grad_() for who in (first, second) for pair in who.pairs.values() for m in pair]
    ref_x, ref_w = x.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = plain(layer, ref_x, ids, ref_w, segments)
    expected.backward(out_grad)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine_x.grad, ref_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine_w.grad, ref_w.grad, rtol=1e-4, atol=1e-5)
    buffers = [g for who in (first, second) for pair in (who.grads or {}).values() for g in pair]
    for buffer, leaf in zip(buffers, leaves, strict=True):
        torch.testing.assert_close(buffer, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_products_equal_the_loop_and_are_recorded(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fused in (True, False):
        monkeypatch.setattr(grouped, "runs_fused", lambda x, fused=fused: fused)
        holder = nn.ModuleDict({"experts": made("qwen3").inner}).to("cuda", torch.bfloat16)
        layer = install_experts(holder, "layer", TOP_K)["layer.experts"]
        who = adapter(layer, layout, 5, 1)
        who.pairs = {path: (a.cuda().bfloat16(), b.cuda().bfloat16()) for path, (a, b) in who.pairs.items()}
        who.grads = {path: (torch.zeros_like(a).float(), torch.zeros_like(b).float()) for path, (a, b) in who.pairs.items()}
        x, ids, weights = (tensor.cuda() for tensor in routed())
        x = x.bfloat16().requires_grad_()
        segments = [Segment(who, 0, 11), Segment(None, 11, TOKENS)]
        y = run(layer, segments, x, ids, weights)
        y.backward(torch.ones_like(y))
        found.append([y.detach(), x.grad, *(g for pair in who.grads.values() for g in pair)])
        if fused:
            with torch.inference_mode():
                run(layer, segments, x, ids, weights)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    recorded = run(layer, segments, x, ids, weights)
                graph.replay()
                assert torch.equal(recorded, y.detach())
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("tokens", [3, 60])
def test_packed_experts_in_runs_equal_one_by_one(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes them, many experts in a run, some without rows between; the last run is shorter."""
    num, generator = 21, torch.Generator().manual_seed(4)
    weight = pack(torch.randn(num, 48, 64, generator=generator))
    stack = PackedStack(weight, torch.randn(num, 48, generator=generator))
    pairs = grouped.Pairs(torch.randint(0, num, (tokens, 2), generator=generator), num)
    x, dy = torch.randn(2 * tokens, 64, generator=generator), torch.randn(2 * tokens, 48, generator=generator)
    plain_y, plain_dx = stack.product(x, pairs), stack.back(dy, pairs)
    monkeypatch.setattr(grouped, "runs_fused", lambda x: True)
    assert sum(part.stop - part.start for part, _, _ in runs(pairs)) == len(pairs.spans)
    torch.testing.assert_close(stack.product(x, pairs), plain_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stack.back(dy, pairs), plain_dx, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int4_is_unpacked_to_the_same_bits_on_a_gpu(dtype: torch.dtype) -> None:
    here = pack(torch.randn(3, 50, 96, generator=torch.Generator().manual_seed(1)).to(dtype))
    there = pack(torch.zeros(3, 50, 96, dtype=dtype)).to("cuda")
    there.load_state_dict(here.state_dict())
    for part in (None, 1, slice(1, 3)):
        assert torch.equal(there.dense(part).cpu(), here.dense(part))
