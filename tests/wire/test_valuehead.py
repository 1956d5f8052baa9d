"""A value function through the newest SDK, unmodified: learned, saved, and the same bits after the engine dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.live import KEY, LiveServer, start_server

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENS = [1, 40, 41, 42, 43, 44]
ADAM = types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)


@pytest.fixture(scope="module")
def own_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start_server(tmp_path_factory.mktemp("values"), tiny_model, {"engine.snapshot_min_steps": 2, "engine.snapshot_overhead": 1e6})
    yield live
    live.stop()


@pytest.fixture(scope="module")
def service(own_server: LiveServer) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=own_server.url, api_key=KEY)
    yield client
    client.close("success").result()


def episode(*targets: float) -> types.Datum:
    inputs = {
        "target_tokens": TOKENS[1:],
        "logprobs": [0.0, -5.0, -5.0, -5.0, -5.0],
        "advantages": [0.0, 1.0, -1.0, 1.0, 0.5],
        "sequence_ratio_mask": [0.0, 1.0, 1.0, 1.0, 1.0],
        "value_targets": np.asarray(targets, np.float32),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)


RISING = episode(0.0, 0.25, 0.5, 0.75, 1.0)


def step(client: tinker.TrainingClient) -> dict[str, float]:
    output = client.forward_backward([RISING], "ppo", loss_fn_config={"value_coeff": 1.0})
    client.optim_step(ADAM).result()
    return output.result().metrics


def state(client: tinker.TrainingClient) -> tuple[list[float], list[float]]:
    output = client.forward([episode(*[0.0] * 5)], "ppo").result().loss_fn_outputs[0]
    return output["values"].tolist(), output["logprobs"].tolist()


def test_values_are_learned_beside_the_policy(service, own_server) -> None:
    client = service.create_lora_training_client(own_server.model, rank=4, seed=3).result()
    assert state(client)[0] == [0.0] * 5
    errors = [step(client)["value_error_abs:mean"] for _ in range(15)]
    assert errors[-1] < 0.5 * errors[0]
    values = state(client)[0]
    assert values[4] > values[1]


def test_a_checkpoint_holds_the_head_and_training_goes_on_bit_for_bit(service, own_server) -> None:
    client = service.create_lora_training_client(own_server.model, rank=4, seed=3).result()
    for _ in range(3):
        step(client)
    path = client.save_state("values").result().path
    other = service.create_training_client_from_state_with_optimizer(path).result()
    assert state(other) == state(client)
    assert step(other) == step(client)
    assert state(other) == state(client)
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=3, temperature=0.0)
    assert sampler.sample(types.ModelInput.from_ints(TOKENS), 1, params).result().sequences[0].tokens


def test_after_a_death_of_the_engine_the_same_bits(service, own_server) -> None:
    calm, hit = (service.create_lora_training_client(own_server.model, rank=4, seed=9).result() for _ in range(2))
    trace: list[list[dict[str, float]]] = [[], []]
    for place, client in enumerate((calm, hit)):
        for number in range(4):
            trace[place].append(step(client))
            if client is hit and number == 1:
                own_server.kill_engine()
        pending = client.forward_backward([RISING], "ppo").result()
        if client is hit:
            own_server.kill_engine()
        trace[place].append(pending.metrics)
        client.optim_step(ADAM).result()
    assert trace[0] == trace[1]
    assert state(calm) == state(hit) and any(state(hit)[0])
