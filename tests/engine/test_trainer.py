from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.errors import InvalidRequest
from everlearn.models import head
from everlearn.models.load import BaseModel
from everlearn.types import AdamParams, Array, Datum
from tests.engine.harness import adapter, datum, forward_backward, load_tiny, random_datums


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def with_random_b(who, seed: int = 3):
    """An adapter that changes the model: B is zero at birth."""
    generator = torch.Generator().manual_seed(seed)
    for _, b in who.pairs().values():
        b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return who


def test_the_same_loss_curve_as_peft(base: BaseModel, tiny_model: Path) -> None:
    """Same initialisation, same data, AdamW: 20 steps with the head's adapter too, to 1e-4 in the loss."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_model), peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets)
        )
    ours = adapter(base)
    trainable = [(name, p) for name, p in reference.named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        path = name.removeprefix("base_model.model.").split(".lora_")[0]
        parameter.data.copy_(ours.pairs()[path][0 if "lora_A" in name else 1])
    optimizer = torch.optim.AdamW([p for _, p in trainable], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    trainer = Trainer(base, 64)
    for step in range(20):
        data = random_datums(step % 4, [20, 20, 20])
        result = forward_backward(trainer, ours, data)
        ours.optim_step(AdamParams(learning_rate=1e-3, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0))
        tokens = torch.stack([torch.from_numpy(d.tokens.numpy().astype(np.int64)) for d in data])
        labels = torch.stack([torch.from_numpy(d.inputs["target_tokens"].numpy().copy()) for d in data])
        weights = torch.stack([torch.from_numpy(d.inputs["weights"].numpy().copy()) for d in data])
        logprobs = reference(tokens).logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
        loss = -(logprobs * weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trainable], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert result.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
        for i, output in enumerate(result.outputs):
            np.testing.assert_allclose(output["logprobs"].numpy(), logprobs[i].detach().numpy(), atol=1e-3)


def test_an_adapter_among_seven_others_equals_the_one_alone(base: BaseModel) -> None:
    lengths = [5, 17, 30, 17]
    alone = with_random_b(adapter(base, "alone"), 0)
    for step in range(3):
        forward_backward(Trainer(base, 64), alone, random_datums(step, lengths))
        alone.optim_step(AdamParams(learning_rate=1e-3))
    crowd = [with_random_b(adapter(base, f"run{i}", rank=[4, 2, 8, 3, 4, 1, 16, 5][i], seed=7 + i), i) for i in range(8)]
    trainer = Trainer(base, 256)
    for step in range(3):
        jobs = []
        for i, who in enumerate(crowd):
            data = random_datums(step + 100 * i, lengths if i == 0 else [3 + i, 9 * i])
            jobs.append(trainer.start(ForwardBackward("r", who.model_id, 1, data, "cross_entropy", {}), who))
        rows = 0
        while trainer.has_work():
            trainer.run_slice()
            rows += 1
        assert rows < len(crowd), "tenants must share rows"
        for who in crowd:
            who.optim_step(AdamParams(learning_rate=1e-3))
    difference = torch.linalg.vector_norm(crowd[0].params - alone.params) / torch.linalg.vector_norm(alone.params)
    assert difference < 1e-5


def test_forward_only_leaves_the_gradient_alone(base: BaseModel) -> None:
    who, trainer = with_random_b(adapter(base)), Trainer(base, 64)
    data = random_datums(1, [10, 12])
    first = forward_backward(trainer, who, data)
    before = who.grad.clone()
    second = forward_backward(trainer, who, data, forward_only=True)
    assert torch.equal(before, who.grad)
    for a, b in zip(first.outputs, second.outputs, strict=True):
        np.testing.assert_allclose(a["logprobs"].numpy(), b["logprobs"].numpy(), atol=1e-5)
    assert first.metrics["loss:sum"] == pytest.approx(second.metrics["loss:sum"], rel=1e-6)


def test_gradients_accumulate_over_calls_until_the_step(base: BaseModel) -> None:
    data = random_datums(2, [10, 12, 7])
    together, apart, trainer = with_random_b(adapter(base)), with_random_b(adapter(base)), Trainer(base, 64)
    forward_backward(trainer, together, data)
    for d in data:
        forward_backward(trainer, apart, [d])
    torch.testing.assert_close(apart.grad, together.grad, rtol=1e-4, atol=1e-5)
    apart.optim_step(AdamParams())
    assert not apart.grad.any() and not apart.has_grad


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_have_the_gradient_of_autograd(base: BaseModel, loss_fn: str) -> None:
    """The head's chunked gradient against autograd through whole logits."""
    from everlearn.losses.table import LOSSES
    from everlearn.models.attention import PackedBatch
    from everlearn.models.lora import Segment

    rng = np.random.default_rng(5)
    lengths = [9, 14]
    data = []
    for n in lengths:
        row = rng.integers(3, 512, n + 1)
        extra = {"sequence_ratio_mask": (np.arange(n) > 3).astype(np.float32)} if loss_fn == "gspo" else {}
        advantages = np.where(np.arange(n) > 3, rng.normal(size=n), 0.0)
        data.append(datum(row[:-1].tolist(), row[1:].tolist(), logprobs=rng.normal(-6, 0.3, n), advantages=advantages, **extra))
    who = with_random_b(adapter(base))
    forward_backward(Trainer(base, 64), who, data, loss_fn)

    loss = LOSSES[loss_fn]
    tokens = torch.cat([torch.from_numpy(d.tokens.numpy().astype(np.int64)) for d in sorted(data, key=lambda d: -d.tokens.shape[0])])
    ordered = sorted(data, key=lambda d: -d.tokens.shape[0])
    inputs = {k: torch.cat([torch.from_numpy(d.inputs[k].numpy().copy()) for d in ordered]) for k in data[0].inputs}
    expected = torch.zeros_like(who.grad)
    segments = [Segment(who.training_weights(expected), 0, sum(lengths))]
    spans = [(0, 14), (14, 23)]
    hidden = base.hidden(tokens, torch.cat([torch.arange(14), torch.arange(9)]), PackedBatch([14, 9], segments))
    a, b = (t.clone().requires_grad_() for t in who.pairs()["lm_head"])
    logits = hidden @ base.head.weight.t() + who.scale * (hidden @ a.t()) @ b.t()
    logprobs = logits.log_softmax(-1).gather(1, inputs["target_tokens"].unsqueeze(1)).squeeze(1)
    loss.fn(logprobs, inputs, dict(loss.spec.defaults), spans).sum().backward()
    from everlearn.engine.adapter import split

    head_a, head_b = split(expected, who.shapes)["lm_head"]
    head_a.add_(a.grad)
    head_b.add_(b.grad)
    torch.testing.assert_close(who.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("floats", [2**24, 600])
def test_several_targets_a_position(base: BaseModel, monkeypatch: pytest.MonkeyPatch, floats: int) -> None:
    """[T, K] targets (distillation) are K cross entropies with their own weights, however many are gathered at one time."""
    monkeypatch.setattr(head, "WIDE_FLOATS", floats)
    rng = np.random.default_rng(0)
    tokens, targets, weights = rng.integers(3, 512, 8), rng.integers(3, 512, (8, 3)), rng.random((8, 3))
    wide, thin, trainer = with_random_b(adapter(base)), with_random_b(adapter(base)), Trainer(base, 64)
    result = forward_backward(trainer, wide, [datum(tokens.tolist(), targets.tolist(), weights=weights)])
    assert result.outputs[0]["logprobs"].shape == [8, 3]
    total = 0.0
    for k in range(3):
        total += forward_backward(trainer, thin, [datum(tokens.tolist(), targets[:, k].tolist(), weights=weights[:, k])]).metrics[
            "loss:sum"
        ]
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(wide.grad, thin.grad, rtol=1e-3, atol=1e-5)


def test_a_request_that_fails_leaves_the_adapter_as_it_was(base: BaseModel) -> None:
    who, trainer = with_random_b(adapter(base)), Trainer(base, 16)
    good = random_datums(1, [10, 12])
    forward_backward(trainer, who, good)
    before = who.grad.clone()
    huge = datum([5, 6, 7], [6, 7, 8], weights=[3e38] * 3)
    with pytest.raises(InvalidRequest, match="nothing was added"):
        forward_backward(trainer, who, [datum([5] * 15, [6] * 15, weights=[1.0] * 15), huge])
    assert torch.equal(before, who.grad) and who.has_grad
    fresh = with_random_b(adapter(base))
    with pytest.raises(InvalidRequest):
        forward_backward(trainer, fresh, [huge])
    assert not fresh.grad.any() and not fresh.has_grad


@pytest.mark.parametrize("switch", ["train_attn", "train_mlp", "train_unembed"])
def test_switches_choose_the_layers(base: BaseModel, switch: str) -> None:
    others = {"train_attn": False, "train_mlp": False, "train_unembed": False} | {switch: True}
    paths = set(adapter(base, **others).pairs())
    wanted = {"train_attn": "self_attn", "train_mlp": "mlp", "train_unembed": "lm_head"}[switch]
    assert paths and all(wanted in path for path in paths)


def test_the_seed_is_honoured_and_a_is_bounded(base: BaseModel) -> None:
    one, same, other = adapter(base, seed=1), adapter(base, seed=1), adapter(base, seed=2)
    assert torch.equal(one.params, same.params) and not torch.equal(one.params, other.params)
    a, b = one.pairs()["model.layers.0.self_attn.q_proj"]
    assert a.abs().max() <= 1 / 8 and a.abs().max() > 0.1 and not b.any()
    assert one.scale == 8.0


def test_nothing_to_train_is_refused(base: BaseModel) -> None:
    with pytest.raises(InvalidRequest, match="trains nothing"):
        adapter(base, train_attn=False, train_mlp=False, train_unembed=False)


def test_recomputed_activations_give_the_same_gradient(tiny_model: Path) -> None:
    kept, again = load_tiny(tiny_model), load_tiny(tiny_model)
    again.enable_recompute()
    data = random_datums(4, [12, 30, 12])
    one, two = with_random_b(adapter(kept)), with_random_b(adapter(again))
    first = forward_backward(Trainer(kept, 64), one, data)
    second = forward_backward(Trainer(again, 64), two, data)
    assert first.metrics == second.metrics
    assert torch.equal(one.grad, two.grad)


def test_a_row_that_breaks_costs_only_the_request_that_breaks_it(base: BaseModel) -> None:
    """A target outside of the vocabulary (the door lets none in) breaks the row; the neighbours run again, and equal themselves alone."""
    data = [[datum([5, 6, 7], [6, 7, 5000], weights=[1, 1, 1])], random_datums(1, [9, 12, 7]), random_datums(2, [9, 12, 7])]
    expected = []
    for datums in data[1:]:
        who = with_random_b(adapter(base))
        forward_backward(Trainer(base, 20), who, datums)
        expected.append(who.grad.clone())
    trainer, adapters = Trainer(base, 60), [with_random_b(adapter(base, f"run{i}")) for i in range(3)]
    commands = [ForwardBackward(f"r{i}", f"run{i}", 1, datums, "cross_entropy", {}) for i, datums in enumerate(data)]
    jobs = [trainer.start(command, who) for command, who in zip(commands, adapters, strict=True)]
    done = []
    while trainer.has_work():
        done += trainer.run_slice()
    assert len(done) == 3 and jobs[0].error is not None and jobs[0].error.code == "internal"
    assert not adapters[0].grad.any() and not adapters[0].has_grad
    for job, who, grad in zip(jobs[1:], adapters[1:], expected, strict=True):
        assert job.error is None and job.result is not None
        assert torch.allclose(who.grad, grad, atol=1e-5)


def test_outputs_have_the_shape_of_their_own_targets(base: BaseModel) -> None:
    rng = np.random.default_rng(0)
    flat = random_datums(1, [6])[0]
    wide = Datum(flat.tokens, {"target_tokens": Array.of(rng.integers(3, 500, (6, 1))), "weights": Array.of(np.ones((6, 1), np.float32))})
    result = forward_backward(Trainer(base, 64), adapter(base), [flat, wide])
    assert [output["logprobs"].shape for output in result.outputs] == [[6], [6, 1]]


def test_gradients_that_overflow_together_are_refused_where_the_last_one_joins(base: BaseModel) -> None:
    """Not by the step: who is told that it failed must be able to count on it that it changed nothing."""
    who, trainer = with_random_b(adapter(base)), Trainer(base, 64)
    forward_backward(trainer, who, random_datums(1, [10]))
    one = float(torch.linalg.vector_norm(who.grad))
    low, high = 1.0, 3e38 / float(who.grad.abs().max())
    while high / low > 1.001:  # the largest factor whose norm is a float32
        middle = (low * high) ** 0.5
        low, high = (middle, high) if torch.linalg.vector_norm(who.grad * middle).isfinite() else (low, middle)
    who.clear_gradient()
    loud = [datum(d.tokens.numpy().tolist(), d.inputs["target_tokens"].numpy().tolist(), weights=d.inputs["weights"].numpy() * low * 0.9)
            for d in random_datums(1, [10])]  # fmt: skip
    forward_backward(trainer, who, loud)
    before = who.grad.clone()
    with pytest.raises(InvalidRequest, match="accumulated before"):
        forward_backward(trainer, who, loud)
    assert torch.equal(before, who.grad) and who.has_grad
    assert who.optim_step(AdamParams())["grad_norm:mean"] > one
    forward_backward(trainer, who, random_datums(1, [10]))
    assert who.optim_step(AdamParams())["optimizer_step:max"] == 2
