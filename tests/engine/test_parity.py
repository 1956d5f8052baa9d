"""What the sampler reports is what the trainer computes: on 1,000 tokens, base and adapter, whatever shares the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everlearn.config import EngineSettings, Settings
from everlearn.engine.protocol import Completed, Sample
from everlearn.engine.sampler import Sampler
from everlearn.engine.trainer import Trainer
from everlearn.models.bank import Bank
from everlearn.models.load import BaseModel
from everlearn.types import Array, SampleResult, SamplingParams
from tests.engine.harness import CPU, FLOAT32, adapter, datum, forward_backward, load_tiny
from tests.engine.test_trainer import with_random_b

NEW_TOKENS = 50


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def draw(base: BaseModel, bank: Bank, versions: list[str], max_batch: int) -> list[tuple[np.ndarray, SampleResult]]:
    sampler = Sampler(base, Settings(engine=EngineSettings(kv_tokens=4096, max_batch=max_batch, prefill_tokens=32)), bank)
    prompts = [np.random.default_rng(i).integers(3, 512, 3 + 5 * i).astype(np.int32) for i in range(len(versions))]
    for i, (prompt, version) in enumerate(zip(prompts, versions, strict=True)):
        params = SamplingParams(max_tokens=NEW_TOKENS, seed=i, temperature=0.7 + 0.1 * (i % 4), top_p=0.95)
        sampler.add(Sample(str(i), "tiny", version, "", "t", Array.of(prompt), 1, params, prompt_logprobs=True))
    results: dict[str, SampleResult] = {}
    while sampler.has_work():
        for event in sampler.step():
            assert isinstance(event, Completed), event
            assert isinstance(event.result, SampleResult)
            results[event.request_id] = event.result
    return [(prompt, results[str(i)]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("max_batch", [1, 3, 20])
def test_sampled_and_trained_logprobs_agree(base: BaseModel, max_batch: int) -> None:
    bank = Bank(8, CPU, FLOAT32)
    trainer = Trainer(base, 128)
    runs = {"": adapter(base, "zero")}  # B is zero: the base model
    for i in range(3):
        runs[f"v{i}"] = with_random_b(adapter(base, f"run{i}", rank=2 + 3 * i), i)
        bank.publish(f"v{i}", runs[f"v{i}"].scale, runs[f"v{i}"].pairs())
    versions = [["", "v0", "v1", "v2"][i % 4] for i in range(20)]
    compared = 0
    for (prompt, result), version in zip(draw(base, bank, versions, max_batch), versions, strict=True):
        drawn = result.sequences[0]
        row = np.concatenate([prompt, drawn.tokens.numpy()]).tolist()
        trained = forward_backward(trainer, runs[version], [datum(row[:-1], row[1:], weights=[1.0] * (len(row) - 1))])
        logprobs = trained.outputs[0]["logprobs"].numpy()
        np.testing.assert_allclose(drawn.logprobs.numpy(), logprobs[len(prompt) - 1 :], atol=1e-5)
        assert result.prompt_logprobs is not None
        np.testing.assert_allclose(result.prompt_logprobs.numpy()[1:], logprobs[: len(prompt) - 1], atol=1e-5)
        compared += len(row) - 1
    assert compared >= 1000
