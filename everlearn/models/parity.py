"""The proof of an export: the folder is loaded as its user would load it, and its log-probabilities are held against everlearn's own.

Imports torch, transformers and (for adapters) peft.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from everlearn.models.attention import PackedBatch
from everlearn.models.export import Adapter, weight_files
from everlearn.models.load import BaseModel, load_base
from everlearn.models.lora import AdapterWeights, Segment, expert_scale
from everlearn.types import BaseModelInfo

TEXTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) +",
    "12 + 30 = 42; 7 * 8 =",
)
# Share of the adapter's own effect (at least of one nat). In float32 only the order of sums differs; weights stored in half
# precision are rounded copies.
TOLERANCE = {"F32": 1e-3, "F16": 0.02, "BF16": 0.2}


class Parity(NamedTuple):
    """`difference`: largest |Δ log-probability| over every token of the vocabulary at `positions` positions. `effect`: how far
    the adapter itself moves the base model there, so that a difference of zero isn't that of an adapter that does nothing."""

    difference: float
    effect: float
    positions: int
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance * max(1.0, self.effect)


def check(form: str, folder: Path, adapter: Adapter, base: BaseModelInfo) -> Parity:
    """Compares the exported `folder` (`form` peft or merged) with `adapter` on `base`, in float32 on the CPU."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a tied head; export_peft has said so already
        ours = load_base(base, torch.device("cpu"), torch.float32)
        prompts = _prompts(ours)
        expected = _everlearn(ours, adapter, prompts)
        plain = _everlearn(ours, None, prompts)
        del ours
        model = _load_peft(folder, base) if form == "peft" else _load(folder)
        found = torch.cat([torch.log_softmax(model(input_ids=ids.unsqueeze(0)).logits[0].float(), dim=-1) for ids in prompts])
    stored = {file.dtype(name) for name, file in weight_files(folder).items()}
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in stored)
    return Parity((found - expected).abs().max().item(), (plain - expected).abs().max().item(), expected.shape[0], tolerance)


def _prompts(base: BaseModel) -> list[torch.Tensor]:
    if base.tokenizer is not None:
        return [torch.tensor(base.tokenizer.encode(text).ids) for text in TEXTS]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(base.vocab_size, (12,), generator=generator) for _ in TEXTS]


def _everlearn(base: BaseModel, adapter: Adapter | None, prompts: list[torch.Tensor]) -> torch.Tensor:
    weights = None
    if adapter is not None:
        pairs = {path: tuple(torch.from_numpy(matrix.copy()) for matrix in adapter.pair(path)) for path in adapter.paths}
        scale = expert_scale(adapter.alpha, pairs)  # type: ignore[arg-type]
        weights = AdapterWeights("export", adapter.scale, pairs, expert_scale=scale)  # type: ignore[arg-type]
    tokens = torch.cat(prompts)
    segments = [Segment(weights, 0, len(tokens))]
    positions = torch.cat([torch.arange(len(ids)) for ids in prompts])
    hidden = base.hidden(tokens, positions, PackedBatch([len(ids) for ids in prompts], segments))
    return torch.log_softmax(base.head.logits(hidden, segments), dim=-1)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    return model.float().eval()


def _load_peft(folder: Path, base: BaseModelInfo) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_load(Path(base.path)), folder).eval()
