"""recipes/full_tuning.py: every weight of a small model trains, behind the same methods, losses and loop as an adapter on a server."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
import torch
from tinker import types

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.rl.rollouts import Limits
from everlearn.rl.settings import Settings
from everlearn.rl.temperature import Temperature
from everlearn.rl.train import train
from recipes import full_tuning
from recipes.full_tuning import FullClient, FullService
from tests.rl.run_first import Starts
from tests.rl.test_train import lines, without_time


@pytest.fixture
def full(tiny_model: Path, tmp_path: Path) -> FullService:
    return FullService(tiny_model, tmp_path / "states")


def episodes(seed: int = 0) -> list[types.Datum]:
    rng, made = np.random.default_rng(seed), []
    for length in (9, 14):
        row = rng.integers(3, 512, length + 1).tolist()
        inputs = {
            "target_tokens": row[1:],
            "logprobs": rng.normal(-6.2, 0.3, length).tolist(),
            "advantages": rng.normal(size=length).tolist(),
        }
        made.append(types.Datum(model_input=types.ModelInput.from_ints(row[:-1]), loss_fn_inputs=inputs))
    return made


def weights(client: FullClient) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in client.model.named_parameters()}


def test_it_computes_what_the_server_computes(full: FullService, service: tinker.ServiceClient):
    """An adapter that was never trained is the base model: log-probabilities, loss and metrics of both agree."""
    ours, theirs = full.create_lora_training_client("tiny").result(), service.create_lora_training_client("tiny", rank=4).result()
    for loss, config in (("ppo", {"temperature": 0.7}), ("cispo", None)):
        one, other = (client.forward_backward(episodes(), loss, config).result() for client in (ours, theirs))
        for a, b in zip(one.loss_fn_outputs, other.loss_fn_outputs, strict=True):
            np.testing.assert_allclose(a["logprobs"].to_numpy(), b["logprobs"].to_numpy(), atol=1e-4)
        assert one.metrics == pytest.approx({name: other.metrics[name] for name in one.metrics}, rel=1e-3, abs=1e-4)


def test_every_weight_has_the_gradient_of_differences(full: FullService):
    client = full.create_lora_training_client("tiny").result()
    client.forward_backward(episodes(), "importance_sampling").result()
    gradients = {name: value.grad.clone() for name, value in client.model.named_parameters()}
    assert all(bool(gradient.any()) for gradient in gradients.values()), "embedding and norms too"
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"):
        parameter, gradient = client.model.get_parameter(name), gradients[name]
        direction, values = gradient / gradient.norm(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 0.01 * direction)
                values.append(client.forward(episodes(), "importance_sampling").result().metrics["loss:sum"])
                parameter.sub_(sign * 0.01 * direction)
        assert (values[0] - values[1]) / 0.02 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_it_learns_in_the_loop_and_goes_on_bit_for_bit(full: FullService, tiny_model: Path, tmp_path: Path):
    settings = Settings("tiny", steps=6, learning_rate=1e-2, loss="ppo", epochs=2, max_tokens=2, save_every=2, seed=5)
    one_by_one = Limits(episodes_at_once=1)  # batches form by chance, and the last bits with them
    settings = msgspec.structs.replace(settings, temperature=Temperature(1.2, 0.8, 5), limits=one_by_one)
    held_out = Starts(60, 2, 1)
    rows = train(full, settings, Starts(30, 2, 16), tmp_path / "calm", held_out)  # type: ignore[arg-type]
    assert rows[0]["reward/total"] < 0.6 and rows[5]["reward/total"] > 0.75 and rows[0]["loss/ratio:max"] > 1

    def stops(row: dict[str, float]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    other = FullService(tiny_model, tmp_path / "others")
    with pytest.raises(KeyboardInterrupt):
        train(other, settings, Starts(30, 2, 16), tmp_path / "hit", held_out, on_step=stops)  # type: ignore[arg-type]
    again = train(other, settings, Starts(30, 2, 16), tmp_path / "hit", held_out)  # type: ignore[arg-type]
    assert without_time(again) == without_time(rows) == without_time(lines(tmp_path / "calm" / "metrics.jsonl"))
    settings = Settings("tiny", steps=1, learning_rate=1e-2, max_tokens=3)
    (row,) = train(full, settings, Starts(30, 2, 4), tmp_path / "once")  # type: ignore[arg-type]
    assert row["ratio/max"] == pytest.approx(1.0, abs=1e-4) == row["ratio/min"], "sampler and trainer agree"


def test_a_state_is_a_folder_of_a_model(full: FullService):
    from transformers import AutoModelForCausalLM

    client = full.create_lora_training_client("tiny").result()
    before = weights(client)
    sampler = client.save_weights_and_get_sampling_client().result()
    client.forward_backward(episodes(), "importance_sampling").result()
    client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    after = weights(client)
    assert all(not torch.equal(before[name], after[name]) for name in before), "every weight was trained"
    assert all(torch.equal(value, before[name]) for name, value in sampler.model.named_parameters()), "a sampler's weights stay"
    path = Path(client.save_state("one").result().path)
    loaded = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    assert all(torch.equal(value, after[name]) for name, value in loaded.named_parameters())
    assert (path / "tokenizer.json").exists() and not list(path.glob("*.bin"))


def test_samples_follow_their_seed_whoever_else_is_asked(full: FullService):
    sampler = full.create_lora_training_client("tiny").result().save_weights_and_get_sampling_client().result()

    async def ask(seeds: list[int], **options: Any) -> list[list[int]]:
        given = {"max_tokens": 5, "stop": [], **options}
        prompt = types.ModelInput.from_ints([20, 30])
        answers = await asyncio.gather(
            *(sampler.sample(prompt, 1, tinker.SamplingParams(seed=seed, **given)) for seed in seeds), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer.sequences[0].tokens for answer in answers]

    assert asyncio.run(ask([7, 8, 9]))[1] == asyncio.run(ask([8]))[0] != asyncio.run(ask([9]))[0]
    assert len({tuple(one) for one in asyncio.run(ask([1, 2, 3], temperature=0.0))}) == 1
    first = asyncio.run(ask([8]))[0][0]
    assert asyncio.run(ask([8], stop=[first]))[0] == [first]
    with pytest.raises(InvalidRequest, match="tokens; this sampler ends answers at single tokens"):
        asyncio.run(ask([1], stop=["hello you there"]))
    with pytest.raises(InvalidRequest, match="top_p"):
        asyncio.run(ask([1], top_p=0.5))


def test_what_it_is_not_for_is_refused(full: FullService, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    client = full.create_lora_training_client("tiny").result()
    data = episodes()
    data[0].loss_fn_inputs["value_targets"] = types.TensorData.from_numpy(np.zeros(9, np.float32))
    with pytest.raises(InvalidRequest, match="value head"):
        client.forward(data[:1], "ppo")
    with pytest.raises(InvalidRequest, match="has no such key"):
        client.forward(episodes(), "ppo", {"clip": 1.0})
    with pytest.raises(InvalidRequest, match="stable_reinforce"):
        client.save_weights_and_get_sampling_client(record_stability_info=True)
    experts = tmp_path / "experts"
    shutil.copytree(tiny_model, experts)
    config = json.loads((experts / "config.json").read_text())
    (experts / "config.json").write_text(json.dumps({**config, "num_local_experts": 4}))
    with pytest.raises(Unsupported, match="experts has num_local_experts; full tuning is for dense models"):
        full_tuning.load(experts, "cpu")
    monkeypatch.setattr(full_tuning, "MAX_PARAMETERS", 1000)
    with pytest.raises(Unsupported, match="full tuning takes at most 1,000"):
        full_tuning.load(tiny_model, "cpu")
