"""The value head: its gradient, that it learns, and that it is saved, loaded and continued with its adapter bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.persist import VALUE_FILE, State, restore
from everlearn.engine.trainer import Trainer
from everlearn.engine.valuehead import ValueHead
from everlearn.errors import InvalidRequest
from everlearn.losses.value import value_gradient, value_loss
from everlearn.models.attention import PackedBatch, running
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.models.lora import Segment
from everlearn.types import AdamParams, Datum, LoraSpec
from tests.engine.harness import adapter, datum, forward_backward, load_tiny

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=1.0)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def grown(who: TrainingAdapter, base: BaseModel) -> TrainingAdapter:
    """With matrices B and a value head that aren't zero."""
    generator = torch.Generator().manual_seed(3)
    for _, b in who.pairs().values():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    who.value = ValueHead(base.hidden_size, base.device)
    who.value.params.copy_(0.1 * torch.randn(who.value.params.shape, generator=generator))
    return who


def episode(seed: int, length: int, advantage: float = 1.0, **extra: object) -> Datum:
    """A prompt of 4 tokens, then sampled ones, whose value rises to their number."""
    rng = np.random.default_rng(seed)
    row, sampled = rng.integers(3, 512, length + 1), (np.arange(length) > 3).astype(np.float32)
    inputs = {
        "logprobs": rng.normal(-6.2, 0.3, length),
        "advantages": advantage * sampled * rng.normal(size=length),
        "sequence_ratio_mask": sampled,
        "value_targets": sampled * np.arange(length) / length,
    }
    return datum(row[:-1].tolist(), row[1:].tolist(), **{**inputs, **extra})


def test_the_loss_has_the_gradient_of_differences() -> None:
    rng, step = np.random.default_rng(0), 1e-6
    inputs = {name: torch.tensor(rng.standard_normal(6)) for name in ("advantages", "value_targets")}
    inputs["sequence_ratio_mask"] = torch.tensor([0.0, 1, 1, 0, 1, 1])
    values, config = torch.tensor(rng.standard_normal(6)), {"value_coeff": 0.7}
    gradient = value_gradient(values, inputs, config)
    for t in range(6):
        moved = step * torch.eye(6, dtype=torch.float64)[t]
        slope = (value_loss(values + moved, inputs, config).sum() - value_loss(values - moved, inputs, config).sum()) / (2 * step)
        assert float(gradient[t]) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)
        error = float(values[t] - inputs["value_targets"][t]) if inputs["sequence_ratio_mask"][t] else 0.0
        assert float(value_loss(values, inputs, config)[t]) == pytest.approx(0.7 / 2 * error**2)


@pytest.mark.parametrize("budget", [1024, 16])
@pytest.mark.parametrize("trunk", [1.0, 0.25])
def test_head_and_adapter_get_the_gradient_of_autograd(base: BaseModel, budget: int, trunk: float) -> None:
    """With advantages of 0 the values alone teach."""
    data, config = [episode(1, 14, 0.0), episode(2, 9, 0.0)], {"value_coeff": 0.7, "value_trunk": trunk}
    who = grown(adapter(base), base)
    result = forward_backward(Trainer(base, budget), who, data, "ppo", config=config)
    expected, segments, lengths = torch.zeros_like(who.grad), [], [14, 9]
    segments = [Segment(who.training_weights(expected), 0, 23)]
    tokens = torch.cat([torch.from_numpy(d.tokens.numpy().astype(np.int64)) for d in data])
    batch = PackedBatch(lengths, segments)
    hidden = base.hidden(tokens, torch.cat([torch.arange(n) for n in lengths]), batch)
    inputs = {name: torch.cat([torch.from_numpy(d.inputs[name].numpy().copy()) for d in data]) for name in data[0].inputs}
    leaf = who.value.params.clone().requires_grad_()
    seen = hidden.detach() + trunk * (hidden - hidden.detach())
    loss = value_loss(seen @ leaf[:-1] + leaf[-1], inputs, config).sum()
    with running(batch):
        loss.backward()
    loss = loss.detach()
    torch.testing.assert_close(who.value.grad, leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(who.grad, expected, rtol=1e-3, atol=1e-6)
    assert result.metrics["loss:sum"] == pytest.approx(float(loss), rel=1e-5) == pytest.approx(result.metrics["value_loss:sum"], rel=1e-5)
    values = np.concatenate([output["values"].numpy() for output in result.outputs])
    np.testing.assert_allclose(values, (hidden @ leaf[:-1] + leaf[-1]).detach().numpy(), atol=1e-5)


def test_policy_and_value_learn_in_one_pass_what_each_learns_alone(base: BaseModel) -> None:
    both, policy, value = (grown(adapter(base), base) for _ in range(3))
    data = [episode(1, 14), episode(2, 9)]
    without = [datum(d.tokens.numpy().tolist(), d.inputs["target_tokens"].numpy().tolist(), **others(d)) for d in data]
    forward_backward(Trainer(base, 64), both, data, "ppo")
    forward_backward(Trainer(base, 64), policy, without, "ppo")
    forward_backward(Trainer(base, 64), value, [episode(1, 14, 0.0), episode(2, 9, 0.0)], "ppo")
    torch.testing.assert_close(both.grad, policy.grad + value.grad, rtol=1e-3, atol=1e-5)
    assert torch.equal(both.value.grad, value.value.grad) and not policy.value.grad.any()


def others(row: Datum) -> dict[str, object]:
    return {name: array.numpy() for name, array in row.inputs.items() if name not in ("target_tokens", "value_targets")}


def test_a_head_is_born_with_the_first_request_that_trains_it_and_learns(base: BaseModel) -> None:
    who, trainer, data = adapter(base), Trainer(base, 64), [episode(1, 14), episode(2, 9)]
    seen = forward_backward(trainer, who, data, "ppo", forward_only=True)
    assert who.value is None and not seen.outputs[0]["values"].numpy().any() and "values" in seen.outputs[1]
    errors = []
    for _ in range(40):
        errors.append(forward_backward(trainer, who, data, "ppo").metrics["value_error_abs:mean"])
        who.optim_step(AdamParams(learning_rate=3e-3))
    assert who.value is not None and who.value.step == 40
    assert errors[-1] < 0.2 * errors[0]
    assert forward_backward(trainer, who, data, "ppo", forward_only=True).metrics["value_explained_variance:mean"] > 0.8


def test_the_step_is_that_of_adamw_and_clipping_counts_the_head(base: BaseModel) -> None:
    who = grown(adapter(base), base)
    reference = who.value.params.clone().requires_grad_()
    adamw = torch.optim.AdamW([reference], lr=ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=0.01)
    for seed in range(3):
        forward_backward(Trainer(base, 64), who, [episode(seed, 14)], "ppo", config={"value_coeff": 20.0})
        norm = float(torch.cat([who.grad, who.value.grad]).norm())
        assert norm > 1
        reference.grad = who.value.grad / norm
        adamw.step()
        assert who.optim_step(ADAM)["grad_norm:mean"] == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(who.value.params, reference.detach(), rtol=1e-5, atol=1e-7)


def test_a_request_that_fails_leaves_head_and_adapter_as_they_were(base: BaseModel) -> None:
    who, trainer = adapter(base), Trainer(base, 64)
    with pytest.raises(InvalidRequest, match="nothing was added"):
        forward_backward(trainer, who, [episode(1, 9, value_targets=np.full(9, 3e38))], "ppo")
    assert who.value is None and not who.has_grad
    forward_backward(trainer, who, [episode(1, 9)], "ppo")
    before = who.value.grad.clone()
    with pytest.raises(InvalidRequest, match="nothing was added"):
        forward_backward(trainer, who, [episode(1, 9, value_targets=np.full(9, 3e38))], "ppo")
    assert torch.equal(who.value.grad, before) and before.any()


def test_saved_and_loaded_with_the_adapter_it_continues_bit_for_bit(base: BaseModel, tmp_path: Path) -> None:
    who, trainer = adapter(base), Trainer(base, 64)
    for seed in range(3):
        forward_backward(trainer, who, [episode(seed, 14)], "ppo")
        who.optim_step(ADAM)
    forward_backward(trainer, who, [episode(7, 11)], "ppo")  # pending
    State(who, optimizer=True, gradient=True).write(tmp_path / "whole")
    State(who, optimizer=False, gradient=False).write(tmp_path / "weights")
    other = adapter(base)
    restore(other, tmp_path / "whole", optimizer=True)
    assert other.value is not None and other.value.step == 3 and torch.equal(other.value.grad, who.value.grad)
    for one in (who, other):
        forward_backward(trainer, one, [episode(8, 12)], "ppo")
        one.optim_step(ADAM)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(who.value, name), getattr(other.value, name)), name
    assert torch.equal(who.params, other.params)
    bare = adapter(base)
    restore(bare, tmp_path / "weights", optimizer=True)
    assert bare.value is not None and bare.value.step == 0 and not bare.value.grad.any() and bare.value.params.any()


def test_an_adapter_that_never_trained_one_has_no_file_and_loses_it_on_loading_such(base: BaseModel, tmp_path: Path) -> None:
    who, trainer = adapter(base), Trainer(base, 64)
    State(who, optimizer=True, gradient=True).write(tmp_path / "before")
    assert not (tmp_path / "before" / VALUE_FILE).exists()
    forward_backward(trainer, who, [episode(1, 9)], "ppo")
    restore(who, tmp_path / "before", optimizer=True)
    assert who.value is None and not who.has_grad


PLACES = [("cpu", torch.bfloat16), ("cuda", torch.float32), ("cuda", torch.bfloat16)]


@pytest.mark.parametrize(("place", "dtype"), PLACES, ids=str)
def test_on_a_gpu_and_in_half_precision_values_and_gradients_are_the_same(
    base: BaseModel, tiny_model: Path, place: str, dtype: torch.dtype
) -> None:
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    other = load_base(read_info("tiny", tiny_model, []), torch.device(place), dtype)
    spec, found, start = LoraSpec(rank=4, seed=7), [], 0.1 * torch.randn(base.hidden_size + 1, generator=torch.Generator().manual_seed(1))
    for model in (base, other):
        who = TrainingAdapter("run", "default", "tiny", spec, model.adapter_shapes(spec), model.device, model.dtype)
        who.value = ValueHead(model.hidden_size, model.device)
        who.value.params.copy_(start)
        result = forward_backward(Trainer(model, 64), who, [episode(1, 14, 0.0)], "ppo")
        found.append((who.value.grad.cpu(), who.grad.cpu(), torch.tensor(result.outputs[0]["values"].numpy())))
    for name, mine, theirs in zip(("head", "adapter", "values"), *found, strict=True):
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.995, name
