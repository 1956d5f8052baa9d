"""Adapters on experts through trainer and sampler: packed with others or alone, the numbers are the same."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from everlearn.engine import persist
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.trainer import Trainer
from everlearn.errors import InvalidRequest
from everlearn.models.bank import Bank
from everlearn.models.catalog import read_info
from everlearn.models.load import BaseModel, load_base
from everlearn.types import AdamParams, Array
from tests.engine.harness import CPU, FLOAT32, adapter, datum, forward_backward, random_datums
from tests.engine.test_parity import draw
from tests.engine.test_trainer import with_random_b
from tests.moe import KINDS, make_moe

LAYOUTS = ("per_expert", "shared_outer", "rank_split", "off")


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = make_moe(tmp_path_factory.mktemp("moe") / request.param, request.param)
    return load_base(read_info("tiny", folder, []), CPU, FLOAT32)


def tenants(base: BaseModel, num: int) -> list[TrainingAdapter]:
    """Adapters of different ranks and layouts."""
    made = []
    for i in range(num):
        spec = {"rank": 2 + 3 * (i % 3), "expert_lora": LAYOUTS[i % 4], "train_attn": i % 3 != 2 or i % 4 == 3, "train_unembed": False}
        made.append(with_random_b(adapter(base, f"run{i}", seed=i, **spec), i))
    return made


def test_eight_adapters_in_a_batch_train_as_each_alone(base: BaseModel) -> None:
    together, alone = tenants(base, 8), tenants(base, 8)
    trainer = Trainer(base, 400)
    data = [random_datums(i, [5 + 3 * i, 4]) for i in range(8)]
    jobs = [trainer.start(ForwardBackward(str(i), who.model_id, 1, data[i], "cross_entropy", {}), who) for i, who in enumerate(together)]
    while trainer.has_work():
        trainer.run_slice()
    for i, (job, mate, single) in enumerate(zip(jobs, together, alone, strict=True)):
        expected = forward_backward(trainer, single, data[i])
        assert job.error is None
        for mine, theirs in zip(trainer.result(job).outputs, expected.outputs, strict=True):
            np.testing.assert_allclose(mine["logprobs"].numpy(), theirs["logprobs"].numpy(), atol=1e-5)
        assert float(single.grad.abs().max()) > 0
        torch.testing.assert_close(mate.grad, single.grad, rtol=1e-5, atol=1e-5 * float(single.grad.abs().max()))


def test_sampled_and_trained_logprobs_agree(base: BaseModel, tmp_path: Path) -> None:
    bank, runs = Bank(8, CPU, FLOAT32), tenants(base, 3)
    for who in runs[:2]:
        bank.publish(who.model_id, who.scale, who.pairs(), who.expert_scale)
    persist.State(runs[2], optimizer=False, gradient=False).write(tmp_path / "version")
    bank.versions["run2"] = bank._read("run2", str(tmp_path / "version"))  # as after a restart
    runs.append(adapter(base, "zero"))
    versions = [["run0", "run1", "run2", ""][i % 4] for i in range(8)]
    trainer = Trainer(base, 128)
    for (prompt, result), which in zip(draw(base, bank, versions, 8), [0, 1, 2, 3] * 2, strict=True):
        drawn = result.sequences[0]
        row = np.concatenate([prompt, drawn.tokens.numpy()]).tolist()
        trained = forward_backward(trainer, runs[which], [datum(row[:-1], row[1:], weights=[1.0] * (len(row) - 1))], forward_only=True)
        np.testing.assert_allclose(drawn.logprobs.numpy(), trained.outputs[0]["logprobs"].numpy()[len(prompt) - 1 :], atol=1e-5)


def test_state_moments_and_a_pending_gradient_come_back(base: BaseModel, tmp_path: Path) -> None:
    trainer = Trainer(base, 128)
    for layout in LAYOUTS[:3]:
        who = adapter(base, rank=6, expert_lora=layout)
        for _ in range(2):
            forward_backward(trainer, who, random_datums(1, [9, 7]))
            who.optim_step(AdamParams(learning_rate=1e-2))
        forward_backward(trainer, who, random_datums(2, [8]))
        persist.State(who, optimizer=True, gradient=True).write(tmp_path / layout)
        lora = persist.lora_of(tmp_path / layout)
        assert lora == who.lora and lora.expert_lora == layout
        back = TrainingAdapter("run", "default", "tiny", lora, base.adapter_shapes(lora), CPU, FLOAT32)
        persist.restore(back, tmp_path / layout, optimizer=True)
        mine, theirs = who.moments(), back.moments()
        assert mine is not None and theirs is not None
        assert torch.equal(who.params, back.params) and torch.equal(who.grad, back.grad) and back.step == 2
        assert all(torch.equal(m, t) for m, t in zip(mine, theirs, strict=True))


def test_a_checkpoint_older_than_layouts_keeps_experts_as_they_are(base: BaseModel, tmp_path: Path) -> None:
    who = adapter(base, rank=3)
    persist.State(who, optimizer=False, gradient=False).write(tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["expert_lora"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    lora = persist.lora_of(tmp_path / "old")
    assert lora.expert_lora == "off"
    back = TrainingAdapter("run", "default", "tiny", lora, base.adapter_shapes(lora), CPU, FLOAT32)
    persist.restore(back, tmp_path / "old", optimizer=False)
    assert torch.equal(who.params, back.params)
    with pytest.raises(InvalidRequest, match="experts"):
        persist.restore(adapter(base, rank=3, expert_lora="per_expert"), tmp_path / "old", optimizer=False)


def test_layers_that_are_computed_again_meet_the_same_experts(tmp_path: Path) -> None:
    """engine.recompute: the backward pass runs each layer once more, with the routes that the row replays."""
    folder = make_moe(tmp_path / "moe", "deepseek_v3")
    grads = []
    for recompute in (False, True):
        base = load_base(read_info("tiny", folder, []), CPU, FLOAT32)
        if recompute:
            base.enable_recompute()
        who = with_random_b(adapter(base, expert_lora="shared_outer"), 1)
        rng = np.random.default_rng(0)
        routes = np.stack([rng.permutation(8)[:3] for _ in range(9)]).astype(np.int32)[:, None]
        replayed = msgspec.structs.replace(random_datums(3, [9])[0], routing=Array.of(routes))
        result = forward_backward(Trainer(base, 64), who, [replayed, *random_datums(4, [7])])
        assert result.metrics["e_frac_with_tokens:mean"] > 0
        grads.append(who.grad)
    torch.testing.assert_close(grads[0], grads[1])
