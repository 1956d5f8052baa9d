"""The layer of experts on a GPU against float32 on the CPU; a small model's sampler against its trainer. Part of gpu_experts.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_common import DEVICE, GROUP, new_adapter, published, random_model, served
from benchmarks.gpu_engine import sample_all, settings, train_once
from everlearn.engine.sampler import Sampler
from everlearn.engine.trainer import Trainer
from everlearn.models.experts import LAYOUTS, LoraExperts
from everlearn.models.lora import AdapterWeights, Segment, active_segments
from everlearn.models.quant_int4 import pack
from everlearn.types import Array, Datum


def one_layer(device: torch.device, dtype: torch.dtype, layout: str, int4: bool) -> list[torch.Tensor]:
    """y, dx, dw and the flat gradient of a layer of 16 experts, 4 a token, with tokens of two adapters and of none."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    hidden, inner, num, k, tokens = 256, 128, 16, 4, 300
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16).to(device, dtype)

    module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=num))
    for name, shape in (("gate_up_proj", (num, 2 * inner, hidden)), ("down_proj", (num, hidden, inner))):
        weight = draw(*shape, std=0.06)
        del module._parameters[name]
        if int4:
            packed = pack(weight.cpu().bfloat16(), GROUP).to(device)
            packed.dtype = dtype
            setattr(module, name, packed)
        else:
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    layer = LoraExperts(module, "layer.experts", k)
    adapters, buffers = [], []
    for rank in (8, 4):
        pairs = {p: (draw(*s.a, std=0.06), draw(*s.b, std=0.06)) for p, s in layer.shapes(layout, rank).items()}
        grads = {p: (torch.zeros_like(a, dtype=torch.float32), torch.zeros_like(b, dtype=torch.float32)) for p, (a, b) in pairs.items()}
        adapters.append(AdapterWeights(str(rank), 2.0, pairs, grads))
        buffers += [m for pair in grads.values() for m in pair]
    x, dy = draw(tokens, hidden, std=1.0).requires_grad_(), draw(tokens, hidden, std=1.0)
    ids = torch.stack([torch.randperm(num - 1, generator=generator)[:k] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, k, generator=generator).to(torch.bfloat16).to(device, dtype).requires_grad_()
    active_segments.current = [Segment(adapters[0], 0, 140), Segment(None, 140, 180), Segment(adapters[1], 180, tokens)]
    y = layer(x, ids, weights)
    y.backward(dy)
    active_segments.current = []
    assert x.grad is not None and weights.grad is not None
    return [t.detach().float().cpu().flatten() for t in (y, x.grad, weights.grad, torch.cat([m.flatten() for m in buffers]))]


def check(config: Any) -> dict[str, Any]:
    """Relative errors of each layout; `config` is that of the small model. Raises where one is beyond rounding."""
    out: dict[str, Any] = {"unpacked_int4_equals_cpu": check_unpacking()}
    cpu, names = torch.device("cpu"), ("y", "dx", "dweights", "adapter")
    for layout, int4 in [(layout, False) for layout in LAYOUTS] + [("shared_outer", True)]:
        expected = one_layer(cpu, torch.float32, layout, int4)
        for dtype in (torch.float32, torch.bfloat16):
            got = one_layer(DEVICE, dtype, layout, int4)
            errors = [float((g - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)]
            out[f"{layout}{', INT4' * int4}, {dtype}"] = dict(zip(names, errors, strict=True))
            if not max(errors) < (1e-4 if dtype == torch.float32 else 2e-2):
                raise RuntimeError(f"{layout} {dtype} is wrong: {errors}")
    out["model"] = check_model(config)
    return out


def check_unpacking() -> dict[str, bool]:
    """Bit for bit, whole, one expert, and a size that fills no block; scales of each type that is shipped."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for scale in (torch.bfloat16, torch.float16, torch.float32):
            here = pack(torch.randn(3, 50, 96, dtype=dtype), GROUP, scale)
            there = pack(torch.zeros(3, 50, 96, dtype=dtype), GROUP, scale).to(DEVICE)
            there.load_state_dict(here.state_dict())
            found[f"{dtype}, scales {scale}"] = all(torch.equal(there.dense(p).cpu(), here.dense(p)) for p in (None, 1, slice(1, 3)))
    if not all(found.values()):
        raise RuntimeError(f"INT4 is unpacked to other values: {found}")
    return found


def check_model(config: Any) -> dict[str, float]:
    """A small model in the device's type: what it samples against what it then computes in training."""
    base = served(random_model(config))
    adapter = new_adapter(base, "shared_outer", 8)
    bank = published(adapter)
    prompts = [np.random.default_rng(i).integers(0, 512, 20 + i) for i in range(8)]
    results = sample_all(Sampler(base, settings(4096), bank), prompts, 24, "v1")
    gaps = []
    for i, prompt in enumerate(prompts):
        drawn = results[str(i)].sequences[0]
        row = np.concatenate([prompt, drawn.tokens.numpy()]).astype(np.int64)
        inputs = {"target_tokens": Array.of(row[1:]), "weights": Array.of(np.ones(len(row) - 1, np.float32))}
        again = train_once(Trainer(base, 256), adapter, [Datum(Array.of(row[:-1].astype(np.int32)), inputs)])[0]
        gaps += list(np.abs(again[len(prompt) - 1 :] - drawn.logprobs.numpy()))
    return {"sampler_trainer_mean_abs": float(np.mean(gaps)), "sampler_trainer_max_abs": float(np.max(gaps))}
