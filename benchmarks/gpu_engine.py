#!/usr/bin/env python3
"""The engine on a GPU: first right, then timed, beside transformers + PEFT.

    python benchmarks/gpu_engine.py --out results.json [--shape qwen3-8b] [--check-only]

1. A small random Qwen3 on the device in its own type (bfloat16 on a GPU) and in float32, against a float32 CPU reference: training
   log-probabilities, LoRA gradients, sampled log-probabilities against the trainer's.
2. The ceilings of this card: a large matrix product, a large copy.
3. A Qwen3-8B shape with random weights: LoRA r=32 on all linear layers (training tokens a second, useful FLOPs as a share of the
   ceiling, peak memory) and decoding 64 sequences of prompt 256 (new tokens a second), through everlearn's own classes; the same
   work by transformers + PEFT in the same run.

It needs torch, transformers, safetensors, numpy, msgspec and pydantic (and peft for the peer), not the server's packages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import origin
from everlearn.config import EngineSettings, Settings
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.protocol import Completed, ForwardBackward, Sample
from everlearn.engine.sampler import Sampler
from everlearn.engine.trainer import Trainer
from everlearn.models.bank import Bank
from everlearn.models.load import BaseModel, wrap
from everlearn.types import AdamParams, Array, BaseModelInfo, Datum, LoraSpec, SamplingParams

SHAPES: dict[str, dict[str, int]] = {
    "small": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=2048
    ),
    "qwen3-8b": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936
    ),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen3 of that shape with random weights, made on the device: normal(0, 0.02) but for the norms, which are 1."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPES[shape], head_dim=128 if shape != "small" else 64, max_position_embeddings=8192, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def served(model: Any, device: torch.device, dtype: torch.dtype) -> BaseModel:
    info = BaseModelInfo("random", "", [], "Qwen3ForCausalLM", model.config.vocab_size, 8192, [])
    return wrap(info, model, device, dtype)


def make_data(num: int, length: int, vocab: int, seed: int = 0) -> list[Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(num):
        row = rng.integers(0, vocab, length + 1)
        inputs = {"target_tokens": Array.of(row[1:].astype(np.int64)), "weights": Array.of(np.ones(length, np.float32))}
        data.append(Datum(Array.of(row[:-1].astype(np.int32)), inputs))
    return data


def new_adapter(base: BaseModel, rank: int, unembed: bool) -> TrainingAdapter:
    spec = LoraSpec(rank=rank, seed=1, train_unembed=unembed)
    adapter = TrainingAdapter("run", "bench", "random", spec, base.adapter_shapes(spec), base.device, base.dtype)
    generator = torch.Generator().manual_seed(2)
    for _, b in adapter.pairs().values():  # B is zero at birth; a random B makes every gradient count
        b.copy_(0.02 * torch.randn(b.shape, generator=generator))
    adapter.refresh()
    return adapter


def train_once(trainer: Trainer, adapter: TrainingAdapter, data: list[Datum]) -> list[np.ndarray]:
    job = trainer.start(ForwardBackward("r", "run", 1, data, "cross_entropy", {}), adapter)
    while trainer.has_work():
        trainer.run_slice()
    if job.error is not None:
        raise job.error
    return [output["logprobs"].numpy() for output in trainer.result(job).outputs]


def sample_all(sampler: Sampler, prompts: list[np.ndarray], new_tokens: int, version: str = "") -> dict[str, Any]:
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=new_tokens, seed=i)
        sampler.add(Sample(str(i), "random", version, "", "bench", Array.of(prompt.astype(np.int32)), 1, params))
    done: dict[str, Any] = {}
    while sampler.has_work():
        for event in sampler.step():
            if not isinstance(event, Completed):
                raise RuntimeError(event.message)
            done[event.request_id] = event.result
    return done


def settings(kv_tokens: int) -> Settings:
    return Settings(engine=EngineSettings(kv_tokens=kv_tokens, max_batch=64, prefill_tokens=8192))


# --- 1. right ---


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the small shape on `device` against float32 on the CPU with the same weights."""
    cpu, data = torch.device("cpu"), make_data(6, 96, 2048) + make_data(3, 40, 2048, seed=9)
    reference_model = random_model("small", cpu, torch.float32).to(dtype).float()  # the same rounded weights on both sides
    model = random_model("small", cpu, torch.float32).to(dtype).to(device)
    reference, base = served(reference_model, cpu, torch.float32), served(model, device, dtype)
    right, ours = new_adapter(reference, 8, True), new_adapter(base, 8, True)
    expected = np.concatenate(train_once(Trainer(reference, 256), right, data))
    trainer = Trainer(base, 256)
    got = np.concatenate(train_once(trainer, ours, data))
    gradient = ours.grad.to("cpu", copy=True)
    bank = Bank(4, device, dtype)
    bank.publish("v1", ours.scale, ours.pairs())
    bank.on_disk.add("v1")
    prompts = [np.random.default_rng(i).integers(0, 2048, 20 + i) for i in range(8)]
    results = sample_all(Sampler(base, settings(4096), bank), prompts, 24, "v1")
    gaps = []
    for i, prompt in enumerate(prompts):
        drawn = results[str(i)].sequences[0]
        row = np.concatenate([prompt, drawn.tokens.numpy()]).astype(np.int64)
        inputs = {"target_tokens": Array.of(row[1:]), "weights": Array.of(np.ones(len(row) - 1, np.float32))}
        again = train_once(trainer, ours, [Datum(Array.of(row[:-1].astype(np.int32)), inputs)])[0]
        gaps.append(np.abs(again[len(prompt) - 1 :] - drawn.logprobs.numpy()).max())
    return {
        "logprob_max_abs": float(np.abs(got - expected).max()),
        "logprob_relative": float(np.linalg.norm(got - expected) / np.linalg.norm(expected)),
        "gradient_relative": float((gradient - right.grad).norm() / right.grad.norm()),
        "sampler_trainer_max_abs": float(max(gaps)),
    }


# --- 2. ceilings ---


def timed(device: torch.device, run: Any, repeats: int) -> list[float]:
    """Seconds of each run, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def ceilings(device: torch.device) -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(timed(device, lambda: a @ b, 20))
    source = torch.empty(2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(timed(device, lambda: target.copy_(source), 10))
    return {"matmul_tflops": 2 * 8192**3 / product / 1e12, "copy_tb_s": 2 * 2**32 / copy / 1e12}


# --- 3. timed ---


def bench_everlearn(model: Any, device: torch.device, lengths: tuple[int, int], decode: tuple[int, int, int]) -> dict[str, Any]:
    base = served(model, device, torch.bfloat16)
    num, length = lengths
    data = make_data(num, length, base.vocab_size)
    out: dict[str, Any] = {}
    adapter = new_adapter(base, 32, False)
    trainer = Trainer(base, num * length)
    torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        train_once(trainer, adapter, data)
        adapter.optim_step(AdamParams())

    seconds = timed(device, step, 3)
    out["train"] = dict(tokens=num * length, seconds=seconds, peak_gib=torch.cuda.max_memory_allocated(device) / 2**30)
    bank = Bank(4, device, torch.bfloat16)
    bank.publish("v1", adapter.scale, adapter.pairs())
    bank.on_disk.add("v1")
    num, prompt, new = decode
    prompts = [np.random.default_rng(i).integers(0, base.vocab_size, prompt) for i in range(num)]
    sampler = Sampler(base, settings(num * (prompt + new + 16)), bank)
    for version in ("", "v1"):
        sample_all(sampler, prompts[:4], 8, version)
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        sample_all(sampler, [np.flip(p).copy() for p in prompts], new, version)
        torch.cuda.synchronize(device)
        out["sample_adapter" if version else "sample_base"] = dict(tokens=num * new, seconds=[time.perf_counter() - started])
    return out


def bench_peer(model: Any, device: torch.device, lengths: tuple[int, int], decode: tuple[int, int, int]) -> dict[str, Any]:
    """transformers + PEFT: the same rank and layers, gradient checkpointing where it would not fit otherwise; `generate`."""
    from peft import LoraConfig, get_peft_model

    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which everlearn switches off for itself
    out: dict[str, Any] = {}
    num, prompt, new = decode
    ids = torch.randint(0, model.config.vocab_size, (num, prompt), device=device)
    with torch.inference_mode():
        model.generate(ids[:2], max_new_tokens=4, do_sample=True, eos_token_id=None, pad_token_id=0)
        seconds = timed(device, lambda: model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=True, pad_token_id=0), 1)
    out["sample_base"] = dict(tokens=num * new, seconds=seconds)
    peer = get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS))
    peer.enable_input_require_grads()
    peer.gradient_checkpointing_enable()
    peer.train()
    num, length = lengths
    rows = torch.randint(0, model.config.vocab_size, (num, length), device=device)
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)
    torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        peer(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(device, step, 2)
    out["train"] = dict(tokens=num * length, seconds=seconds, peak_gib=torch.cuda.max_memory_allocated(device) / 2**30)
    return out


def report(results: dict[str, Any]) -> None:
    shape = SHAPES[results["shape"]]
    linear = (
        shape["num_hidden_layers"]
        * shape["hidden_size"]
        * (128 * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]) + 3 * shape["intermediate_size"])
    )
    weights = linear + shape["vocab_size"] * shape["hidden_size"]
    for who in ("everlearn", "peer"):
        for phase, run in results.get(who, {}).items():
            rate = run["tokens"] / statistics.median(run["seconds"])
            run["tokens_per_second"] = rate
            line = f"{who:10} {phase:15} {rate:10.0f} tok/s"
            if phase == "train":
                run["share_of_ceiling"] = 4 * weights * rate / (results["ceilings"]["matmul_tflops"] * 1e12)
                line += f"  {100 * run['share_of_ceiling']:.0f} % of the matmul ceiling in useful FLOPs (4N), {run['peak_gib']:.0f} GiB"
            print(line)
    if "peer" in results:
        for phase in ("train", "sample_base"):
            ratio = results["everlearn"][phase]["tokens_per_second"] / results["peer"][phase]["tokens_per_second"]
            print(f"ratio everlearn / peer, {phase}: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_engine.json"))
    parser.add_argument("--shape", default="qwen3-8b", choices=list(SHAPES))
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--commit", default="", help="the code's commit, where it isn't measured in a git checkout")
    parser.add_argument("--train", default="8x2048", help="sequences x length")
    parser.add_argument("--decode", default="64x256x128", help="sequences x prompt x new tokens")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"shape": args.shape, "checks": {}}
    record = origin("gpu-engine", args.commit) | {"results": results}
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else []):
        results["checks"][str(dtype)] = check(device, dtype)
        print(f"check {dtype} on {device} against float32 on the CPU: {results['checks'][str(dtype)]}", flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if not args.check_only and device.type == "cuda":
        lengths, decode = tuple(map(int, args.train.split("x"))), tuple(map(int, args.decode.split("x")))
        results["ceilings"] = ceilings(device)
        print(results["ceilings"], flush=True)
        results["everlearn"] = bench_everlearn(random_model(args.shape, device, torch.bfloat16), device, lengths, decode)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()
        try:
            results["peer"] = bench_peer(random_model(args.shape, device, torch.bfloat16), device, lengths, decode)
        except ImportError as error:
            print(f"no peer: {error}")
        report(results)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
