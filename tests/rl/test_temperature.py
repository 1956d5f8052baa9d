"""Runs at another temperature than 1: what is trained on has the log-probabilities of what was drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward
from everlearn.rl.datums import datums_of
from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.reference import Reference
from everlearn.rl.rollouts import play_now
from everlearn.rl.settings import Pace, Settings
from everlearn.rl.temperature import Temperature, at_temperature
from everlearn.rl.train import train
from everlearn.rl.trajectory import Action, Trajectory, TrajectoryGroup, Transition
from tests.rl.run_first import First, Starts

COOL = Temperature(1.5, 0.5, steps=2)


@pytest.mark.parametrize(
    ("temperature", "values"),
    [
        (Temperature(2.0, 1.0, steps=4), [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]),
        (Temperature(1.6, 0.1, steps=4, shape="exponential"), [1.6, 0.8, 0.4, 0.2, 0.1, 0.1]),
    ],
)
def test_schedules(temperature: Temperature, values: list[float]):
    assert [temperature.at(step) for step in range(6)] == pytest.approx(values)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("ppo", {"decoupled": True, "loss_config": {"kl_coeff": 0.1}, "kl_budget": 1000.0}),
        ("gspo", {}),
        ("ppo", {"estimator": "gae"}),
    ],
)
def test_sampler_and_trainer_agree_at_every_temperature(service: tinker.ServiceClient, tmp_path: Path, loss: str, options: dict[str, Any]):
    settings = Settings("tiny", steps=3, rank=4, learning_rate=1e-2, loss=loss, max_tokens=4, temperature=COOL, **options)
    rows = train(service, settings, Starts(30, 2, 4), tmp_path)
    assert [row["temperature"] for row in rows] == pytest.approx([1.5, 1.0, 0.5])
    for row in rows:
        assert row["kl/k3"] < 1e-8 and row["ratio/max"] == pytest.approx(1.0, abs=1e-4) == row["ratio/min"]
    assert rows[0].get("kl/base", 0.0) < 1e-6, "an adapter that was never trained is the base model, at any temperature"


def test_the_log_probabilities_are_those_of_what_was_drawn(service: tinker.ServiceClient):
    """512 samples of one token at T 0.15: their mean log-probability is minus the entropy at T, summed over the whole vocabulary, and
    far from what the sampler reports."""
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    (group,) = play_now([SameTask(lambda: First(30), 512)], TinkerPolicy(sampler, 1, temperature=0.15), seed=3)
    (told,) = at_temperature(client, [group], 0.15)
    reported, right = (np.array([one.transitions[0].action.logprobs[0] for one in own.trajectories_G]) for own in (group, told))
    whole = [
        types.Datum(
            model_input=types.ModelInput.from_ints([20, 30]),
            loss_fn_inputs={"target_tokens": [30, y], "logprobs": [0.0, 0.0], "advantages": [0.0, 0.0]},
        )
        for y in range(512)
    ]
    outputs = client.forward(whole, "ppo", {"temperature": 0.15}).result().loss_fn_outputs
    logprobs = np.array([output["logprobs"].to_numpy()[1] for output in outputs], np.float64)
    assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-4)
    expected, error = float(np.exp(logprobs) @ logprobs), float(right.std() / np.sqrt(512))
    assert abs(right.mean() - expected) < 4 * error and abs(reported.mean() - expected) > 20 * error
    assert [one.transitions[0].action.tokens for one in told.trajectories_G] == [
        one.transitions[0].action.tokens for one in group.trajectories_G
    ]


def test_the_distance_to_the_base_model_counts_certain_tokens(service: tinker.ServiceClient):
    """kl/base is a mean over all sampled tokens, those with a log-probability of exactly 0 included."""
    reference = Reference(service, "tiny")
    certain = Trajectory([Transition(types.ModelInput.from_ints([20, 30]), Action([7, 8, 9], [0.0, 0.0, 0.0]), Reward(), True)])
    (base,) = reference.logprobs(datums_of(certain, [0.0]))
    gaps = -base.to_numpy()[1:].astype(np.float64)
    found = reference.distance([TrajectoryGroup([certain], [Reward()])])
    assert found["kl/base"] == pytest.approx(float((np.exp(-gaps) - 1 + gaps).mean()), rel=1e-6) and found["kl/base"] > 1


def test_episodes_that_failed_keep_what_they_had(service: tinker.ServiceClient):
    class Breaks(First):
        async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
            raise OSError("down")

    client = service.create_lora_training_client("tiny", rank=4).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    groups = play_now([SameTask(lambda: Breaks(30), 2)], TinkerPolicy(sampler, 2, temperature=0.5), seed=1)
    assert at_temperature(client, groups, 0.5) == groups


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "it must lie in"),
    ({"temperature": Temperature(1.0, 0.0, steps=3)}, "it must lie in"),
    ({"temperature": Temperature(1.0, 0.5, steps=0)}, "at least 1 step"),
    ({"temperature": Temperature(1.0, 0.5, steps=3, shape="cosine")}, "temperature.shape is 'cosine'; it must be linear or exponential"),  # type: ignore[arg-type]
    ({"kl_budget_of": "sampled"}, "kl_budget_of is 'sampled'; it must be base or sampler"),
    ({"temperature": 0.7, "loss": "stable_reinforce"}, "stable_reinforce reads the log-probabilities that the server recorded"),
    ({"temperature": 0.7, "pace": Pace()}, "an asynchronous run samples at temperature 1"),
    ({"loss_config": {"temperature": 0.7}}, "is the run's temperature"),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG)
def test_what_would_be_wrong_is_refused(wrong: dict[str, Any], why: str):
    with pytest.raises(InvalidRequest, match=why):
        msgspec.structs.replace(Settings("tiny", steps=1), **wrong).check()
    with pytest.raises(InvalidRequest, match="sampler_of"):
        train(None, Settings("tiny", steps=1, temperature=0.7), Starts(30, 1, 2), Path(), sampler_of=lambda *_: None)  # type: ignore[arg-type]
