"""Losses at a temperature: the head against float64 in NumPy and differences, and the trainer against the objective that was sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.errors import InvalidRequest
from everlearn.losses.checks import check_config, check_request
from everlearn.losses.spec import SPECS
from everlearn.models.head import Head
from everlearn.models.load import BaseModel
from everlearn.models.lora import HEAD, AdapterWeights, Segment
from everlearn.types import Datum
from tests.engine.harness import adapter, datum, forward_backward, load_tiny

POLICY = [name for name, spec in SPECS.items() if "temperature" in spec.config]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def with_random_b(who: TrainingAdapter) -> TrainingAdapter:
    generator = torch.Generator().manual_seed(3)
    for _, b in who.pairs().values():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return who


# ---- the head ----

T, V, D, R, SCALE = 9, 37, 8, 3, 2.0
SPANS = [(0, 4, 0.5), (4, 7, 1.0), (7, 9, 2.5)]  # tokens and their temperature


def reference(hidden: np.ndarray, weight: np.ndarray, a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log softmax(logits / temperature)[target] in float64, token by token."""
    found = np.zeros(T)
    for start, stop, temperature in SPANS:
        for t in range(start, stop):
            scaled = (weight @ hidden[t] + SCALE * (b @ (a @ hidden[t]))) / temperature
            peak = scaled.max()
            found[t] = scaled[targets[t]] - peak - np.log(np.exp(scaled - peak).sum())
    return found


@pytest.mark.parametrize("active", [np.ones(T, bool), np.arange(T) % 3 > 0])
def test_the_head_at_several_temperatures_is_that_of_numpy(active: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    arrays = {"hidden": (T, D), "weight": (V, D), "a": (R, D), "b": (V, R)}
    exact = {name: rng.normal(size=shape).astype(np.float32).astype(np.float64) for name, shape in arrays.items()}
    targets, slopes = rng.integers(0, V, T), rng.normal(size=T) * active
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in exact.items()}
    grads = (torch.zeros(R, D), torch.zeros(V, R))
    own = AdapterWeights("x", SCALE, {HEAD: (tensors["a"], tensors["b"])}, {HEAD: grads})
    segments = [Segment(own, *span) for span in SPANS]
    head, targets_TK = Head(tensors["weight"], chunk_tokens=2, tile=10), torch.from_numpy(targets).unsqueeze(1)
    slopes_T = torch.from_numpy(slopes.astype(np.float32))
    alone = head.logprobs(tensors["hidden"], targets_TK, segments)
    logprobs, dhidden = head.backward(
        tensors["hidden"], targets_TK, segments, torch.from_numpy(active), lambda _, index_t: slopes_T[index_t].unsqueeze(1)
    )
    expected = reference(**exact, targets=targets)
    np.testing.assert_allclose(logprobs[:, 0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone[:, 0], expected, rtol=1e-5, atol=1e-5)
    for name, got in {"hidden": dhidden, "a": grads[0], "b": grads[1]}.items():
        np.testing.assert_allclose(got, differences(exact, name, targets, slopes), rtol=1e-3, atol=2e-4, err_msg=name)


def differences(exact: dict[str, np.ndarray], name: str, targets: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """The derivative of sum_t slopes[t] logprob[t] by each entry of one array."""
    found, step = np.zeros_like(exact[name]), 1e-5
    for place in np.ndindex(*found.shape):
        values = []
        for sign in (1, -1):
            moved = {**exact, name: exact[name].copy()}
            moved[name][place] += sign * step
            values.append(float(slopes @ reference(**moved, targets=targets)))
        found[place] = (values[0] - values[1]) / (2 * step)
    return found


# ---- the trainer ----


def episode(seed: int, length: int) -> Datum:
    rng = np.random.default_rng(seed)
    row, sampled = rng.integers(3, 512, length + 1), np.arange(length) > 3
    inputs = {"logprobs": rng.normal(-6.2, 0.3, length), "advantages": np.where(sampled, rng.normal(size=length), 0.0)}
    return datum(row[:-1].tolist(), row[1:].tolist(), **inputs, sequence_ratio_mask=sampled)


@pytest.mark.parametrize("loss_fn", POLICY)
def test_requests_of_several_temperatures_share_a_row(base: BaseModel, loss_fn: str) -> None:
    """Each has the gradient that it has alone; at 1 and without the key it is the same to the bit."""
    data = [episode(1, 14), episode(2, 9)]
    if loss_fn not in ("gspo", "mirror_descent"):
        data = [Datum(d.tokens, {name: value for name, value in d.inputs.items() if name != "sequence_ratio_mask"}) for d in data]
    configs: list[dict[str, float]] = [{}, {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0}]
    alone = [with_random_b(adapter(base, f"alone-{place}")) for place in range(4)]
    for who, config in zip(alone, configs, strict=True):
        forward_backward(Trainer(base, 64), who, data, loss_fn, config=config)
    trainer, together = Trainer(base, 256), [with_random_b(adapter(base, f"alone-{place}")) for place in range(4)]
    for place, (who, config) in enumerate(zip(together, configs, strict=True)):
        trainer.start(ForwardBackward(f"r{place}", who.model_id, 1, data, loss_fn, config), who)
    while trainer.has_work():
        trainer.run_slice()
    assert torch.equal(alone[0].grad, alone[1].grad)
    assert not torch.allclose(alone[1].grad, alone[2].grad, rtol=0.05)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.4, 1.7])
def test_the_gradient_is_that_of_the_reward_expected_at_the_temperature(base: BaseModel, temperature: float) -> None:
    """J = sum_y softmax(logits / T)[y] R(y) over the whole vocabulary: what samples at T earn on average. importance_sampling on every y,
    weighed by how often it is drawn, has the derivative of -J by the adapter's weights, here along directions at random."""
    who, trainer, rewards = with_random_b(adapter(base)), Trainer(base, 2048), np.random.default_rng(4).normal(size=512)
    who.refresh()
    config = {"temperature": temperature}

    def all_tokens(logprobs: np.ndarray, weights: np.ndarray) -> list[Datum]:
        return [
            datum([20, 31], [31, y], logprobs=[0.0, logprobs[y]], advantages=[0.0, weights[y] * rewards[y]]) for y in range(len(rewards))
        ]

    def drawn() -> np.ndarray:
        """The log-probability of each token at the temperature, float64 [512]."""
        outputs = forward_backward(
            trainer, who, all_tokens(np.zeros(512), np.zeros(512)), "importance_sampling", config=config, forward_only=True
        ).outputs
        return np.array([output["logprobs"].numpy()[1] for output in outputs], np.float64)

    own = drawn()
    assert np.exp(own).sum() == pytest.approx(1.0, abs=1e-4)
    result = forward_backward(trainer, who, all_tokens(own, np.exp(own)), "importance_sampling", config=config)
    assert result.metrics["ratio:max"] == pytest.approx(1.0, abs=1e-4) and result.metrics["ratio:min"] == pytest.approx(1.0, abs=1e-4)
    start, gradient = who.params.clone(), who.grad.clone().double()
    for seed in range(3):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)) * (gradient.abs() > 0)
        direction = (direction / direction.norm() + gradient.float() / gradient.norm().float()) / 2  # so that the slope isn't near 0
        values = []
        for sign in (1.0, -1.0):
            who.params.copy_(start + sign * 0.02 * direction)
            who.refresh()
            values.append(float(np.exp(drawn()) @ rewards))
        slope = (values[0] - values[1]) / 0.04
        assert -float(gradient @ direction.double()) == pytest.approx(slope, rel=0.02)


# ---- the door ----


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan"), "warm", 2000.0])
def test_temperatures_that_are_none(wrong: float | str) -> None:
    with pytest.raises(InvalidRequest, match="loss_fn_config.temperature is"):
        check_config("ppo", {"temperature": wrong})


def test_losses_at_temperature_1_alone_and_text_to_imitate() -> None:
    assert set(SPECS) - set(POLICY) == {"cross_entropy", "stable_reinforce"}
    for name in ("cross_entropy", "stable_reinforce"):
        with pytest.raises(InvalidRequest, match=f"loss_fn_config.temperature: {name} has no such key"):
            check_config(name, {"temperature": 0.5})
    text = datum([20, 31], [31, 40], logprobs=[0, 0], advantages=[0, 0], weights=[0, 1])
    check_request("ppo", check_config("ppo", {}), [text])
    with pytest.raises(InvalidRequest, match="text is imitated at temperature 1.*cross_entropy"):
        check_request("ppo", check_config("ppo", {"temperature": 0.5}), [text])
