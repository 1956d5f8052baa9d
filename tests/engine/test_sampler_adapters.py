"""The sampler and the trainer are one model: same adapter, same tokens, same log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from everlearn.engine.protocol import Failed
from everlearn.engine.trainer import Trainer
from everlearn.models.load import BaseModel
from everlearn.types import SampleResult
from tests.engine.harness import adapter, datum, forward_backward, load_tiny
from tests.engine.sampling import make_sampler, one, prompts, request, run, tokens_of


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def random_adapter(base: BaseModel, seed: int, rank: int):  # type: ignore[no-untyped-def]
    """An adapter whose B is far from zero, as if it had been trained."""
    made = adapter(base, f"run-{seed}", rank=rank, seed=seed)
    with torch.no_grad():
        for _, b in made.pairs().values():
            b.copy_(0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def test_logprobs_equal_the_trainers_on_a_thousand_tokens(base: BaseModel) -> None:
    adapters = [None, random_adapter(base, 1, 4), random_adapter(base, 2, 8), random_adapter(base, 3, 2)]
    sampler = make_sampler(base)
    for i, made in enumerate(adapters):
        if made is not None:
            sampler.bank.publish(f"v{i}", made.scale, made.pairs())
    asked = prompts(1, [int(n) for n in np.random.default_rng(0).integers(1, 30, 40)])
    answers = run(sampler, *(request(str(i), p, max_tokens=32, seed=i, version=f"v{i % 4}" if i % 4 else "") for i, p in enumerate(asked)))
    num_tokens, worst = 0, 0.0
    for i, prompt in enumerate(asked):
        who = adapters[i % 4] or adapter(base)  # a fresh adapter's B is zero: the base model
        drawn = tokens_of(answers[str(i)])
        whole = [*prompt, *drawn]
        result = forward_backward(
            Trainer(base, 512), who, [datum(whole[:-1], whole[1:], weights=[1.0] * (len(whole) - 1))], forward_only=True
        )
        trained = result.outputs[0]["logprobs"].numpy()[len(prompt) - 1 :]
        sampled = answers[str(i)].sequences[0].logprobs.numpy()  # type: ignore[union-attr]
        worst = max(worst, float(np.abs(trained - sampled).max()))
        num_tokens += len(drawn)
    assert num_tokens >= 1000
    assert worst <= 1e-5


def test_an_adapter_is_read_from_its_folder_and_given_back(base: BaseModel, tmp_path: Path) -> None:
    made = random_adapter(base, 4, 4)
    tensors = {f"{path}.lora_{ab}": t.detach().clone() for path, pair in made.pairs().items() for ab, t in zip("AB", pair, strict=True)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({"rank": 4, "alpha": 32.0}))
    sampler = make_sampler(base)
    from_disk = one(sampler, request("a", [5, 6, 7], version="disk", folder=str(tmp_path)))
    sampler.bank.publish("memory", made.scale, made.pairs())
    assert tokens_of(one(sampler, request("b", [5, 6, 7], version="memory"))) == tokens_of(from_disk)
    assert not sampler.bank.borrowed


def test_a_prefix_is_never_served_by_other_weights(base: BaseModel) -> None:
    sampler = make_sampler(base)
    prompt = prompts(2, [20])[0]
    for seed in (5, 6):
        made = random_adapter(base, seed, 4)
        sampler.bank.publish(f"v{seed}", made.scale, made.pairs())
    for version in ("", "v5", "v6"):
        assert one(sampler, request("r", prompt, version=version)).prompt_cache_hit_tokens == 0
    assert one(sampler, request("r", prompt, version="v5")).prompt_cache_hit_tokens == 16


@pytest.mark.parametrize("also", [{}, {"prompt_logprobs": True}, {"topk_prompt_logprobs": 2}, {"num_samples": 3}])
def test_diverged_weights_fail_their_own_request_only(base: BaseModel, also: dict[str, object]) -> None:
    made = random_adapter(base, 7, 4)
    pairs = {path: (a, torch.full_like(b, float("nan"))) for path, (a, b) in made.pairs().items()}
    sampler = make_sampler(base, kv_tokens=160)
    sampler.bank.publish("broken", made.scale, pairs)
    prompt = prompts(3, [11])[0]
    expected = tokens_of(one(make_sampler(base), request("fine", prompt, 20)))
    for _ in range(3):  # the blocks that held NaN are used again
        answers = run(sampler, request("broken", prompt, version="broken", **also), request("fine", prompt, 20))
        broken = answers["broken"]
        assert isinstance(broken, Failed) and "diverged" in broken.message and "broken" in broken.message
        assert tokens_of(answers["fine"]) == expected
    assert not sampler.bank.borrowed


def test_two_versions_in_one_batch_equal_each_alone(base: BaseModel) -> None:
    sampler = make_sampler(base)
    prompt = prompts(4, [9])[0]
    for seed in (8, 9):
        made = random_adapter(base, seed, 4)
        sampler.bank.publish(f"v{seed}", made.scale, made.pairs())
    names = ["v8", "", "v9", "v8", ""]
    together = run(sampler, *(request(str(i), prompt, seed=i, version=v) for i, v in enumerate(names)))
    for i, version in enumerate(names):
        alone = one(sampler, request("alone", prompt, seed=i, version=version))
        answer = together[str(i)]
        assert isinstance(answer, SampleResult) and tokens_of(answer) == tokens_of(alone)
