"""A model with experts behind a real server: trained by the official SDK, sampled, its routes recorded and replayed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tinker
from tinker import types

from tests.live import KEY, LiveServer, start_server
from tests.moe import make_moe
from tests.wire.raw import Raw

ROW = list(range(20, 44))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start_server(tmp_path_factory.mktemp("home"), make_moe(tmp_path_factory.mktemp("models") / "tiny", "qwen3_moe"))
    yield live
    live.stop()


def test_sdk_trains_saves_and_samples_experts_and_replays_routes(experts: LiveServer) -> None:
    raw = Raw(experts.url, experts.model)
    service = tinker.ServiceClient(base_url=experts.url, api_key=KEY)
    client = service.create_lora_training_client(experts.model, rank=4, seed=1).result()
    assert raw.ok("/get_info", model_id=client.model_id)["expert_lora"] == "shared_outer"
    inputs = {"target_tokens": ROW[1:], "weights": [1.0] * (len(ROW) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(ROW[:-1]), loss_fn_inputs=inputs)
    losses = []
    for _ in range(8):
        output = client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=2e-2)).result()
        losses.append(output.metrics["loss:sum"])
        assert 0 < output.metrics["e_frac_with_tokens:mean"] <= 1 and output.metrics["e_max_violation:mean"] >= 0
    assert losses[-1] < 0.3 * losses[0]
    path = client.save_weights_for_sampler("trained").result().path
    sampler = raw.ok("/create_sampling_session", session_id=raw.session, sampling_session_seq_id=0, model_path=path)["sampling_session_id"]
    chunks = {"chunks": [{"type": "encoded_text", "tokens": ROW[:6]}]}
    params = {"max_tokens": 10, "temperature": 0.0, "seed": 1, "routing": True}
    asked = raw.ok("/asample", sampling_session_id=sampler, seq_id=0, prompt=chunks, sampling_params=params, num_samples=1)
    drawn = raw.result(asked["request_id"])["sequences"][0]
    tokens = ROW[:6] + drawn["tokens"]
    assert drawn["routing"]["shape"] == [len(tokens) - 1, 2, 3]
    routes = np.array(drawn["routing"]["data"]).reshape(len(tokens) - 1, -1)
    assert routes.min() >= 0 and routes.max() < 8
    routes[3] = -1
    replayed = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [1.0] * (len(tokens) - 1),
            "routing": types.TensorData(data=routes.ravel().tolist(), dtype="int64", shape=list(routes.shape)),
        },
    )
    output = client.forward([replayed], "cross_entropy").result()
    assert output.metrics["routing_replayed_tokens:sum"] == len(tokens) - 2 and output.metrics["routing_masked_tokens:sum"] == 1
    np.testing.assert_allclose(output.loss_fn_outputs[0]["logprobs"].data[5:], drawn["logprobs"], atol=1e-4)
    bad = types.Datum(
        model_input=types.ModelInput.from_ints(ROW[:-1]),
        loss_fn_inputs={**inputs, "routing": types.TensorData(data=[9] * 23 * 6, dtype="int64", shape=[23, 6])},
    )
    with pytest.raises(tinker.TinkerError, match="numbered 0 to 7"):
        client.forward([bad], "cross_entropy").result()
    service.close("success").result()
