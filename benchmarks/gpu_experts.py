#!/usr/bin/env python3
"""LoRA on experts on one GPU: first right, then timed at true sizes within the memory of an 80 GB card.

    python benchmarks/gpu_experts.py --out results.json [--parts check,kimi,qwen,peer] [--tiny]

check  One layer of experts on the device against the same layer in float32 on the CPU, each layout and INT4 experts: output, gradients of
       hidden states, routing weights and adapter. A small Qwen3-MoE in float32 on both, and its sampler against its trainer.
kimi   Two layers of Kimi K2's configuration, random INT4 experts in groups of 32, rank-32 adapters: forward and backward of 4,096 tokens.
qwen   Qwen3-30B-A3B's configuration with random bfloat16 weights: training of 4 x 2,048 tokens with recomputation, for several layouts
       and ranks; sampling of 32 sequences. 80e9 bytes is a bound that the allocator enforces; a run without it says so.
peer   transformers + PEFT on the same model (target_parameters on both stacks), within the bound and without.

Roofline of training: a frozen weight costs 2 FLOPs a token forward and 2 backward, an adapter's 2 and 4; an expert's weights count
for the share of experts that a token meets. Recomputation (2 more) and attention's scores are not counted as useful. The ceiling is a
large bfloat16 matrix product on this card. Roofline of a decoding step: all weights are read once from memory (32 x 8 choices meet
nearly all of 128 experts).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import origin
from benchmarks.gpu_common import DEVICE, DTYPE, GPU, memory, new_adapter, profile, published, random_model, served, start_memory, timed
from benchmarks.gpu_engine import ceilings, make_data, sample_all, settings, train_once
from benchmarks.gpu_experts_check import check
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.sampler import Sampler
from everlearn.engine.trainer import Trainer
from everlearn.models.architecture import read_config
from everlearn.models.attention import PackedBatch, running
from everlearn.models.load import BaseModel
from everlearn.models.lora import Segment
from everlearn.types import AdamParams

CONFIGS = Path(__file__).parent.parent / "tests" / "models" / "configs"
BOUND = 80e9  # bytes
RANK = 32
TINY = dict(hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=512, max_position_embeddings=1024)
TINY_QWEN = TINY | dict(num_experts=8, num_experts_per_tok=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY_KIMI = TINY | dict(n_routed_experts=8, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, pad_token_id=0)


# --- useful work ---


def work(base: BaseModel, adapter: TrainingAdapter) -> dict[str, float]:
    """Weights that one token meets, of the frozen ones and of the adapter; useful FLOPs of a trained token, head included."""
    experts = list(base.expert_modules.values())
    share = experts[0].top_k / experts[0].num_experts
    frozen = sum(np.prod(layer.weight.shape) for layer in base.lora_modules.values())
    frozen += sum(np.prod(stack.shape) * share for layer in experts for stack in (layer.up, layer.down))
    frozen += len(experts) * experts[0].num_experts * base.hidden_size  # routers
    head = base.vocab_size * base.hidden_size
    low = sum(m.numel() * (share if m.ndim == 3 else 1) for pair in adapter.pairs().values() for m in pair)
    return {"frozen": float(frozen), "head": float(head), "adapter": float(low), "flops": float(4 * (frozen + head) + 6 * low)}


# --- kimi ---


def kimi(tiny: bool, tokens: int = 4096, layers: int = 2) -> dict[str, Any]:
    config = read_config(CONFIGS / "kimi-k2-thinking.json")
    config.update(dict(num_hidden_layers=layers, first_k_dense_replace=0) | (TINY_KIMI if tiny else {}))
    tokens = 64 if tiny else tokens
    start_memory(BOUND)
    base = served(random_model(config, int4=True))
    experts = list(base.expert_modules.values())
    stacks = [stack.weight for layer in experts for stack in (layer.up, layer.down)]
    out: dict[str, Any] = {"tokens": tokens, "layers": layers, "experts_gb_a_layer": sum(s.nbytes for s in stacks) / layers / 1e9}
    other = sum(layer.weight.nbytes for layer in base.lora_modules.values())
    out["attention_and_shared_experts_gb_a_layer"] = other / layers / 1e9
    adapter = new_adapter(base, "shared_outer", RANK)
    out["adapter_parameters_a_layer"] = adapter.params.numel() / layers
    batch = PackedBatch([tokens], [Segment(adapter.training_weights(adapter.grad), 0, tokens)])
    ids, places = torch.randint(0, base.vocab_size, (tokens,), device=DEVICE), torch.arange(tokens, device=DEVICE)
    held: list[torch.Tensor] = []

    def forward() -> None:
        held.clear()
        with torch.enable_grad():
            held.append(base.hidden(ids, places, batch))

    def backward() -> None:
        with running(batch):
            held.pop().backward(torch.full((tokens, base.hidden_size), 1e-3, dtype=DTYPE, device=DEVICE))

    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    before = torch.cuda.memory_allocated() if GPU else 0
    for _ in range(4):
        seconds["forward"] += timed(forward, 1)
        out["kept_for_backward_gb_a_layer"] = ((torch.cuda.memory_allocated() if GPU else 0) - before) / layers / 1e9
        seconds["backward"] += timed(backward, 1)
    for name, found in seconds.items():
        out[f"{name}_ms_a_layer"] = 1e3 * statistics.median(found[1:]) / layers
    flops = work(base, adapter)
    useful = tokens * (4 * flops["frozen"] + 6 * flops["adapter"]) / layers
    rate = useful / ((out["forward_ms_a_layer"] + out["backward_ms_a_layer"]) / 1e3)
    out |= {"seconds": seconds, "useful_tflops_a_layer": useful / 1e12, "tflop_s": rate / 1e12, **memory()}
    out["base_gb"] = before / 1e9
    out["unpack_ms_an_expert"] = 1e3 * min(timed(lambda: [s.dense(1) for s in stacks[:2]], 5))
    out["gradient_is_finite"] = bool(torch.isfinite(adapter.grad).all()) and bool((adapter.grad != 0).any())
    out["profile"] = profile(lambda: (forward(), backward()))
    return out


# --- qwen ---

# Layout, rank, bound, tokens of a packed row.
RUNS: list[tuple[str, int, float | None, int]] = [
    ("shared_outer", RANK, BOUND, 8192),
    ("rank_split", RANK, BOUND, 8192),
    ("per_expert", RANK // 2, BOUND, 4096),
    ("per_expert", RANK, BOUND, 4096),
    ("per_expert", RANK, None, 8192),
]


def qwen_config(tiny: bool) -> Any:
    config = read_config(CONFIGS / "qwen3-30b-a3b.json")
    config.update(TINY_QWEN if tiny else {})
    return config


def qwen(tiny: bool) -> dict[str, Any]:
    start_memory(BOUND)
    seconds: list[float] = []
    made: list[Any] = []
    seconds += timed(lambda: made.append(random_model(qwen_config(tiny))), 1)
    base = served(made.pop())
    base.enable_recompute()
    out: dict[str, Any] = {"make_weights_seconds": seconds, "parameters": base.num_parameters, "weights": memory(), "runs": []}
    lengths = (2, 32) if tiny else (4, 2048)
    for run in RUNS:
        row: dict[str, Any] = dict(zip(("layout", "rank", "bound_bytes", "row_tokens"), run, strict=True))
        out["runs"].append(row)
        try:
            row |= one_run(base, run, lengths, tiny)
        except Exception as error:
            row |= {"error": f"{type(error).__name__}: {str(error)[:500]}", **memory()}
        print(json.dumps(row), flush=True)
    return out


def one_run(base: BaseModel, run: tuple[str, int, float | None, int], lengths: tuple[int, int], tiny: bool) -> dict[str, Any]:
    layout, rank, bound, row_tokens = run
    start_memory(bound)
    num, length = lengths
    adapter = new_adapter(base, layout, rank)
    trainer, data = Trainer(base, row_tokens), make_data(num, length, base.vocab_size)

    def step() -> None:
        train_once(trainer, adapter, data)
        adapter.optim_step(AdamParams())

    step()
    seconds = timed(step, 4)
    flops, rate = work(base, adapter), num * length / statistics.median(seconds)
    out: dict[str, Any] = {"tokens": num * length, "seconds": seconds, "adapter_parameters": adapter.params.numel(), "work": flops}
    out |= {"train_tokens_per_second": rate, "useful_tflop_s": rate * flops["flops"] / 1e12, **memory()}
    assert bound is None or out["peak_reserved_gb"] < bound / 1e9 <= 80
    if run == RUNS[0] or bound is None:
        out["profile"] = profile(step)
    if run == RUNS[0]:
        out |= {"sample": decode(base, adapter, (4, 16, 8) if tiny else (32, 256, 128)), "with_sampling": memory()}
    return out


def decode(base: BaseModel, adapter: TrainingAdapter, size: tuple[int, int, int]) -> dict[str, Any]:
    """Beside the adapter in training, as in the engine. The time is that of the whole request, prompts included."""
    num, prompt, new = size
    bank, out = published(adapter), {}
    sampler = Sampler(base, settings(num * (prompt + new + 16)), bank)
    for version in ("", "v1"):
        prompts = [np.random.default_rng(i).integers(0, base.vocab_size, prompt) for i in range(num)]
        sample_all(sampler, [p[::-1].copy() for p in prompts], new, version)  # records the steps' graphs
        seconds = timed(lambda p=prompts, v=version: sample_all(sampler, p, new, v), 1)
        short = timed(lambda p=prompts, v=version: sample_all(sampler, [np.roll(q, 1) for q in p], 1, v), 1)
        steps = num * (new - 1) / (seconds[0] - short[0])
        name = "adapter" if version else "base"
        out[name] = {"tokens": num * new, "seconds": seconds, "prefill_seconds": short}
        out[name] |= {"tokens_per_second": num * new / seconds[0], "decode_tokens_per_second": steps}
    if GPU:
        out["profile"] = profile(lambda: sample_all(sampler, [np.roll(q, 2)[:16] for q in prompts], 16, "v1"))
    return out


# --- peer ---


def peer(tiny: bool) -> dict[str, Any]:
    cases = [(BOUND, "float32", 1), (BOUND, "bfloat16", 1), (BOUND, "bfloat16", 4), (None, "float32", 4)]
    out: dict[str, Any] = {"runs": []}
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which everlearn switches off for itself
    for bound, adapters, num in cases:
        row: dict[str, Any] = {"bound_bytes": bound, "adapters_in": adapters, "sequences": num}
        out["runs"].append(row)
        try:
            one_peer(row, bound, adapters == "float32", (num, 32 if tiny else 2048), tiny)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            traceback.clear_frames(error.__traceback__)
        row |= memory()
        print(json.dumps(row), flush=True)
    return out


def one_peer(row: dict[str, Any], bound: float | None, in_float32: bool, lengths: tuple[int, int], tiny: bool) -> None:
    """`row` says how far it came."""
    from peft import LoraConfig, get_peft_model

    start_memory(bound)
    row["stage"] = "weights"
    model = random_model(qwen_config(tiny))
    row["stage"] = "adapter"
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=in_float32)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    row["adapter_parameters"] = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=GPU)
    rows = torch.randint(0, model.config.vocab_size, lengths, device=DEVICE)

    def step() -> None:
        row["stage"] = "forward"
        loss = model(rows, labels=rows).loss
        row["stage"] = "backward"
        loss.backward()
        row["stage"] = "optimizer"
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = timed(step, 2)
    row |= {"stage": "done", "seconds": seconds, "train_tokens_per_second": lengths[0] * lengths[1] / statistics.median(seconds)}


def report(results: dict[str, Any]) -> None:
    """Rates beside the ceilings, and beside the peer."""
    top = results.get("ceilings", {}).get("matmul_tflops")
    for row in results.get("qwen", {}).get("runs", []):
        if top and "useful_tflop_s" in row:
            row["share_of_ceiling"] = row["useful_tflop_s"] / top
    if top and "tflop_s" in results.get("kimi", {}):
        results["kimi"]["share_of_ceiling"] = results["kimi"]["tflop_s"] / top


def check_part(tiny: bool) -> dict[str, Any]:
    config = read_config(CONFIGS / "qwen3-30b-a3b.json")
    config.update(TINY_QWEN | dict(hidden_size=256, moe_intermediate_size=128, head_dim=64))
    return check(config)


PARTS = {"check": check_part, "kimi": kimi, "qwen": qwen, "peer": peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_experts.json"))
    parser.add_argument("--parts", default="check,kimi,qwen,peer")
    parser.add_argument("--commit", default="", help="the code's commit, where it isn't measured in a git checkout")
    parser.add_argument("--tiny", action="store_true", help="small shapes: to try the script without a GPU")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {}
    record = origin("gpu-experts", args.commit) | {"results": results}
    if GPU:
        results["ceilings"] = ceilings(DEVICE)
    for name in args.parts.split(","):
        started = time.perf_counter()
        try:
            results[name] = PARTS[name](args.tiny)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results.setdefault("part_seconds", {})[name] = round(time.perf_counter() - started, 1)
        report(results)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(results[name], indent=1)[:6000], flush=True)


if __name__ == "__main__":
    main()
