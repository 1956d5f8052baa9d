"""A sampler on the tiny model without processes around it."""

from __future__ import annotations

import numpy as np
import torch

from everlearn.config import Settings
from everlearn.engine.protocol import Completed, Failed, Sample, Tokens
from everlearn.engine.sampler import Sampler
from everlearn.models.bank import Bank
from everlearn.models.load import BaseModel
from everlearn.types import Array, SampleResult, SamplingParams


def make_sampler(base: BaseModel, **engine: object) -> Sampler:
    settings = Settings.model_validate({"engine": {"kv_tokens": 4096, "block_size": 4, **engine}})
    return Sampler(base, settings, Bank(settings.engine.adapter_slots, base.device, base.dtype))


def request(request_id: str, prompt: list[int], max_tokens: int = 8, num_samples: int = 1, **more: object) -> Sample:
    """Keys of SamplingParams go there, the others to Sample."""
    params = {k: more.pop(k) for k in SamplingParams.__struct_fields__ if k in more}
    fields = {"base": "tiny", "version": "", "folder": "", "cache_salt": "default", **more}
    return Sample(
        request_id=request_id,
        prompt=Array.of(np.asarray(prompt, dtype=np.int32)),
        num_samples=num_samples,
        params=SamplingParams(max_tokens, **{"seed": 1, **params}),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def run(sampler: Sampler, *requests: Sample, max_steps: int = 5000) -> dict[str, SampleResult | Failed]:
    """Adds the requests and steps until all are answered, each once."""
    for one in requests:
        sampler.add(one)
    answers: dict[str, SampleResult | Failed] = {}
    told: dict[str, list[Tokens]] = {}
    for _ in range(max_steps):
        if not sampler.has_work():
            break
        for event in sampler.step():
            assert event.request_id not in answers, f"{event.request_id} was answered twice"
            if isinstance(event, Tokens):
                told.setdefault(event.request_id, []).append(event)
                continue
            answers[event.request_id] = event.result if isinstance(event, Completed) else event
            if isinstance(event, Completed) and event.request_id in told:
                check_stream(told[event.request_id], answers[event.request_id])
    assert not sampler.has_work(), "the sampler is stuck"
    assert sampler.pool.num_used == 0, "blocks are lost"
    assert not sampler.requests
    return answers


def check_stream(told: list[Tokens], answer: SampleResult | Failed) -> None:
    """What was told step by step is the whole answer, and each sample's end was told once, last."""
    assert isinstance(answer, SampleResult)
    for index, sequence in enumerate(answer.sequences):
        parts = [part for event in told for part in event.parts if part.index == index]
        assert [t for part in parts for t in part.tokens] == sequence.tokens.numpy().tolist()
        np.testing.assert_array_equal(np.float32([v for part in parts for v in part.logprobs]), sequence.logprobs.numpy())
        assert [part.stop_reason for part in parts] == [""] * (len(parts) - 1) + [sequence.stop_reason]
        if sequence.topk is not None:
            assert [row for part in parts for row in part.top_ids] == sequence.topk.token_ids.numpy().tolist()
    assert {event.cached for event in told} == {answer.prompt_cache_hit_tokens}


def one(sampler: Sampler, wanted: Sample) -> SampleResult:
    answer = run(sampler, wanted)[wanted.request_id]
    assert isinstance(answer, SampleResult), answer
    return answer


def tokens_of(answer: SampleResult | Failed, index: int = 0) -> list[int]:
    assert isinstance(answer, SampleResult), answer
    return answer.sequences[index].tokens.numpy().tolist()


def prompts(seed: int, lengths: list[int], vocab: int = 512) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def reference_logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """[P, V]: row i is log softmax of what plain transformers says after token i."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
