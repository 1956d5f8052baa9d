"""Images on a GPU: half precision, images that the tower sees together, recorded decoding steps behind them. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.trainer import Trainer
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.types import LoraSpec
from tests.engine import harness
from tests.engine.sampling import make_sampler, request, run
from tests.engine.test_sampler_vision import prompts, trainer_logprobs
from tests.models.test_vision import datum_of, own_logprobs, rows
from tests.tiny_vision import make_tiny_vision_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("models") / "tiny-vl")


def loaded(folder: Path, dtype: torch.dtype, device: torch.device = GPU) -> BaseModel:
    return load_base(read_info("tiny", folder, []), device, dtype)


def adapter_of(base: BaseModel) -> TrainingAdapter:
    """One that changes the tower too; the same numbers on every device."""
    spec = LoraSpec(rank=4, seed=7, train_vision=True)
    adapter = TrainingAdapter("run", "default", "tiny", spec, base.adapter_shapes(spec), base.device, base.dtype)
    adapter.params += 0.05 * torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(2)).to(base.device)
    adapter.refresh()
    return adapter


def test_logits_are_those_of_transformers(folder: Path):
    from transformers import Qwen3VLForConditionalGeneration

    plain = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    base = loaded(folder, torch.float32)
    packed = harness.forward_backward(Trainer(base, 512), harness.adapter(base), [datum_of(row) for row in rows()], forward_only=True)
    for row, output in zip(rows(), packed.outputs, strict=True):
        with torch.no_grad():
            wanted = own_logprobs(plain, row)
        np.testing.assert_allclose(output["logprobs"].numpy(), wanted.numpy(), atol=1e-4)


def test_gradients_through_the_tower_are_those_of_a_cpu(folder: Path):
    found = []
    for device in (GPU, torch.device("cpu")):
        base = loaded(folder, torch.float32, device)
        adapter = adapter_of(base)
        harness.forward_backward(Trainer(base, 512), adapter, [datum_of(row, seed) for seed, row in enumerate(rows())])
        found.append(adapter.grad.cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_sampler_agrees_with_the_trainer(folder: Path, dtype: torch.dtype, bound: float):
    base = loaded(folder, dtype)
    adapter = adapter_of(base)
    sampler = make_sampler(base, prefill_tokens=23)
    sampler.bank.publish("run@1", adapter.scale, adapter.pairs())
    wanted = [request(f"{i}", prompt, 24, images=images, version="run@1") for i, (prompt, images) in enumerate(prompts())]
    answers = run(sampler, *wanted)
    assert sampler.graphs is not None and sampler.graphs.recordings, "decoding was recorded"
    gaps = []
    for i, (prompt, images) in enumerate(prompts()):
        sequence = answers[f"{i}"].sequences[0]
        said = trainer_logprobs(base, adapter, prompt, images, sequence.tokens.numpy().tolist())
        gaps.append(np.abs(sequence.logprobs.numpy() - said[len(prompt) - 1 :]))
    print(f"{dtype}: largest {np.concatenate(gaps).max():.2e}, mean {np.concatenate(gaps).mean():.2e}")
    assert np.concatenate(gaps).mean() <= bound
