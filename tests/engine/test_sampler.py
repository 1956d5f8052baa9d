"""The sampler against plain transformers: numbers, scheduling under pressure, and what a seed promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from everlearn.engine.protocol import Failed
from everlearn.engine.sampler import Sampler
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.models.load import BaseModel
from everlearn.types import Array, SampleResult
from tests.engine.harness import load_tiny
from tests.engine.sampling import make_sampler, one, prompts, reference_logprobs, request, run, tokens_of


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def check_logprobs(plain: LlamaForCausalLM, prompt: list[int], answer: SampleResult | Failed) -> None:
    assert isinstance(answer, SampleResult), answer
    for sequence in answer.sequences:
        drawn = sequence.tokens.numpy()
        reference = reference_logprobs(plain, [*prompt, *drawn.tolist()])[len(prompt) - 1 : -1]
        expected = reference[torch.arange(len(drawn)), torch.from_numpy(drawn.astype(np.int64))]
        np.testing.assert_allclose(sequence.logprobs.numpy(), expected.numpy(), atol=1e-5)


def test_logprobs_equal_plain_transformers_in_any_batch(base: BaseModel, plain: LlamaForCausalLM) -> None:
    asked = prompts(0, [1, 2, 3, 4, 5, 8, 17, 33, 64])
    sampler = make_sampler(base, prefill_tokens=48)
    answers = run(sampler, *(request(str(i), p, max_tokens=12, seed=i, temperature=0.7) for i, p in enumerate(asked)))
    for i, prompt in enumerate(asked):
        check_logprobs(plain, prompt, answers[str(i)])


def test_greedy_is_generate(base: BaseModel, plain: LlamaForCausalLM) -> None:
    for prompt in prompts(1, [3, 20]):
        answer = one(make_sampler(base), request("r", prompt, max_tokens=16, temperature=0.0))
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens_of(answer) == expected[0, len(prompt) :].tolist()
        assert answer.sequences[0].stop_reason == "length"


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(base: BaseModel, temperature: float) -> None:
    asked = [
        request(str(i), p, max_tokens=24, seed=1000 + i, temperature=temperature)
        for i, p in enumerate(prompts(2, [5 + i % 9 for i in range(32)]))
    ]
    crowd = run(make_sampler(base), *asked)
    for wanted in asked[::3]:
        assert tokens_of(one(make_sampler(base), wanted)) == tokens_of(crowd[wanted.request_id])


def test_samples_of_one_prompt_differ_and_are_those_of_smaller_requests(base: BaseModel, plain: LlamaForCausalLM) -> None:
    prompt = prompts(3, [10])[0]  # the last block is partly filled, so every sample copies it
    sampler = make_sampler(base, max_batch=3)
    many = one(sampler, request("many", prompt, max_tokens=10, num_samples=7))
    check_logprobs(plain, prompt, many)
    drawn = [tokens_of(many, i) for i in range(7)]
    assert len({tuple(t) for t in drawn}) == 7
    assert drawn[:2] == [tokens_of(one(make_sampler(base), request("two", prompt, 10, 2)), i) for i in range(2)]


def test_a_known_prefix_is_not_computed_again(base: BaseModel, plain: LlamaForCausalLM) -> None:
    sampler = make_sampler(base)
    first, tail = prompts(4, [21, 6])
    cold = one(sampler, request("a", first))
    assert cold.prompt_cache_hit_tokens == 0
    warm = one(sampler, request("b", first))
    assert warm.prompt_cache_hit_tokens == 20
    assert tokens_of(warm) == tokens_of(cold)
    turn = [*first, *tokens_of(cold), *tail]  # a conversation: prompt and answer are both known
    longer = one(sampler, request("c", turn))
    assert longer.prompt_cache_hit_tokens == (len(first) + 8 - 1) // 4 * 4
    check_logprobs(plain, turn, longer)
    assert one(sampler, request("d", first, cache_salt="other tenant")).prompt_cache_hit_tokens == 0
    assert sampler.stats()["prefix_hit_tokens"] == 20 + longer.prompt_cache_hit_tokens


def test_equal_prompts_that_arrive_together_are_computed_once(base: BaseModel) -> None:
    sampler = make_sampler(base)
    prompt = prompts(5, [41])[0]
    answers = run(sampler, *(request(str(i), prompt, seed=i) for i in range(8)))
    assert sorted(a.prompt_cache_hit_tokens for a in answers.values() if isinstance(a, SampleResult)) == [0] + [40] * 7


@pytest.mark.parametrize("kv_tokens", [64, 100])
def test_running_out_of_blocks_changes_no_token(base: BaseModel, kv_tokens: int) -> None:
    asked = [request(str(i), p, max_tokens=20, seed=i, num_samples=1 + i % 3) for i, p in enumerate(prompts(6, [5, 30, 12, 40, 7, 22]))]
    sampler = make_sampler(base, kv_tokens=kv_tokens, prefill_tokens=16)
    squeezed = run(sampler, *asked)
    assert sampler.stats()["preemptions"] > 0
    roomy = run(make_sampler(base), *asked)
    for wanted in asked:
        for index in range(wanted.num_samples):
            assert tokens_of(squeezed[wanted.request_id], index) == tokens_of(roomy[wanted.request_id], index)


def test_small_prefill_chunks_change_nothing(base: BaseModel) -> None:
    asked = [request(str(i), p, prompt_logprobs=True) for i, p in enumerate(prompts(7, [70, 33, 2]))]
    whole, pieces = run(make_sampler(base), *asked), run(make_sampler(base, prefill_tokens=16), *asked)
    for name, answer in whole.items():
        other = pieces[name]
        assert isinstance(answer, SampleResult) and isinstance(other, SampleResult)
        assert tokens_of(answer) == tokens_of(other)
        assert answer.prompt_logprobs is not None and other.prompt_logprobs is not None
        np.testing.assert_allclose(answer.prompt_logprobs.numpy(), other.prompt_logprobs.numpy(), atol=1e-5)


def test_later_chunks_of_a_prompt_ask_for_no_mask_together_with_groups(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has no kernel for both but the one that keeps all scores."""
    sdpa, masked = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*inputs: torch.Tensor, **more: object) -> torch.Tensor:
        masked.append(more.get("attn_mask") is not None)
        assert not (masked[-1] and more.get("enable_gqa")), "a mask, and groups"
        return sdpa(*inputs, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    assert len(tokens_of(one(make_sampler(base, prefill_tokens=16), request("r", list(range(3, 60)), max_tokens=2)))) == 2
    assert True in masked and False in masked


def test_stop_tokens_end_a_sequence_and_are_included(base: BaseModel) -> None:
    prompt = prompts(8, [6])[0]
    free = tokens_of(one(make_sampler(base), request("r", prompt, max_tokens=12)))
    stopped = one(make_sampler(base), request("r", prompt, max_tokens=12, stop_tokens=[free[5]]))
    assert tokens_of(stopped) == free[: free.index(free[5]) + 1]
    assert stopped.sequences[0].stop_reason == "stop"


def test_stop_strings_are_found_across_tokens(base: BaseModel) -> None:
    prompt = prompts(9, [6])[0]
    free = tokens_of(one(make_sampler(base), request("r", prompt, max_tokens=40)))
    assert base.tokenizer is not None
    text = base.tokenizer.decode(free, skip_special_tokens=False)
    start = next(i for i in range(8, len(text) - 4) if "\ufffd" not in text[i : i + 4])
    stop = text[start : start + 4]
    answer = one(make_sampler(base), request("r", prompt, max_tokens=40, stop_strings=["never to be seen", stop]))
    drawn = tokens_of(answer)
    assert answer.sequences[0].stop_reason == "stop"
    assert drawn == free[: len(drawn)]
    assert stop in base.tokenizer.decode(drawn, skip_special_tokens=False)
    assert stop not in base.tokenizer.decode(drawn[:-1], skip_special_tokens=False)


def test_cancel_frees_everything_and_is_answered(base: BaseModel) -> None:
    sampler = make_sampler(base)
    sampler.add(request("gone", prompts(10, [30])[0], max_tokens=500, num_samples=4))
    sampler.add(request("stays", prompts(11, [9])[0], max_tokens=12))
    for _ in range(3):
        sampler.step()
    assert sampler.cancel("gone")
    assert not sampler.cancel("gone")
    answers = run(sampler)
    assert isinstance(answers["gone"], Failed) and answers["gone"].code == "cancelled"
    assert len(tokens_of(answers["stays"])) == 12


def test_max_tokens_end_at_the_context(base: BaseModel) -> None:
    full = prompts(12, [1024])[0]
    assert len(tokens_of(one(make_sampler(base), request("r", full, max_tokens=1, prompt_logprobs=True)))) == 1
    assert len(tokens_of(one(make_sampler(base), request("r", full[:1020], max_tokens=100)))) == base.info.room(1020) == 5
    assert tokens_of(one(make_sampler(base), request("r", full[:9], max_tokens=0, num_samples=2)), 1) == []


def test_max_tokens_that_were_not_asked_for_end_at_the_cache(base: BaseModel) -> None:
    sampler, prompt = make_sampler(base, kv_tokens=128), prompts(12, [120])[0]
    assert len(tokens_of(one(sampler, request("r", prompt, max_tokens=905, lowers=True)))) == 9
    assert len(tokens_of(one(sampler, request("r", prompt + prompt[:8], max_tokens=897, lowers=True)))) == 1
    with pytest.raises(TooLarge, match="lower max_tokens or raise engine.kv_tokens"):
        sampler.add(request("r", prompt, max_tokens=10))
    for max_tokens in (0, 5):
        with pytest.raises(TooLarge, match="the prompt has 129 tokens; the KV cache of tiny holds 128; shorten it"):
            sampler.add(request("r", [5] * 129, max_tokens=max_tokens, lowers=True))


def test_sampled_top_logprobs(base: BaseModel, plain: LlamaForCausalLM) -> None:
    prompt = prompts(13, [7])[0]
    sampler = make_sampler(base)
    answers = run(sampler, request("k", prompt, topk_sample_logprobs=5), request("none", prompt, seed=2))
    answer = answers["k"]
    assert isinstance(answer, SampleResult) and answer.sequences[0].topk is not None
    reference = reference_logprobs(plain, [*prompt, *tokens_of(answer)])[len(prompt) - 1 : -1].topk(5)
    np.testing.assert_array_equal(answer.sequences[0].topk.token_ids.numpy(), reference.indices.numpy())
    np.testing.assert_allclose(answer.sequences[0].topk.logprobs.numpy(), reference.values.numpy(), atol=1e-5)


def test_lists_of_likeliest_tokens_are_bounded_as_a_whole(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everlearn.engine.admission.MOST_LISTED", 5 * 3 * 8)
    sampler, asked = make_sampler(base), {"topk_sample_logprobs": 5, "num_samples": 3}
    answer = one(sampler, request("r", [5, 6, 7], max_tokens=8, **asked))
    assert answer.sequences[2].topk is not None and answer.sequences[2].topk.token_ids.shape == [8, 5]
    with pytest.raises(
        TooLarge, match="the 5 likeliest tokens at each of up to 9 places in 3 samples are 135; a request lists at most 120"
    ):
        sampler.add(request("r", [5, 6, 7], max_tokens=9, **asked))
    assert len(tokens_of(one(sampler, request("r", [5, 6, 7], max_tokens=9, lowers=True, **asked)))) == 8
    with pytest.raises(TooLarge, match="at most 120"):
        sampler.add(request("r", [5, 6, 7], max_tokens=9, lowers=True, topk_sample_logprobs=50, num_samples=3))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": []}, InvalidRequest),
        ({"prompt": [3, 512]}, InvalidRequest),
        ({"prompt": [-1]}, InvalidRequest),
        ({"num_samples": 0}, InvalidRequest),
        ({"prompt": [5] * 1025}, TooLarge),
        ({"prompt": [5] * 60, "max_tokens": 100}, TooLarge),
        ({"target_prompt_logprobs": Array.of(np.zeros((1, 2), np.int64))}, InvalidRequest),
        ({"target_prompt_logprobs": Array.of(np.full((2, 2), 512, np.int64))}, InvalidRequest),
    ],
)
def test_what_is_refused(base: BaseModel, change: dict[str, object], error: type[Exception]) -> None:
    sampler = make_sampler(base, kv_tokens=128)
    with pytest.raises(error):
        sampler.add(request("r", **{"prompt": [5, 6, 7], **change}))  # type: ignore[arg-type]
    assert not sampler.has_work()


def test_stop_strings_need_a_tokenizer(tiny_model: Path) -> None:
    bare = load_tiny(tiny_model)
    bare.tokenizer = None
    with pytest.raises(Unsupported, match="stop tokens"):
        make_sampler(bare).add(request("r", [5, 6], stop_strings=["x"]))


def test_a_version_that_is_gone_fails_its_own_request_only(base: BaseModel, tmp_path: Path) -> None:
    answers = run(make_sampler(base), request("a", [5, 6], version="v1", folder=str(tmp_path)), request("b", [5, 6]))
    assert isinstance(answers["a"], Failed) and answers["a"].code == "not_found"
    assert len(tokens_of(answers["b"])) == 8


def test_many_random_requests_under_pressure(base: BaseModel) -> None:
    """Small cache, small batch, cancellations: every request is answered once, and as if it had been alone."""
    rng = np.random.default_rng(0)
    shared = prompts(14, [40])[0]
    asked = []
    for i in range(90):
        prompt = shared[: rng.integers(1, 40)] + rng.integers(3, 512, rng.integers(0, 12)).tolist()
        asked.append(request(str(i), prompt, int(rng.integers(1, 14)), int(rng.integers(1, 4)), seed=i, prompt_logprobs=bool(i % 5 == 0)))
    sampler: Sampler = make_sampler(base, kv_tokens=112, max_batch=6, prefill_tokens=24)
    for wanted in asked:
        sampler.add(wanted)
    answers: dict[str, SampleResult | Failed] = {}
    cancelled = {"7", "40", "41", "80"}
    while sampler.has_work():
        for event in sampler.step():
            assert event.request_id not in answers
            answers[event.request_id] = event if isinstance(event, Failed) else event.result  # type: ignore[assignment, union-attr]
        for name in [c for c in cancelled if c not in answers and rng.random() < 0.05]:
            sampler.cancel(name)
    assert sampler.pool.num_used == 0 and len(answers) == len(asked)
    alone = make_sampler(base)
    for wanted in asked[::9]:
        answer = answers[wanted.request_id]
        if isinstance(answer, SampleResult):
            expected = one(alone, wanted)
            assert [s.tokens for s in answer.sequences] == [s.tokens for s in expected.sequences]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_out_of_memory_costs_one_request_and_leaves_no_other_stuck(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, call: int, error: type[Exception]
) -> None:
    """The device, or the machine, runs out of memory between the computed row and its draws, when samples have just forked as well."""
    wanted = [request("long", list(range(3, 40)), max_tokens=5), request("short", [5, 6, 7, 8, 9], max_tokens=5, num_samples=3)]
    alone = run(make_sampler(base), wanted[1])["short"]
    logits, calls = base.head.logits, iter(range(1000))

    def failing(*args: object) -> torch.Tensor:
        if next(calls) == call:
            raise error("injected")
        return logits(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(base.head, "logits", failing)
    answers = run(make_sampler(base), *wanted)
    lost, kept = answers["long"], answers["short"]
    assert isinstance(lost, Failed) and lost.code == "too_large"
    assert [tokens_of(kept, i) for i in range(3)] == [tokens_of(alone, i) for i in range(3)]


def test_more_running_sequences_than_prefill_tokens(base: BaseModel) -> None:
    """Decoding alone may use up a small budget; a prompt in the making then waits, and nothing breaks."""
    crowd = [request(f"r{i}", [3 + i] * 20, max_tokens=20) for i in range(24)]
    alone = run(make_sampler(base), crowd[-1])["r23"]
    answers = run(make_sampler(base, prefill_tokens=16, max_batch=24), *crowd)
    assert tokens_of(answers["r23"]) == tokens_of(alone)
