"""Penalties, biases, bans and min_p: against transformers' processors, slow references, and what a seed promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from everlearn.engine.drawing import edits_of
from everlearn.engine.edits import Edits, Pairs
from everlearn.engine.logits import Draws, noise_keys, pick
from everlearn.engine.sequence import Request
from everlearn.errors import InvalidRequest
from everlearn.models.load import BaseModel
from tests.engine.harness import load_tiny
from tests.engine.sampling import make_sampler, one, prompts, reference_logprobs, request, run, tokens_of

ALL = {
    "min_p": 0.02, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_tokens": 9,
    "logit_bias": {5: 3.0, 6: -100.0, 400: 1.5}, "top_p": 0.95, "stop_tokens": [2, 7, 11, 400],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def slow_greedy(plain: LlamaForCausalLM, prompt: list[int], num: int, **p: object) -> list[int]:
    """One token after the other, as OpenAI, transformers and vLLM define it."""
    drawn: list[int] = []
    for _ in range(num):
        scores = reference_logits(plain, [*prompt, *drawn])
        scores = RepetitionPenaltyLogitsProcessor(p.get("repetition_penalty", 1.0))(torch.tensor([[*prompt, *drawn]]), scores[None])[0]
        for token in set(drawn):
            scores[token] -= p.get("frequency_penalty", 0.0) * drawn.count(token) + p.get("presence_penalty", 0.0)
        for token, bias in p.get("logit_bias", {}).items():
            scores[token] += bias
        drawn.append(int(scores.argmax()))
    return drawn


def reference_logits(plain: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return plain(torch.tensor([tokens])).logits[0, -1].float().clone()


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"frequency_penalty": 0.9},
        {"presence_penalty": 1.5},
        {"presence_penalty": -0.6, "frequency_penalty": -0.2},
        {"logit_bias": {9: 4.0, 300: 3.5, 17: -100.0}},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.3, "presence_penalty": 0.5, "logit_bias": {9: 2.0}},
    ],
)
def test_greedy_tokens_are_those_of_the_definition(base: BaseModel, plain: LlamaForCausalLM, params: dict[str, object]) -> None:
    for prompt in prompts(3, [4, 30]):
        answer = one(make_sampler(base), request("r", prompt, max_tokens=90, temperature=0.0, **params))
        assert tokens_of(answer) == slow_greedy(plain, prompt, 90, **params)


def test_log_probabilities_stay_the_models_own(base: BaseModel, plain: LlamaForCausalLM) -> None:
    prompt = prompts(4, [12])[0]
    answer = one(make_sampler(base), request("r", prompt, max_tokens=30, topk_sample_logprobs=3, temperature=0.8, **ALL))
    drawn = tokens_of(answer)
    expected = reference_logprobs(plain, [*prompt, *drawn])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(answer.sequences[0].logprobs.numpy(), expected[torch.arange(len(drawn)), torch.tensor(drawn)], atol=1e-5)
    assert answer.sequences[0].topk is not None
    np.testing.assert_array_equal(answer.sequences[0].topk.token_ids.numpy(), expected.topk(3).indices.numpy())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(base: BaseModel, temperature: float) -> None:
    """Rows with every edit beside rows with some and rows with none, and under preemption."""
    wishes = [
        ALL,
        {},
        {"logit_bias": {40: 2.0}},
        {"min_p": 0.1},
        {"frequency_penalty": 1.0},
        {"min_tokens": 5, "stop_tokens": list(range(60))},
    ]
    asked = [
        request(str(i), p, max_tokens=24, seed=100 + i, temperature=temperature, num_samples=1 + (i % 5 == 0), **wishes[i % len(wishes)])
        for i, p in enumerate(prompts(2, [5 + i % 9 for i in range(32)]))
    ]
    crowd = run(make_sampler(base), *asked)
    squeezed = run(make_sampler(base, kv_tokens=300, prefill_tokens=16), *asked)
    for wanted in asked:
        for index in range(wanted.num_samples):
            assert tokens_of(squeezed[wanted.request_id], index) == tokens_of(crowd[wanted.request_id], index)
    for wanted in asked[::2]:
        assert tokens_of(one(make_sampler(base), wanted)) == tokens_of(crowd[wanted.request_id])


def test_stop_tokens_wait_for_min_tokens(base: BaseModel) -> None:
    prompt = prompts(5, [8])[0]
    stops = list(range(0, 512, 2))  # every second token
    short = [tokens_of(one(make_sampler(base), request("r", prompt, max_tokens=60, seed=s, stop_tokens=stops))) for s in range(8)]
    assert any(len(t) < 20 for t in short)
    for seed in range(8):
        answer = one(make_sampler(base), request("r", prompt, max_tokens=60, seed=seed, stop_tokens=stops, min_tokens=20))
        drawn = tokens_of(answer)
        assert len(drawn) > 20 and all(t % 2 for t in drawn[:20])
        assert answer.sequences[0].stop_reason == "stop" and drawn[-1] % 2 == 0


def test_a_ban_holds(base: BaseModel) -> None:
    prompt = prompts(6, [8])[0]
    banned = {t: -100.0 for t in range(512) if t % 3}
    answer = one(make_sampler(base), request("r", prompt, max_tokens=200, logit_bias=banned))
    assert not any(t % 3 for t in tokens_of(answer))


def test_min_p_cuts_what_transformers_cuts() -> None:
    logits = 3 * torch.randn(6, 600, generator=torch.Generator().manual_seed(0))
    min_ps, temperatures = [0.0, 0.01, 0.1, 0.5, 1.0, 0.1], [1.0, 1.0, 0.7, 1.5, 1.0, 1.0]
    drawn = [set() for _ in range(6)]
    for i in range(400):
        keys = noise_keys([i] * 6, [0] * 6, [0] * 6)
        picked = pick(logits.clone(), Draws(keys, temperatures, [-1] * 6, [1.0] * 6, min_ps))
        for row, token in enumerate(picked.tokens_N.tolist()):
            drawn[row].add(token)
    for row in range(1, 6):
        kept = MinPLogitsWarper(min_ps[row])(torch.zeros(1, 1), logits[row : row + 1] / temperatures[row]).isfinite()[0]
        allowed = set(kept.nonzero()[:, 0].tolist())
        assert drawn[row] <= allowed and (len(drawn[row]) > 1 or len(allowed) == 1)


def test_rows_are_edited_alone() -> None:
    """Every kind of edit on some rows: the others keep their bits, and each row is what it would be by itself."""
    logits = 2 * torch.randn(4, 600, generator=torch.Generator().manual_seed(1))
    mask = np.full((4, 19), -1, np.int32)
    mask[3] = 0
    mask[3, 2] = 0b1010
    peak = logits.amax(1, keepdim=True)
    shifted = logits - peak

    def pairs(row: int, tokens: list[int], *values: list[float]) -> Pairs:
        return Pairs(np.full(len(tokens), row), np.array(tokens), tuple(np.array(v, np.float32) for v in values))

    edits = Edits(pairs(0, [1, 2], [1.5, 1.5], [0.5, 0.0]), pairs(2, [7], [2.0]), pairs(2, [9]), mask)
    before = shifted.clone()
    scores = edits.apply(shifted, peak)
    assert torch.equal(shifted, before), "the raw logits were touched"
    assert torch.equal(scores[1], shifted[1])
    assert scores[3].isfinite().nonzero()[:, 0].tolist() == [65, 67]
    assert scores[2, 9] == -torch.inf and scores[2, 8].isfinite()
    expected = logits[0].clone()
    for token, minus in ((1, 0.5), (2, 0.0)):
        expected[token] = (expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5) - minus
    torch.testing.assert_close(scores[0], expected - expected.amax())


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": 1e6},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"min_tokens": -1},
        {"min_tokens": 9},
        {"logit_bias": {512: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {3: float("nan")}},
    ],
)
def test_what_is_refused(base: BaseModel, wrong: dict[str, object]) -> None:
    sampler = make_sampler(base)
    with pytest.raises(InvalidRequest) as refused:
        sampler.add(request("r", [5, 6, 7], max_tokens=8, **wrong))
    assert refused.value.param == next(iter(wrong))
    assert not sampler.has_work()


def test_nobody_pays_who_does_not_ask() -> None:
    plain = [
        Request(request("a", [5, 6]), 8),
        Request(request("b", [7], top_p=0.5, top_k=3, min_p=0.1, temperature=0.5, stop_tokens=[3]), 8),
    ]
    assert edits_of([one_request.sequences[0] for one_request in plain]) is None
