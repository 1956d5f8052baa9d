"""What a request may ask about its own prompt, against plain transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from everlearn.engine.protocol import Failed
from everlearn.engine.sampler import Sampler
from everlearn.models.load import BaseModel
from everlearn.types import Array
from tests.engine.harness import load_tiny
from tests.engine.sampling import make_sampler, one, prompts, reference_logprobs, request, run, tokens_of

PROMPT = prompts(0, [37])[0]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module")
def expected_PV(tiny_model: Path) -> np.ndarray:
    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return reference_logprobs(plain, PROMPT).numpy()


@pytest.fixture(params=[1024, 16], ids=["whole", "chunks"])
def sampler(base: BaseModel, request: pytest.FixtureRequest) -> Sampler:
    """With the prompt's prefix known already: positions that need scores must be computed all the same."""
    warm = make_sampler(base, prefill_tokens=request.param)
    run(warm, _plain())
    return warm


def _plain():  # type: ignore[no-untyped-def]
    return request("warm", PROMPT, max_tokens=1)


def own(expected_PV: np.ndarray) -> np.ndarray:
    return expected_PV[np.arange(len(PROMPT) - 1), PROMPT[1:]]


def test_prompt_logprobs(sampler: Sampler, expected_PV: np.ndarray) -> None:
    answer = one(sampler, request("r", PROMPT, max_tokens=1, prompt_logprobs=True))
    assert answer.prompt_logprobs is not None
    values = answer.prompt_logprobs.numpy()
    assert values.shape == (37,) and values.dtype == np.float32 and np.isnan(values[0])
    np.testing.assert_allclose(values[1:], own(expected_PV), atol=1e-5)
    assert answer.prompt_cache_hit_tokens == 0


@pytest.mark.parametrize("last_n", [1, 5, 36])
def test_the_last_n_may_use_the_prefix_before_them(sampler: Sampler, expected_PV: np.ndarray, last_n: int) -> None:
    answer = one(sampler, request("r", PROMPT, prompt_logprobs=True, prompt_logprobs_last_n=last_n, topk_prompt_logprobs=2))
    assert answer.prompt_logprobs is not None and answer.topk_prompt_logprobs is not None
    values = answer.prompt_logprobs.numpy()
    assert np.isnan(values[:-last_n]).all()
    np.testing.assert_allclose(values[-last_n:], own(expected_PV)[-last_n:], atol=1e-5)
    assert (answer.topk_prompt_logprobs.logprobs.numpy()[:-last_n] == -99999.0).all()
    assert (answer.topk_prompt_logprobs.logprobs.numpy()[-last_n:] > -99999.0).all()
    assert answer.prompt_cache_hit_tokens == (36 - last_n) // 4 * 4


def test_topk_prompt_logprobs(sampler: Sampler, expected_PV: np.ndarray) -> None:
    answer = one(sampler, request("r", PROMPT, topk_prompt_logprobs=4))
    assert answer.prompt_logprobs is None and answer.topk_prompt_logprobs is not None
    ids, values = answer.topk_prompt_logprobs.token_ids.numpy(), answer.topk_prompt_logprobs.logprobs.numpy()
    assert ids.shape == values.shape == (37, 4) and ids.dtype == np.int32
    assert (ids[0] == 0).all() and (values[0] == -99999.0).all()
    order = np.argsort(-expected_PV[:-1], axis=1)[:, :4]
    np.testing.assert_array_equal(ids[1:], order)
    np.testing.assert_allclose(values[1:], np.take_along_axis(expected_PV[:-1], order, axis=1), atol=1e-5)


@pytest.mark.parametrize("also", [{}, {"prompt_logprobs": True}, {"topk_prompt_logprobs": 1}])
def test_target_prompt_logprobs(sampler: Sampler, expected_PV: np.ndarray, also: dict[str, object]) -> None:
    targets = np.random.default_rng(1).integers(0, 512, (36, 3)).astype(np.int64)
    targets[:9] = -1
    targets[20, 1] = -1
    answer = one(sampler, request("r", PROMPT, target_prompt_logprobs=Array.of(targets), **also))
    assert answer.target_prompt_logprobs is not None
    values = answer.target_prompt_logprobs.numpy()
    assert values.shape == (36, 3)
    np.testing.assert_array_equal(np.isnan(values), targets < 0)
    wanted = np.take_along_axis(expected_PV[:-1], np.maximum(targets, 0), axis=1)
    np.testing.assert_allclose(values[targets >= 0], wanted[targets >= 0], atol=1e-5)
    assert answer.prompt_cache_hit_tokens == (0 if also else 8)


def test_prompt_alternatives_come_from_the_tempered_distribution(base: BaseModel, expected_PV: np.ndarray) -> None:
    k, temperature = 4000, 0.5
    answer = one(
        make_sampler(base), request("r", PROMPT[:4], temperature=temperature, prompt_alt_tokens_k=k, top_k=1, prompt_logprobs=True)
    )
    assert answer.prompt_alt_tokens is not None and answer.prompt_alt_logprobs is not None
    tokens, values = answer.prompt_alt_tokens.numpy(), answer.prompt_alt_logprobs.numpy()
    assert tokens.shape == values.shape == (3, k) and tokens.dtype == np.int64
    for row in range(3):
        np.testing.assert_allclose(values[row], expected_PV[row, tokens[row]], atol=1e-5)
        tempered = np.exp(expected_PV[row] / temperature)
        tempered /= tempered.sum()
        shares = np.bincount(tokens[row], minlength=512) / k
        assert np.abs(shares - tempered).max() < 5 * np.sqrt(tempered.max() / k)
    greedy = one(make_sampler(base), request("r", PROMPT[:4], temperature=0.0, prompt_alt_tokens_k=2))
    assert greedy.prompt_alt_tokens is not None
    np.testing.assert_array_equal(greedy.prompt_alt_tokens.numpy(), np.repeat(expected_PV[:3].argmax(1)[:, None], 2, axis=1))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_a_prompts_scores_lack_is_their_requests_affair(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def failing(*args: object) -> torch.Tensor:
        raise error("injected")

    monkeypatch.setattr("everlearn.engine.scoring.draw", failing)
    asked, other = request("asked", PROMPT[:4], prompt_alt_tokens_k=9), request("other", list(range(3, 40)))
    answers = run(make_sampler(base), asked, other)
    refused = answers["asked"]
    assert isinstance(refused, Failed) and (refused.code, refused.param) == ("too_large", "prompt") and "injected" in refused.message
    assert tokens_of(answers["other"]) == tokens_of(run(make_sampler(base), other)["other"])


def test_a_prompt_of_one_token_has_nothing_to_score(base: BaseModel) -> None:
    answer = one(make_sampler(base), request("r", [9], prompt_logprobs=True, topk_prompt_logprobs=3, prompt_alt_tokens_k=2))
    assert answer.prompt_logprobs is not None and np.isnan(answer.prompt_logprobs.numpy()).all()
    assert answer.prompt_alt_tokens is not None and answer.prompt_alt_tokens.shape == [0, 2]
