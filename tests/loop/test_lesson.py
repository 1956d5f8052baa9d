"""A lesson on a real server, broken off and continued."""

from __future__ import annotations

import numpy as np
import pytest
import tinker

from everlearn.loop.lesson import Example, Recipe, num_steps, teach
from tests.live import KEY, LiveServer

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
EXAMPLES = [Example([5 + number, 6, 7], [20 + number, 21, 2]) for number in range(6)]
RECIPE = Recipe(rank=4, learning_rate=2e-2, epochs=4, batch=2, rehearsed=0)


def score(service: tinker.ServiceClient, path: str) -> list[float]:
    sampler = service.create_sampling_client(model_path=path).result()
    found = [sampler.compute_logprobs(tinker.ModelInput.from_ints(one.prompt + one.answer)).result()[1:] for one in EXAMPLES]
    return [value for values in found for value in values if value is not None]


def test_a_lesson_that_was_broken_off_ends_as_if_it_had_not_been(server: LiveServer) -> None:
    saved: dict[int, str] = {}
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        whole = service.create_lora_training_client(server.model, rank=4, seed=0).result()
        steps = teach(whole, EXAMPLES, [], RECIPE, save=lambda at: saved.update({at: whole.save_state(f"s{at}").result().path}), every=5)
        assert sorted(saved) == [5, 10, 12] and len(steps) == num_steps(EXAMPLES, RECIPE) == 12
        assert steps[-1].loss < 0.5 * steps[0].loss
        again = service.create_training_client_from_state_with_optimizer(saved[5]).result()
        rest = teach(again, EXAMPLES, [], RECIPE, begin=5)
        assert [step.step for step in rest] == list(range(5, 12))
        assert [step.loss for step in rest] == pytest.approx([step.loss for step in steps[5:]], abs=1e-4)
        end = again.save_weights_for_sampler("end").result().path
        assert np.allclose(score(service, end), score(service, saved[12]), atol=1e-4)
