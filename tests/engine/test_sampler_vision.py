"""Sampling from prompts with images: the trainer's log-probabilities, whatever is cached, cut or computed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everlearn.engine.protocol import Failed
from everlearn.engine.trainer import Trainer
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.types import Datum, ImageSpan, SampleResult
from tests.engine import harness
from tests.engine.harness import CPU, FLOAT32
from tests.engine.sampling import make_sampler, one, request, run, tokens_of
from tests.tiny_vision import make_tiny_vision_model, picture, row_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = make_tiny_vision_model(tmp_path_factory.mktemp("models") / "tiny-vl")
    return load_base(read_info("tiny", folder, []), CPU, FLOAT32)


def text(seed: int, num: int) -> list[int]:
    return np.random.default_rng(seed).integers(7, 512, num).tolist()


def prompts() -> list[tuple[list[int], list[ImageSpan]]]:
    return [
        row_of([text(1, 5), picture(1), text(2, 4)]),
        row_of([text(3, 3), picture(2, 64, 32), text(4, 2), picture(3, 32, 80), text(5, 6)]),
        row_of([text(6, 9)]),
        row_of([picture(4, 100, 90), text(7, 3)]),
    ]


def trained(base: BaseModel, tower: bool = False) -> harness.TrainingAdapter:
    """An adapter that changes something."""
    import torch

    adapter = harness.adapter(base, train_vision=tower)
    with torch.no_grad():
        adapter.params.add_(0.05 * torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(2)))
    adapter.refresh()
    return adapter


def trainer_logprobs(base: BaseModel, adapter, prompt: list[int], images: list[ImageSpan], drawn: list[int]) -> np.ndarray:
    """What the trainer says of a prompt's tokens after the first and of what was drawn."""
    whole = [*prompt, *drawn]
    made = harness.datum(whole[:-1], whole[1:], weights=[1.0] * (len(whole) - 1))
    datum = Datum(made.tokens, made.inputs, images=images)
    return harness.forward_backward(Trainer(base, 512), adapter, [datum], forward_only=True).outputs[0]["logprobs"].numpy()


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("prefill", [256, 7])
def test_the_sampler_agrees_with_the_trainer(base: BaseModel, prefill: int, tower: bool):
    adapter = trained(base, tower)
    sampler = make_sampler(base, prefill_tokens=prefill, max_batch=3)
    sampler.bank.publish("run@1", adapter.scale, adapter.pairs())
    wanted = [
        request(f"{i}", prompt, 6, num_samples=2, images=images, version="run@1", prompt_logprobs=True)
        for i, (prompt, images) in enumerate(prompts())
    ]
    answers = run(sampler, *wanted)
    for i, (prompt, images) in enumerate(prompts()):
        answer = answers[f"{i}"]
        assert isinstance(answer, SampleResult), answer
        for sequence in answer.sequences:
            said = trainer_logprobs(base, adapter, prompt, images, sequence.tokens.numpy().tolist())
            np.testing.assert_allclose(sequence.logprobs.numpy(), said[len(prompt) - 1 :], atol=1e-5)
            np.testing.assert_allclose(answer.prompt_logprobs.numpy()[1:], said[: len(prompt) - 1], atol=1e-5)


def test_a_prompt_may_be_cut_anywhere(base: BaseModel):
    prompt, images = prompts()[1]
    whole = one(make_sampler(base), request("a", prompt, 4, images=images))
    for prefill in range(1, 14):
        cut = one(make_sampler(base, prefill_tokens=prefill), request("a", prompt, 4, images=images))
        assert tokens_of(cut) == tokens_of(whole)
        np.testing.assert_allclose(cut.sequences[0].logprobs.numpy(), whole.sequences[0].logprobs.numpy(), atol=1e-5)


def test_the_prefix_cache_tells_images_apart(base: BaseModel):
    sampler = make_sampler(base)
    prompt, images = row_of([text(1, 4), picture(1, 64, 64), text(2, 9)])
    other, others = row_of([text(1, 4), picture(2, 64, 64), text(2, 9)])
    assert prompt == other, "by their tokens they are the same"
    first = one(sampler, request("a", prompt, 4, images=images, temperature=0.0))
    seen = base.vision.computed_images
    again = one(sampler, request("b", prompt, 4, images=images, temperature=0.0))
    assert again.prompt_cache_hit_tokens >= len(prompt) - 5
    assert tokens_of(again) == tokens_of(first) and base.vision.computed_images == seen
    different = one(sampler, request("c", other, 4, images=others, temperature=0.0))
    assert different.prompt_cache_hit_tokens == 4, "the text before the image, no more"
    fresh = one(make_sampler(base), request("c", other, 4, images=others, temperature=0.0))
    np.testing.assert_allclose(different.sequences[0].logprobs.numpy(), fresh.sequences[0].logprobs.numpy(), atol=1e-5)


def test_the_same_image_at_another_place_is_another_prefix(base: BaseModel):
    """Blocks whose tokens are alike hold other parts of the image."""
    sampler = make_sampler(base)
    data = picture(1, 128, 128)
    for lead in (3, 4, 5, 7):
        prompt, images = row_of([text(1, lead), data, text(2, 3)])
        answer = one(sampler, request("a", prompt, 3, images=images))
        fresh = one(make_sampler(base), request("a", prompt, 3, images=images))
        np.testing.assert_allclose(answer.sequences[0].logprobs.numpy(), fresh.sequences[0].logprobs.numpy(), atol=1e-5)


def test_sequences_that_lose_their_blocks_see_again(base: BaseModel):
    sampler = make_sampler(base, kv_tokens=160, prefill_tokens=64)
    rows = [row_of([text(i, 4), picture(i, 80, 80), text(i + 9, 3)]) for i in range(3)]
    wanted = [request(f"{i}", prompt, 30, images=images, cache_salt=f"{i}") for i, (prompt, images) in enumerate(rows)]
    calm = [one(make_sampler(base), w) for w in wanted]
    answers = run(sampler, *wanted)
    assert sampler.preemptions > 0
    for i, answer in enumerate(calm):
        assert tokens_of(answers[f"{i}"]) == tokens_of(answer)


def test_images_that_do_not_fit_their_prompt_are_refused(base: BaseModel, tiny_model: Path):
    prompt, images = prompts()[0]
    for bad in ([ImageSpan(len(prompt) - 1, 1, 2, images[0].data)], [*images, *images], [ImageSpan(3, 0, 4, b"")]):
        sampler = make_sampler(base)
        with pytest.raises(Exception, match="don't fit"):
            sampler.add(request("a", prompt, 4, images=bad))
        assert not sampler.requests
    with pytest.raises(Exception, match="reads text alone"):
        make_sampler(harness.load_tiny(tiny_model)).add(request("a", prompt, 4, images=images))


def test_a_file_that_is_no_image_fails_its_request_and_no_other(base: BaseModel):
    prompt, images = prompts()[0]
    answers = run(
        make_sampler(base),
        request("bad", prompt, 4, images=[ImageSpan(images[0].start, images[0].rows, images[0].columns, b"no image")]),
        request("good", prompt, 4, images=images, cache_salt="other"),
    )
    assert isinstance(answers["bad"], Failed) and "decoded" in answers["bad"].message
    assert isinstance(answers["good"], SampleResult)
