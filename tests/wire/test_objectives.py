"""Objectives through the newest SDK, unmodified, against a real server: names and texts that its types don't list pass on the wire."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from tinker.types.loss_fn_type import LossFnType

from tests.live import KEY, LiveServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENS = [1, 40, 41, 42, 43]
MASK = [0.0, 1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def service(server: LiveServer) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    yield client
    client.close("success").result()


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient, server: LiveServer) -> tinker.TrainingClient:
    return moved(service, server)


def moved(service: tinker.ServiceClient, server: LiveServer) -> tinker.TrainingClient:
    """A run whose adapter isn't zero any more."""
    client = service.create_lora_training_client(server.model, rank=4, seed=3).result()
    weights = {"target_tokens": TOKENS[1:], "weights": [1.0] * 4}
    client.forward_backward([datum(**weights)], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return client


def datum(**inputs: Any) -> types.Datum:
    """The SDK turns lists into tensors under the names it knows; under others it takes arrays, tensors and what `forward` answered."""
    arrays = {name: np.asarray(value, np.float32) if isinstance(value, list) else value for name, value in inputs.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:], **arrays})


def episode(**inputs: Any) -> types.Datum:
    return datum(**{"logprobs": [0.0, -5.0, -5.0, -5.0], "advantages": [0.0, 1.0, -1.0, 1.0], **inputs})


def answered(client: tinker.TrainingClient) -> types.TensorData:
    return client.forward([datum(weights=[0.0] * 4)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]


def own_logprobs(client: tinker.TrainingClient) -> list[float]:
    return answered(client).tolist()


def test_a_loss_that_the_sdk_does_not_list_is_reached_by_its_name(training) -> None:
    assert "mirror_descent" not in get_args(LossFnType)
    data = [episode(sequence_ratio_mask=MASK, advantages=[0.0, 0.5, 0.5, 0.5])]
    result = training.forward(data, "mirror_descent", loss_fn_config={"tau": 0.25}).result()  # type: ignore[arg-type]
    log_ratio = sum(own - q for own, q in list(zip(own_logprobs(training), [0.0, -5.0, -5.0, -5.0], strict=True))[1:])
    assert result.metrics["loss:sum"] == pytest.approx((0.5 - 0.25 * log_ratio) ** 2, rel=1e-4)


def test_a_choice_is_a_text_in_the_configuration(training) -> None:
    own = own_logprobs(training)
    drift = [0.0, 0.1, 1.0, -0.1]
    data = [episode(old_logprobs=own, logprobs=[o - d for o, d in zip(own, drift, strict=True)], advantages=MASK)]
    masked = training.forward(data, "ppo", loss_fn_config={"importance_weight": "icepop", "ratio_high": 2.0}).result()
    assert masked.metrics["mask_fraction:mean"] == pytest.approx(1 / 3)
    cut = training.forward(data, "ppo", loss_fn_config={"importance_weight": "tis_token", "tis_threshold": 1.5}).result()
    assert cut.metrics["truncated_fraction:mean"] == pytest.approx(1 / 3)
    weights = [2.718281828**d for d in drift]
    assert masked.metrics["loss:sum"] == pytest.approx(-weights[1] - weights[3], rel=1e-4)
    assert cut.metrics["loss:sum"] == pytest.approx(-weights[1] - 1.5 - weights[3], rel=1e-4)


def test_the_old_policy_and_the_reference_come_from_forward(training) -> None:
    """As a loop does it: recompute once before the first step, then weigh by what the sampler said."""
    own = own_logprobs(training)
    reference = torch.tensor(own) - 0.5
    data = [episode(old_logprobs=answered(training), reference_logprobs=reference, sequence_ratio_mask=MASK)]
    metrics = training.forward(data, "ppo", loss_fn_config={"kl_coeff": 0.1, "entropy_coeff": 0.01}).result().metrics
    assert metrics["clip_fraction:mean"] == 0.0
    assert metrics["old_ratio:max"] == pytest.approx(metrics["ratio:max"], rel=1e-4)
    assert metrics["kl_reference_k3:mean"] == pytest.approx(2.718281828**-0.5 - 0.5, rel=1e-3)
    assert metrics["entropy_sampled:mean"] == pytest.approx(-sum(own[1:]) / 3, rel=1e-4)


def test_text_among_episodes_takes_the_same_step_as_two_requests(service, server) -> None:
    together, apart = moved(service, server), moved(service, server)
    text = {"weights": [0.25] * 4}
    together.forward_backward([episode(), episode(logprobs=[0.0] * 4, advantages=[0.0] * 4, **text)], "ppo").result()
    apart.forward_backward([episode()], "ppo")
    apart.forward_backward([datum(**text)], "cross_entropy").result()
    norms = [client.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm:mean"] for client in (together, apart)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert own_logprobs(together) == pytest.approx(own_logprobs(apart), abs=1e-4)


@pytest.mark.parametrize(
    ("loss_fn", "config", "inputs", "words"),
    [
        ("ppo", {"importance_weight": "tis"}, {}, ["'tis'", "tis_token"]),
        ("ppo", {"tis_threshold": 2.0}, {}, ["tis_threshold", "no effect"]),
        ("ppo", {"kl_coeff": 0.1}, {}, ["reference_logprobs"]),
        ("gspo", {"importance_weight": "tis_sequence"}, {"sequence_ratio_mask": MASK}, ["old_logprobs", "clip thresholds"]),
        ("mirror_descent", {}, {}, ["sequence_ratio_mask"]),
        ("mirror_descend", {}, {}, ["did you mean 'mirror_descent'"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(training, loss_fn: str, config: dict, inputs: dict, words: list[str]) -> None:
    with pytest.raises(tinker.BadRequestError) as caught:
        training.forward_backward([episode(**inputs)], loss_fn, loss_fn_config=config).result()  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_datums_of_one_request_agree_on_their_inputs(training) -> None:
    with pytest.raises(tinker.BadRequestError, match=r"data\[1\].*'old_logprobs'.*data\[0\] has"):
        training.forward_backward([episode(old_logprobs=[0.0] * 4), episode()], "ppo").result()


def test_the_python_of_the_page_on_objectives_runs(training, root: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (root / "docs/design/objectives.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    names: dict[str, Any] = {"training": training, "data": [episode(), episode()], "steps": 2, "types": types}
    exec("\n".join(blocks), names)
    text = names["text_datum"](TOKENS, 0.5)
    mixed = training.forward([*names["data"], text], "ppo").result()
    assert mixed.metrics["cross_entropy:sum"] == pytest.approx(-0.5 * sum(mixed.loss_fn_outputs[2]["logprobs"].tolist()), rel=1e-4)
    assert mixed.metrics["old_ratio:max"] > 0
