"""DPO and KTO: their weights against numerical gradients, and a real adapter that learns to prefer."""

from __future__ import annotations

import math

import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st

from everlearn.loop.lesson import Recipe
from everlearn.loop.preference import Preference, Said, Thumb, dpo, kto, referred, teach
from tests.live import KEY, LiveServer

RATIO = st.floats(-20, 20)
BETA = st.floats(0.01, 2)
SMALL = 1e-4


@given(RATIO, RATIO, BETA)
def test_weights_of_dpo_are_minus_its_gradient(chosen: float, rejected: float, beta: float) -> None:
    loss, up, down = dpo(chosen, rejected, beta)
    assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-beta * (chosen - rejected)))), abs=1e-9)
    slope = (dpo(chosen + SMALL, rejected, beta)[0] - dpo(chosen - SMALL, rejected, beta)[0]) / (2 * SMALL)
    assert up == pytest.approx(-slope, abs=1e-6) and down == pytest.approx(slope, abs=1e-6)


@given(RATIO, st.booleans(), st.floats(0, 10), BETA)
def test_weights_of_kto_are_minus_its_gradient(ratio: float, liked: bool, z0: float, beta: float) -> None:
    _, weight = kto(ratio, liked, z0, beta)
    slope = (kto(ratio + SMALL, liked, z0, beta)[0] - kto(ratio - SMALL, liked, z0, beta)[0]) / (2 * SMALL)
    assert weight == pytest.approx(-slope, abs=1e-6) and (weight > 0) is (liked and weight != 0)


def logprob(sampler: tinker.SamplingClient, said: Said) -> float:
    return sum(sampler.compute_logprobs(tinker.ModelInput.from_ints(said.prompt + said.answer)).result()[-len(said.answer) :])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_adapter_learns_what_was_preferred(server: LiveServer, method: str) -> None:
    pairs = [(Said([5, 6, 7 + number], [20, 21, 2]), Said([5, 6, 7 + number], [30, 31, 2])) for number in range(4)]
    lesson = [Preference(*pair) for pair in pairs] if method == "dpo" else [Thumb(one, one is pair[0]) for pair in pairs for one in pair]
    recipe = Recipe(rank=4, learning_rate=1e-2, epochs=6, batch=4, rehearsed=0)
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        before = service.create_sampling_client(base_model=server.model).result()
        known = referred(before, lesson)
        trainer = service.create_lora_training_client(server.model, rank=4, seed=0).result()
        steps = teach(trainer, known, recipe, beta=0.5)
        after = service.create_sampling_client(model_path=trainer.save_weights_for_sampler("end").result().path).result()
        assert steps[0].loss == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-3), "at first both are the same"
        assert steps[-1].loss < 0.7 * steps[0].loss
        for chosen, rejected in pairs:
            moved = [logprob(after, said) - logprob(before, said) for said in (chosen, rejected)]
            assert moved[0] > moved[1] + 1
