"""Images through the model: logits, positions, packing and gradients against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.errors import Unsupported
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.models.vision import Shown, positions_of
from everlearn.render.patches import patches_of
from everlearn.types import Datum, ImageSpan, LoraSpec
from tests.engine import harness
from tests.engine.harness import CPU, FLOAT32
from tests.tiny_vision import MERGE, PAD, VISION, make_tiny_vision_model, picture, row_of, span

Row = tuple[list[int], list[ImageSpan]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("models") / "tiny-vl")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(read_info("tiny", folder, []), CPU, FLOAT32)


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.nn.Module:
    """transformers' own model, not hooked."""
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()


def texts(seed: int) -> Callable[[int], list[int]]:
    rng = np.random.default_rng(seed)
    return lambda num: rng.integers(7, 512, num).tolist()


def rows() -> list[Row]:
    text = texts(0)
    return [
        row_of([text(5), picture(1), text(4)]),
        row_of([text(3), picture(2, 64, 32), text(2), picture(3, 32, 80), text(6)]),
        row_of([text(9)]),
        row_of([picture(4, 48, 48), text(3)]),
    ]


def inputs_of(row: Row) -> dict[str, torch.Tensor]:
    """As transformers wants them."""
    tokens, images = row
    found = {"input_ids": torch.tensor([tokens])}
    if images:
        found["pixel_values"] = torch.from_numpy(np.concatenate([patches_of(image, VISION) for image in images]))
        found["image_grid_thw"] = torch.tensor([[1, image.rows * MERGE, image.columns * MERGE] for image in images])
        found["mm_token_type_ids"] = torch.tensor([[int(token == PAD) for token in tokens]])
    return found


def own_logprobs(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """[T - 1] of each next token."""
    logits = model(**inputs_of(row)).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(row[0][1:]).unsqueeze(1))[:, 0]


def datum_of(row: Row, seed: int = 0) -> Datum:
    tokens, images = row
    weights = (np.random.default_rng(seed).random(len(tokens) - 1) < 0.7).astype(np.float32)
    made = harness.datum(tokens[:-1], tokens[1:], weights=weights)
    return Datum(made.tokens, made.inputs, images=images)


def test_logits_are_those_of_transformers_packed_with_others(base: BaseModel, plain: torch.nn.Module):
    adapter = harness.adapter(base)
    packed = harness.forward_backward(Trainer(base, 512), adapter, [datum_of(row) for row in rows()], forward_only=True)
    for row, output in zip(rows(), packed.outputs, strict=True):
        with torch.no_grad():
            wanted = own_logprobs(plain, row)
        np.testing.assert_allclose(output["logprobs"].numpy(), wanted.numpy(), atol=1e-5)
        alone = harness.forward_backward(Trainer(base, 512), adapter, [datum_of(row)], forward_only=True)
        np.testing.assert_allclose(output["logprobs"].numpy(), alone.outputs[0]["logprobs"].numpy(), atol=1e-5)


def test_experts_see_too(tmp_path: Path):
    from transformers import Qwen3VLMoeForConditionalGeneration

    folder = make_tiny_vision_model(tmp_path / "moe", experts=True)
    base = load_base(read_info("tiny", folder, []), CPU, FLOAT32)
    plain = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder).eval()
    packed = harness.forward_backward(Trainer(base, 512), harness.adapter(base), [datum_of(row) for row in rows()], forward_only=True)
    for row, output in zip(rows(), packed.outputs, strict=True):
        with torch.no_grad():
            wanted = own_logprobs(plain, row)
        np.testing.assert_allclose(output["logprobs"].numpy(), wanted.numpy(), atol=1e-5)


def test_positions_are_those_of_transformers(plain: torch.nn.Module):
    for tokens, images in rows():
        wanted = torch.arange(len(tokens)).expand(3, -1)
        if images:
            given = inputs_of((tokens, images))
            wanted = plain.model.get_rope_index(given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"])[0][:, 0]
        np.testing.assert_array_equal(positions_of(len(tokens), images), wanted.numpy())


def test_two_images_without_text_between_them_have_positions_of_their_own():
    one, two = ImageSpan(1, 2, 3, b""), ImageSpan(7, 1, 2, b"")
    assert positions_of(10, [one, two]).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 4, 6],
        [0, 1, 1, 1, 2, 2, 2, 4, 4, 6],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6],
    ]


def reference_gradients(base: BaseModel, plain: torch.nn.Module, adapter, data: list[Datum], chosen: list[Row]) -> dict[str, torch.Tensor]:
    """Autograd on transformers' model with W + scale B A for its weights."""
    leaves = {path: (a.clone().requires_grad_(), b.clone().requires_grad_()) for path, (a, b) in adapter.pairs().items()}
    weights = dict(plain.named_parameters())
    merged = {f"{path}.weight": weights[f"{path}.weight"].detach() + adapter.scale * b @ a for path, (a, b) in leaves.items()}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, row):
            return own_logprobs(self.inner, row)

    model = Model()
    named = {f"inner.{name}": value for name, value in merged.items()}
    loss = torch.zeros(())
    for row, datum in zip(chosen, data, strict=True):
        logprobs = torch.func.functional_call(model, named, (row,))
        loss = loss - (logprobs * torch.from_numpy(datum.inputs["weights"].numpy().copy())).sum()
    loss.backward()
    return {f"{path}.{side}": leaf.grad for path, pair in leaves.items() for side, leaf in zip("ab", pair, strict=True)}


@pytest.mark.parametrize("tower", [False, True])
def test_gradients_are_those_of_autograd(base: BaseModel, plain: torch.nn.Module, tower: bool):
    adapter = harness.adapter(base, train_vision=tower)
    with torch.no_grad():
        adapter.params.add_(0.05 * torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(1)))
    adapter.refresh()
    chosen = [*rows(), rows()[0]]  # an image that is shown twice
    data = [datum_of(row, seed) for seed, row in enumerate(chosen)]
    other = harness.adapter(base, "other", rank=2)
    trainer = Trainer(base, 512)
    for who in (adapter, other):  # in one row with a neighbour that leaves the tower as it is
        trainer.start(ForwardBackward("r" + who.model_id, who.model_id, 1, data, "cross_entropy", {}), who)
    while trainer.has_work():
        trainer.run_slice()
    wanted = reference_gradients(base, plain, adapter, data, chosen)
    assert any("visual" in path for path in wanted) is tower
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for path, (a, b) in adapter.training_weights(adapter.grad).grads.items():
        torch.testing.assert_close(a, wanted[f"{path}.a"], atol=2e-5 * scale, rtol=1e-4)
        torch.testing.assert_close(b, wanted[f"{path}.b"], atol=2e-5 * scale, rtol=1e-4)


def test_what_was_seen_is_kept_for_its_tenant_and_within_its_bounds(folder: Path):
    base = load_base(read_info("tiny", folder, []), CPU, FLOAT32)
    tower, images = base.vision, [span(0, picture(seed, 32, 32)) for seed in range(3)]
    first = tower.features([Shown("a", images[0], None), Shown("a", images[0], None)])
    assert tower.computed_images == 1 and first[0] is first[1]
    assert torch.equal(tower.features([Shown("b", images[0], None)])[0], first[0])
    assert tower.computed_images == 2, "another tenant can't tell what was seen"
    size = first[0].numel() * 4
    tower.limit = 3 * size
    tower.features([Shown("a", images[1], None), Shown("a", images[0], None), Shown("a", images[2], None)])
    assert (tower.computed_images, len(tower.kept), tower.kept_bytes) == (4, 3, 3 * size)
    tower.features([Shown("a", images[0], None)])
    assert tower.computed_images == 4, "the one that was used last stays"
    tower.limit = size - 1
    tower.features([Shown("c", images[2], None)])
    assert len(tower.kept) == 3, "what is larger than all of it isn't kept, and drives nothing out"


def test_what_an_image_gives_does_not_depend_on_its_company(folder: Path):
    images = [span(0, picture(seed, 32 + 16 * seed, 48)) for seed in range(3)]
    alone = []
    for image in images:
        base = load_base(read_info("tiny", folder, []), CPU, FLOAT32)
        alone.append(base.vision.features([Shown("a", image, None)])[0])
    together = base.vision.features([Shown("b", image, None) for image in images])
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_model_without_eyes_says_so(tiny_model: Path):
    base = harness.load_tiny(tiny_model)
    with pytest.raises(Unsupported, match="reads text alone"):
        Trainer(base, 512).start(ForwardBackward("r", "run", 1, [datum_of(rows()[0])], "cross_entropy", {}), harness.adapter(base))
    with pytest.raises(Exception, match="vision tower"):
        base.adapter_shapes(LoraSpec(rank=4, train_vision=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft, of transformers
def test_an_adapter_on_the_tower_is_exported_and_comes_back(folder: Path, base: BaseModel, tmp_path: Path):
    """PEFT on transformers' own model says of images what our trainer says."""
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    from everlearn.engine.persist import State, lora_of
    from everlearn.models import export
    from everlearn.models.export import Adapter

    adapter = harness.adapter(base, train_vision=True)
    adapter.params.add_(0.05 * torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(3)))
    adapter.refresh()
    State(adapter, optimizer=False, gradient=False).write(tmp_path / "checkpoint")
    export.export_peft(Adapter(tmp_path / "checkpoint"), tmp_path / "peft", folder)
    trained = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained(folder), tmp_path / "peft").eval()
    outputs = harness.forward_backward(Trainer(base, 512), adapter, [datum_of(row) for row in rows()], forward_only=True).outputs
    for row, output in zip(rows(), outputs, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(output["logprobs"].numpy(), own_logprobs(trained, row).numpy(), atol=2e-5)
    missing = export.import_peft(tmp_path / "peft", tmp_path / "back", "tiny", folder)
    again, first = Adapter(tmp_path / "back"), Adapter(tmp_path / "checkpoint")
    assert not missing and sorted(again.paths) == sorted(first.paths)
    assert lora_of(tmp_path / "back").train_vision
    for path in first.paths:
        assert all(np.array_equal(mine, its) for mine, its in zip(first.pair(path), again.pair(path), strict=True))


def test_an_adapter_on_the_text_alone_comes_back_as_one(folder: Path, base: BaseModel, tmp_path: Path):
    from everlearn.engine.persist import State, lora_of
    from everlearn.models import export
    from everlearn.models.export import Adapter

    State(harness.adapter(base), optimizer=False, gradient=False).write(tmp_path / "checkpoint")
    export.export_peft(Adapter(tmp_path / "checkpoint"), tmp_path / "peft", folder)
    assert not export.import_peft(tmp_path / "peft", tmp_path / "back", "tiny", folder)
    assert not lora_of(tmp_path / "back").train_vision
    assert not [path for path in Adapter(tmp_path / "back").paths if "visual" in path]
