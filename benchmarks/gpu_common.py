"""What the benchmarks of experts on a GPU share: memory and time of the device, random models of true size, adapters."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from everlearn.engine.adapter import TrainingAdapter
from everlearn.models.architecture import auto_class
from everlearn.models.bank import Bank
from everlearn.models.load import BaseModel, wrap
from everlearn.models.quant_int4 import Int4Weight
from everlearn.models.weights import without_memory
from everlearn.types import BaseModelInfo, LoraSpec

GROUP = 32
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32


# --- device ---


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def start_memory(bound: float | None) -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (bound or total) / total))
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, float]:
    """Peaks in GB (1e9 bytes): in tensors, taken by the allocator (what the bound limits); and what the whole device holds now."""
    if not GPU:
        return {"peak_gb": 0.0, "peak_reserved_gb": 0.0, "device_gb": 0.0}
    free, total = torch.cuda.mem_get_info()
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free
    return dict(zip(("peak_gb", "peak_reserved_gb", "device_gb"), (round(p / 1e9, 2) for p in peaks), strict=True))


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        sync()
        started = time.perf_counter()
        run()
        sync()
        seconds.append(round(time.perf_counter() - started, 5))
    return seconds


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of device time by kernel (the longest 14), their sum, and how often the host waited for the device."""
    if not GPU:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        sync()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return {
        "host_waits": len(caught),
        "device_ms": round(sum(row.self_device_time_total for row in rows) / 1e3, 2),
        "kernels": {f"{row.key[:110]} x{row.count}": round(row.self_device_time_total / 1e3, 2) for row in rows[:14]},
    }


# --- models ---


def random_model(config: Any, int4: bool = False) -> Any:
    """A model of that configuration on the device, filled matrix by matrix: normal(0, 0.02), norms 1; its stacks of experts, where
    `int4`, random packed words. No weight exists twice."""
    torch.manual_seed(0)
    with without_memory(), torch.device(DEVICE):
        model = auto_class(config).from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if int4 and parameter.ndim == 3:
                weight = Int4Weight(tuple(parameter.shape), GROUP, DTYPE, torch.bfloat16, DEVICE)
                weight.packed.random_(0, 256)
                weight.scale.uniform_(0.002, 0.006)
                del module._parameters[name]
                setattr(module, name, weight)
                continue
            value = torch.empty(parameter.shape, dtype=DTYPE, device=DEVICE)
            module._parameters[name] = torch.nn.Parameter(
                value.fill_(1) if value.ndim == 1 else value.normal_(0, 0.02), requires_grad=False
            )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    return model.eval()


def served(model: Any) -> BaseModel:
    info = BaseModelInfo("random", "", [], type(model).__name__, model.config.vocab_size, 8192, [])
    return wrap(info, model, DEVICE, DTYPE)


def new_adapter(base: BaseModel, layout: str, rank: int) -> TrainingAdapter:
    """On attention and experts; B is random, so that every gradient counts."""
    spec = LoraSpec(rank=rank, seed=1, train_unembed=False, expert_lora=layout)  # type: ignore[arg-type]
    adapter = TrainingAdapter("run", "bench", "random", spec, base.adapter_shapes(spec), base.device, base.dtype)
    for _, b in adapter.pairs().values():
        b.normal_(0, 0.02)
    adapter.refresh()
    return adapter


def published(adapter: TrainingAdapter) -> Bank:
    bank = Bank(4, DEVICE, DTYPE)
    bank.publish("v1", adapter.scale, adapter.pairs(), adapter.expert_scale)
    bank.on_disk.add("v1")
    return bank
