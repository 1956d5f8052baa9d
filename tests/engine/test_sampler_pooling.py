"""One vector of a prompt, against plain transformers: whole, in chunks, beside others, after a preemption and with a cached prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from everlearn.models.load import BaseModel
from tests.engine.harness import load_tiny
from tests.engine.sampling import make_sampler, one, prompts, request, run, tokens_of

PROMPTS = prompts(0, [37, 5, 1, 64])


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module")
def states(tiny_model: Path) -> list[np.ndarray]:
    """[P, D] of each prompt: what the head reads."""
    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        return [plain.model(torch.tensor([prompt])).last_hidden_state[0].numpy() for prompt in PROMPTS]


def wanted(states_PD: np.ndarray, pooling: str) -> np.ndarray:
    return states_PD.mean(axis=0) if pooling == "mean" else states_PD[-1]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("engine", [{}, {"prefill_tokens": 16}, {"max_batch": 2}])
def test_pooled_states_are_the_model_s(base: BaseModel, states, pooling: str, engine: dict) -> None:
    asked = [request(str(place), prompt, max_tokens=0, pooling=pooling) for place, prompt in enumerate(PROMPTS)]
    answers = run(make_sampler(base, **engine), *asked)
    for place, states_PD in enumerate(states):
        answer = answers[str(place)]
        np.testing.assert_allclose(answer.pooled.numpy(), wanted(states_PD, pooling), rtol=1e-3, atol=2e-4)
        assert tokens_of(answer) == []


def test_a_cached_prefix_is_read_again_for_a_mean_and_not_for_the_last(base: BaseModel, states) -> None:
    sampler = make_sampler(base)
    one(sampler, request("before", PROMPTS[3], max_tokens=1))
    mean = one(sampler, request("mean", PROMPTS[3], max_tokens=0, pooling="mean"))
    last = one(sampler, request("last", PROMPTS[3], max_tokens=0, pooling="last"))
    assert mean.prompt_cache_hit_tokens == 0 < last.prompt_cache_hit_tokens
    np.testing.assert_allclose(mean.pooled.numpy(), wanted(states[3], "mean"), rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(last.pooled.numpy(), wanted(states[3], "last"), rtol=1e-3, atol=2e-4)


def test_pooling_goes_with_scores_and_with_sampling_and_changes_neither(base: BaseModel, states) -> None:
    fields = {"max_tokens": 5, "prompt_logprobs": True, "topk_prompt_logprobs": 2, "num_samples": 2}
    plain = one(make_sampler(base), request("r", PROMPTS[0], **fields))
    both = one(make_sampler(base), request("r", PROMPTS[0], pooling="mean", **fields))
    assert plain.pooled is None
    assert [tokens_of(both, index) for index in (0, 1)] == [tokens_of(plain, index) for index in (0, 1)]
    np.testing.assert_array_equal(both.prompt_logprobs.numpy(), plain.prompt_logprobs.numpy())
    np.testing.assert_allclose(both.pooled.numpy(), wanted(states[0], "mean"), rtol=1e-3, atol=2e-4)


def test_preempted_prompts_count_each_token_once(base: BaseModel, states) -> None:
    """Room for hardly more than one: sequences lose their blocks and compute them again."""
    sampler = make_sampler(base, kv_tokens=96, prefill_tokens=24)
    asked = [request(f"s{place}", PROMPTS[0], max_tokens=30, seed=place) for place in range(3)]
    pooled = [request(f"p{place}", PROMPTS[place], max_tokens=8, pooling="mean") for place in (0, 3)]
    answers = run(sampler, *asked, *pooled)
    assert sampler.preemptions > 0
    for place in (0, 3):
        np.testing.assert_allclose(answers[f"p{place}"].pooled.numpy(), wanted(states[place], "mean"), rtol=1e-3, atol=2e-4)
