"""Weights, masks and terms of the policy losses through the trainer: the gradient of autograd, whatever the row is cut into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine import protocol
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.losses.spec import SPECS
from everlearn.losses.table import LOSSES
from everlearn.models.attention import PackedBatch
from everlearn.models.load import BaseModel
from everlearn.models.lora import Segment
from everlearn.types import Datum
from tests.engine.harness import adapter, datum, forward_backward, load_tiny

TERMS = {"kl_coeff": 0.2, "entropy_coeff": 0.1}
CASES: dict[str, tuple[str, dict[str, float | str], set[str]]] = {
    "mirror_descent": ("mirror_descent", {"tau": 0.2, **TERMS}, {"sequence_ratio_mask", "reference_logprobs"}),
    "decoupled ppo": ("ppo", {}, {"old_logprobs"}),
    "truncated per token": (
        "ppo",
        {"importance_weight": "tis_token", "tis_threshold": 1.1, **TERMS},
        {"old_logprobs", "reference_logprobs"},
    ),
    "truncated per sequence": ("importance_sampling", {"importance_weight": "tis_sequence", "tis_threshold": 1.1}, {"old_logprobs"}),
    "masked in bypass": ("cispo", {"importance_weight": "icepop", "ratio_low": 0.8, "ratio_high": 1.2}, set()),
    "sequences left out": ("gspo", {"geometric_ratio_high": 1.1, "negative_drift_max": 0.1}, {"sequence_ratio_mask", "old_logprobs"}),
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def with_random_b(who: TrainingAdapter) -> TrainingAdapter:
    generator = torch.Generator().manual_seed(3)
    for _, b in who.pairs().values():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return who


def episode(seed: int, length: int, names: set[str]) -> Datum:
    """A prompt of 4 tokens, and tokens with an advantage but for the last, which the mask alone marks as sampled."""
    rng = np.random.default_rng(seed)
    row, sampled = rng.integers(3, 512, length + 1), np.arange(length) > 3
    logprobs = rng.normal(-6.2, 0.3, length)
    extra = {
        "sequence_ratio_mask": sampled,
        "old_logprobs": logprobs + rng.normal(0, 0.2, length),
        "reference_logprobs": logprobs + rng.normal(0, 0.5, length),
    }
    advantages = np.where(sampled & (np.arange(length) < length - 1), rng.normal(size=length), 0.0)
    chosen = {name: extra[name] for name in names}
    return datum(row[:-1].tolist(), row[1:].tolist(), logprobs=logprobs, advantages=advantages, **chosen)


def text(seed: int, length: int, names: set[str]) -> Datum:
    """To imitate: nothing of it was sampled."""
    row, zeros = np.random.default_rng(seed).integers(3, 512, length + 1), np.zeros(length)
    inputs = dict.fromkeys({"logprobs", "advantages"} | names, zeros)
    return datum(row[:-1].tolist(), row[1:].tolist(), weights=np.full(length, 0.05), **inputs)


def by_autograd(base: BaseModel, who: TrainingAdapter, data: list[Datum], loss_fn: str, config: dict[str, float | str]) -> torch.Tensor:
    """The gradient through whole logits of one row, for an adapter on the head alone."""
    lengths = [d.tokens.shape[0] for d in data]
    stops = np.cumsum(lengths).tolist()
    spans = list(zip([0, *stops[:-1]], stops, strict=True))
    names = set().union(*(d.inputs for d in data))
    inputs = {
        name: torch.cat(
            [torch.from_numpy(d.inputs[name].numpy().copy()) if name in d.inputs else torch.zeros(d.tokens.shape[0]) for d in data]
        )
        for name in names
    }
    tokens = torch.cat([torch.from_numpy(d.tokens.numpy().astype(np.int64)) for d in data])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        hidden = base.hidden(tokens, positions, PackedBatch(lengths, [Segment(who.weights, 0, sum(lengths))]))
    a, b = (t.clone().requires_grad_() for t in who.pairs()["lm_head"])
    logits = hidden @ base.head.weight.t() + who.scale * (hidden @ a.t()) @ b.t()
    logprobs = logits.log_softmax(-1).gather(1, inputs["target_tokens"].unsqueeze(1)).squeeze(1)
    LOSSES[loss_fn].fn(logprobs, inputs, config, spans).sum().backward()
    return torch.cat([a.grad.flatten(), b.grad.flatten()])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [1024, 16])
def test_the_chunked_gradient_is_that_of_autograd(base: BaseModel, case: str, budget: int) -> None:
    loss_fn, config, names = CASES[case]
    data = [episode(1, 14, names), text(2, 11, names), episode(3, 9, names)]
    who = with_random_b(adapter(base, train_attn=False, train_mlp=False))
    result = forward_backward(Trainer(base, budget), who, data, loss_fn, config=config)
    torch.testing.assert_close(who.grad, by_autograd(base, who, data, loss_fn, config), rtol=1e-3, atol=1e-5)
    assert result.metrics["cross_entropy:sum"] > 0
    again = with_random_b(adapter(base, train_attn=False, train_mlp=False))
    repeated = forward_backward(Trainer(base, budget), again, data, loss_fn, config=config)
    assert torch.equal(who.grad, again.grad) and result == repeated


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "gspo", "mirror_descent"])
def test_text_among_episodes_is_two_requests_before_one_step(base: BaseModel, loss_fn: str) -> None:
    names = {"sequence_ratio_mask"}
    episodes, texts = [episode(1, 14, names), episode(3, 9, names)], [text(2, 11, names), text(4, 17, names)]
    together, apart, trainer = with_random_b(adapter(base)), with_random_b(adapter(base)), Trainer(base, 64)
    one = forward_backward(trainer, together, [*episodes, *texts], loss_fn)
    two = forward_backward(trainer, apart, episodes, loss_fn)
    plain = [
        datum(d.tokens.numpy().tolist(), d.inputs["target_tokens"].numpy().tolist(), weights=d.inputs["weights"].numpy()) for d in texts
    ]
    three = forward_backward(trainer, apart, plain, "cross_entropy")
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-3, atol=1e-5)
    assert one.metrics["loss:sum"] == pytest.approx(two.metrics["loss:sum"] + three.metrics["loss:sum"], rel=1e-5)
    assert one.metrics["cross_entropy:sum"] == pytest.approx(three.metrics["loss:sum"], rel=1e-5)
    assert one.metrics["trained_tokens:sum"] == two.metrics["trained_tokens:sum"]


def test_a_reference_pulls_tokens_without_advantage_that_the_mask_marks(base: BaseModel) -> None:
    names = {"sequence_ratio_mask", "reference_logprobs"}
    data = [episode(1, 14, names)]
    data[0].inputs["advantages"] = text(1, 14, {"advantages"}).inputs["advantages"]
    who, trainer = with_random_b(adapter(base)), Trainer(base, 64)
    forward_backward(trainer, who, data, "ppo")
    assert not who.grad.any()
    result = forward_backward(trainer, who, data, "ppo", config={"kl_coeff": 0.1})
    assert who.grad.any() and result.metrics["kl_reference_k3:mean"] > 0


def test_choices_pass_between_api_and_engine_and_old_entries_keep_their_bits(base: BaseModel) -> None:
    """A request of before the choices were there has a configuration without them, in the log too."""
    chosen = ForwardBackward("r", "m", 1, [episode(1, 9, set())], "ppo", {"importance_weight": "icepop", "ratio_low": 0.25})
    assert protocol.decode_command(protocol.encode(chosen)) == chosen
    one, two = with_random_b(adapter(base)), with_random_b(adapter(base))
    bounds = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3}
    for who, config in ((one, bounds), (two, {**SPECS["ppo"].defaults, **bounds})):
        forward_backward(Trainer(base, 64), who, chosen.data, "ppo", config=config)
    assert torch.equal(one.grad, two.grad) and one.grad.any()
