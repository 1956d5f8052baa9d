"""A sampler on the tiny model without processes around it."""

from __future__ import annotations

import numpy as np
import torch

from everlearn.config import Settings
from everlearn.engine.protocol import Completed, Failed, Sample
from everlearn.engine.sampler import Sampler
from everlearn.models.bank import Bank
from everlearn.models.load import BaseModel
from everlearn.types import Array, SampleResult, SamplingParams


def make_sampler(base: BaseModel, **engine: object) -> Sampler:
    settings = Settings.model_validate({"engine": {"kv_tokens": 4096, "block_size": 4, **engine}})
    return Sampler(base, settings, Bank(settings.engine.adapter_slots, base.device, base.dtype))


def request(request_id: str, prompt: list[int], max_tokens: int = 8, num_samples: int = 1, **more: object) -> Sample:
    """Keys of SamplingParams go there, the others to Sample."""
    params = {k: more.pop(k) for k in ("seed", "temperature", "top_k", "top_p", "stop_tokens", "stop_strings") if k in more}
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
    for _ in range(max_steps):
        if not sampler.has_work():
            break
        for event in sampler.step():
            assert event.request_id not in answers, f"{event.request_id} was answered twice"
            answers[event.request_id] = event.result if isinstance(event, Completed) else event
    assert not sampler.has_work(), "the sampler is stuck"
    assert sampler.pool.num_used == 0, "blocks are lost"
    assert not sampler.requests
    return answers


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
