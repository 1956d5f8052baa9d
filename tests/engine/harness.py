"""A trainer on the tiny model without processes around it, for tests of the numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.models.load import BaseModel, load_base
from everlearn.types import Array, BaseModelInfo, Datum, ForwardBackwardResult, LoraSpec

FLOAT32 = torch.float32
CPU = torch.device("cpu")
WITHOUT_XGRAMMAR = pytest.mark.skipif(
    importlib.util.find_spec("xgrammar") is None, reason="the package xgrammar isn't installed: pip install 'xgrammar>=0.2.8,<0.3'"
)
GRAMMAR_LIBRARIES = ["llguidance", pytest.param("xgrammar", marks=WITHOUT_XGRAMMAR)]


def load_tiny(folder: Path, device: torch.device = CPU) -> BaseModel:
    info = BaseModelInfo("tiny", str(folder), [], "LlamaForCausalLM", 512, 1024, [2])
    base = load_base(info, device, FLOAT32)
    base.head.tile, base.head.chunk_tokens = 100, 24  # several tiles and chunks even here
    return base


def adapter(base: BaseModel, model_id: str = "run", **lora: object) -> TrainingAdapter:
    spec = LoraSpec(**{"rank": 4, "seed": 7, **lora})  # type: ignore[arg-type]
    return TrainingAdapter(model_id, "default", "tiny", spec, base.adapter_shapes(spec), base.device, FLOAT32)


def datum(tokens: list[int], targets: list[int], **inputs: object) -> Datum:
    arrays = {"target_tokens": Array.of(np.asarray(targets, dtype=np.int64))}
    arrays |= {name: Array.of(np.asarray(values, dtype=np.float32)) for name, values in inputs.items()}
    return Datum(Array.of(np.asarray(tokens, dtype=np.int32)), arrays)


def random_datums(seed: int, lengths: list[int], vocab: int = 512) -> list[Datum]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        row = rng.integers(3, vocab, length + 1)
        weights = (rng.random(length) < 0.7).astype(np.float32)
        made.append(datum(row[:-1].tolist(), row[1:].tolist(), weights=weights))
    return made


def forward_backward(
    trainer: Trainer, who: TrainingAdapter, data: list[Datum], loss_fn: str = "cross_entropy", **more: object
) -> ForwardBackwardResult:
    job = trainer.start(ForwardBackward("req", who.model_id, 1, data, loss_fn, more.pop("config", {}), **more), who)  # type: ignore[arg-type]
    while trainer.has_work():
        trainer.run_slice()
    if job.error is not None:
        raise job.error
    return trainer.result(job)
