"""Lite-VLM in the engine: logits, gradients and samples against the plain forward of the same folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.trainer import Trainer
from everlearn.errors import Unsupported
from everlearn.models import families, lite_folder
from everlearn.models.architecture import auto_class, read_config
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.models.vision import Shown
from everlearn.render import template, tokenizer
from everlearn.render.patches import patches_of
from everlearn.types import Datum, ImageSpan, SampleResult
from tests.engine import harness
from tests.engine.harness import CPU, FLOAT32
from tests.engine.sampling import make_sampler, request, run
from tests.tiny import make_tiny_model
from tests.tiny_lite import PAD, SIDE, VISION, make_tiny_lite_model, make_tiny_tower, row_of, span
from tests.tiny_vision import picture

Row = tuple[list[int], list[ImageSpan]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lite_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(read_info("tiny", folder, []), CPU, FLOAT32)


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.nn.Module:
    return auto_class(read_config(folder)).from_pretrained(folder).eval().requires_grad_(False)


def rows() -> list[Row]:
    rng = np.random.default_rng(0)

    def text(num: int) -> list[int]:
        return rng.integers(7, 512, num).tolist()

    return [
        row_of([text(5), picture(1), text(4)]),
        row_of([text(3), picture(2, 64, 32), text(2), picture(3, 32, 80), text(6)]),
        row_of([text(9)]),
        row_of([picture(4, 48, 48), text(3)]),
    ]


def plain_logprobs(model: torch.nn.Module, tokens: list[int], images: list[ImageSpan]) -> torch.Tensor:
    """[T - 1] of each next token."""
    pixels = torch.from_numpy(np.concatenate([patches_of(image, VISION) for image in images])) if images else None
    pixels = None if pixels is None else pixels.reshape(-1, 3, SIDE, SIDE)
    logits = model(torch.tensor([tokens]), pixels).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:]).unsqueeze(1))[:, 0]


def datum_of(row: Row, seed: int = 0) -> Datum:
    tokens, images = row
    weights = (np.random.default_rng(seed).random(len(tokens) - 1) < 0.7).astype(np.float32)
    made = harness.datum(tokens[:-1], tokens[1:], weights=weights)
    return Datum(made.tokens, made.inputs, images=images)


def trained(base: BaseModel, tower: bool) -> harness.TrainingAdapter:
    adapter = harness.adapter(base, train_vision=tower)
    with torch.no_grad():
        adapter.params.add_(0.05 * torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(1)))
    adapter.refresh()
    return adapter


def test_the_folder_says_how_it_sees(folder: Path):
    info = read_info("tiny", folder, [])
    assert info.vision == VISION
    assert info.architecture == "LiteVlmForConditionalGeneration" and not families.warning_of("tiny", info.architecture)
    read = tokenizer.load(folder)
    content = [{"type": "image"}, {"type": "text", "text": "what is <|image_pad|>?"}]
    asked = read.encode(template.render(read, [{"role": "user", "content": content}]))
    assert asked.count(PAD) == 1, "a user's own words make no place for an image"


def test_logits_are_those_of_the_plain_forward_packed_with_others(base: BaseModel, plain: torch.nn.Module):
    packed = harness.forward_backward(Trainer(base, 512), harness.adapter(base), [datum_of(row) for row in rows()], forward_only=True)
    for row, output in zip(rows(), packed.outputs, strict=True):
        np.testing.assert_allclose(output["logprobs"].numpy(), plain_logprobs(plain, *row).numpy(), atol=1e-5)


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("prefill", [256, 7])
def test_the_sampler_agrees_with_the_trainer(base: BaseModel, prefill: int, tower: bool):
    adapter = trained(base, tower)
    sampler = make_sampler(base, prefill_tokens=prefill, max_batch=3)
    sampler.bank.publish("run@1", adapter.scale, adapter.pairs())
    asked = rows()
    wanted = [
        request(f"{i}", prompt, 6, num_samples=2, images=images, version="run@1", prompt_logprobs=True)
        for i, (prompt, images) in enumerate(asked)
    ]
    answers = run(sampler, *wanted)
    for i, (prompt, images) in enumerate(asked):
        answer = answers[f"{i}"]
        assert isinstance(answer, SampleResult), answer
        for sequence in answer.sequences:
            whole = [*prompt, *sequence.tokens.numpy().tolist()]
            given = datum_of((whole, images))
            said = harness.forward_backward(Trainer(base, 512), adapter, [given], forward_only=True).outputs[0]["logprobs"].numpy()
            np.testing.assert_allclose(sequence.logprobs.numpy(), said[len(prompt) - 1 :], atol=1e-5)
            np.testing.assert_allclose(answer.prompt_logprobs.numpy()[1:], said[: len(prompt) - 1], atol=1e-5)


@pytest.mark.parametrize("tower", [False, True])
def test_gradients_are_those_of_autograd(base: BaseModel, plain: torch.nn.Module, tower: bool):
    adapter = trained(base, tower)
    data = [datum_of(row, seed) for seed, row in enumerate(rows())]
    harness.forward_backward(Trainer(base, 512), adapter, data)
    leaves = {path: (a.clone().requires_grad_(), b.clone().requires_grad_()) for path, (a, b) in adapter.pairs().items()}
    assert {path for path in leaves if "visual" in path} == ({f"model.visual.projector.linear_{n}" for n in (1, 2)} if tower else set())
    weights = dict(plain.named_parameters())
    merged = {f"{path}.weight": weights[f"{path}.weight"] + adapter.scale * b @ a for path, (a, b) in leaves.items()}
    loss = torch.zeros(())
    for (tokens, images), datum in zip(rows(), data, strict=True):
        pixels = torch.from_numpy(np.concatenate([patches_of(image, VISION) for image in images])) if images else None
        logits = torch.func.functional_call(plain, merged, (torch.tensor([tokens]), pixels)).logits[0, :-1].log_softmax(-1)
        logprobs = logits.gather(1, torch.tensor(tokens[1:]).unsqueeze(1))[:, 0]
        loss = loss - (logprobs * torch.from_numpy(datum.inputs["weights"].numpy().copy())).sum()
    loss.backward()
    scale = max(float(leaf.grad.abs().max()) for pair in leaves.values() for leaf in pair)
    for path, grads in adapter.training_weights(adapter.grad).grads.items():
        for mine, leaf in zip(grads, leaves[path], strict=True):
            torch.testing.assert_close(mine, leaf.grad, atol=2e-5 * scale, rtol=1e-4)


def test_an_image_is_computed_once_and_its_features_differ_by_cell(folder: Path):
    base = load_base(read_info("tiny", folder, []), CPU, FLOAT32)
    image = span(0, picture(5, 200, 30))
    first, again = (base.vision.features([Shown("a", image, None)])[0] for _ in range(2))
    assert torch.equal(first, again) and base.vision.computed_images == 1
    assert first.shape == (1, 4, 64) and float((first[0, 0] - first[0, 3]).detach().abs().max()) > 1e-3


def test_what_makes_no_lite_vlm_is_refused(folder: Path, tmp_path: Path):
    tower = make_tiny_tower(tmp_path / "tower")
    with pytest.raises(Unsupported, match="special tokens that nothing uses"):
        lite_folder.assemble(make_tiny_model(tmp_path / "text"), tower, 2)
    with pytest.raises(Unsupported, match="sees already"):
        lite_folder.assemble(folder, tower, 2)
