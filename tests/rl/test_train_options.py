"""What both loops can do besides: old log-probabilities, a KL budget, text to imitate, somebody else who plays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
from tinker import types

from everlearn.errors import Conflict, InvalidRequest
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.ptx import Ptx
from everlearn.rl.reference import Reference
from everlearn.rl.rollouts import Limits, play_now
from everlearn.rl.settings import Settings, State
from everlearn.rl.train import train
from tests.rl.run_first import Starts

BASE = Settings("tiny", steps=3, rank=4, learning_rate=1e-2, max_tokens=4, seed=5)


def changed(**options: Any) -> Settings:
    return msgspec.structs.replace(BASE, **options)


def text(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def test_decoupled_asks_for_the_policy_that_a_step_starts_from(service: tinker.ServiceClient, tmp_path: Path):
    """Fresh data: all three policies agree, so nothing is changed by asking. Of two substeps the second has left the old policy."""
    one_by_one = Limits(episodes_at_once=1)  # the same batches in both, so the same weights to the last bit
    plain = train(service, changed(loss="ppo", limits=one_by_one), Starts(30, 2, 6), tmp_path / "plain")
    asked = train(service, changed(loss="ppo", limits=one_by_one, decoupled=True), Starts(30, 2, 6), tmp_path / "asked")
    for one, other in zip(plain, asked, strict=True):
        assert other["loss/old_kl_k3:mean"] < 1e-8 and "loss/old_kl_k3:mean" not in one
        assert other["reward/total"] == pytest.approx(one["reward/total"], abs=0.02)
    settings = changed(loss="ppo", decoupled=True, substeps=2, steps=1, loss_config={"importance_weight": "tis_token"})
    (row,) = train(service, settings, Starts(30, 2, 6), tmp_path / "two")
    assert row["loss/old_kl_k3:mean"] < 1e-8 < row["kl/k3"] and "loss/truncated_fraction:mean" in row


def test_a_batch_may_be_gone_through_several_times(service: tinker.ServiceClient, tmp_path: Path):
    """The line of a step is that of its last pass, which has left the policy that sampled, and trained on all of the batch."""
    (once,) = train(service, changed(loss="ppo", steps=1), Starts(30, 2, 6), tmp_path / "once")
    (again,) = train(service, changed(loss="ppo", steps=1, epochs=3), Starts(30, 2, 6), tmp_path / "again")
    assert once["kl/k3"] < 1e-8 < again["kl/k3"] and once["tokens/trained"] == again["tokens/trained"]
    with pytest.raises(InvalidRequest, match="epochs is 0"):
        changed(epochs=0).check()


def test_who_plays_can_be_someone_else(service: tinker.ServiceClient, tmp_path: Path):
    """The weights of the beginning play all batches: the policy that is trained moves away from them, evaluations follow it."""
    first: list[tinker.SamplingClient] = []
    asked: list[int] = []

    def beginning(client: tinker.TrainingClient, step: int) -> tinker.SamplingClient:
        asked.append(step)
        first.append(first[0] if first else client.save_weights_and_get_sampling_client().result())
        return first[-1]

    settings = changed(learning_rate=3e-2, decoupled=True, evaluate_every=1)
    rows = train(service, settings, Starts(30, 2, 6), tmp_path, Starts(60, 2, 1), sampler_of=beginning)
    assert asked == [0, 1, 2] and rows[0]["kl/k3"] < 1e-8 and rows[2]["kl/k3"] > rows[1]["kl/k3"] > 1e-6
    assert rows[2]["loss/old_kl_k3:mean"] == pytest.approx(rows[2]["kl/k3"], rel=0.05), "old is where the step starts"
    assert all("held_out/reward/total" in row for row in rows)


def test_the_base_model_is_the_reference(service: tinker.ServiceClient, policy: TinkerPolicy):
    """Episodes of the base model are at distance 0 from it, and its log-probabilities are those that were sampled with."""
    groups = play_now(Starts(30, 2, 3).get_batch(0), policy, seed=1)
    found = Reference(service, "tiny").distance(groups)
    assert 0 <= found["kl/base"] < 1e-8


@pytest.mark.parametrize("which", ["base", "sampler"])
def test_a_kl_budget_stops_a_run_with_the_reason_and_can_be_raised(service: tinker.ServiceClient, tmp_path: Path, which: str):
    name = "kl/base" if which == "base" else "kl/k3"
    settings = changed(steps=6, learning_rate=3e-2, substeps=2, loss="ppo", kl_budget=1e-5, kl_budget_of=which)
    rows = train(service, settings, Starts(30, 2, 6), tmp_path, Starts(60, 2, 1))
    made = [row for row in rows if "reward/total" in row]
    assert len(made) < 6 and made[-1]["stopped"] == 1.0 and made[-1][name] > 1e-5
    assert not [row for row in made[:-1] if "stopped" in row or row[name] > 1e-5]
    assert "held_out/reward/total" in rows[-1] and rows[-1]["step"] == len(made)
    state = msgspec.json.decode((tmp_path / "state.json").read_bytes(), type=State)
    assert state.step == len(made) and f"{name} is" in state.stopped and "above kl_budget (1e-05)" in state.stopped
    again = train(service, settings, Starts(30, 2, 6), tmp_path, Starts(60, 2, 1))
    assert len(again) == len(rows), "it stays stopped"
    lower = train(service, msgspec.structs.replace(settings, kl_budget=1e-6), Starts(30, 2, 6), tmp_path, Starts(60, 2, 1))
    assert len(lower) == len(rows)  # it is beyond that already
    more = train(service, msgspec.structs.replace(settings, kl_budget=1e3), Starts(30, 2, 6), tmp_path, Starts(60, 2, 1))
    assert [row["step"] for row in more] == list(range(7)) and "stopped" not in more[5]
    with pytest.raises(Conflict, match="kl_budget_of"):
        train(service, changed(steps=6, learning_rate=3e-2, substeps=2, loss="ppo", kl_budget_of="sampler" if which == "base" else "base"),
              Starts(30, 2, 6), tmp_path)  # fmt: skip


def test_a_kl_term_gets_its_reference(service: tinker.ServiceClient, tmp_path: Path):
    rows = train(service, changed(learning_rate=3e-2, loss_config={"kl_coeff": 0.1}), Starts(30, 2, 6), tmp_path)
    assert rows[0]["loss/kl_reference_k3:mean"] < 1e-8 < rows[2]["loss/kl_reference_k3:mean"]


def test_text_is_imitated_beside_episodes(service: tinker.ServiceClient, tmp_path: Path):
    """The text's loss falls while rewards are trained on, for a loss that takes no weights of its own too."""
    data = [text([40, 41, 42, 43, 44, 45]), text([50, 51, 52])]
    for loss in ("importance_sampling", "stable_reinforce"):
        settings = changed(steps=6, loss=loss, learning_rate=1e-2, ptx_weight=0.5, ptx_batch=2)
        rows = train(service, settings, Starts(30, 2, 6), tmp_path / loss, ptx=data)
        assert [row["ptx/tokens"] for row in rows] == [7.0] * 6 and 3 < rows[0]["ptx/loss"] < 9
        assert rows[5]["ptx/loss"] < rows[0]["ptx/loss"] - 0.2
        assert json.loads((tmp_path / loss / "metrics.jsonl").read_text().splitlines()[0])["ptx/loss"] == rows[0]["ptx/loss"]
    with pytest.raises(InvalidRequest, match="give both or neither"):
        train(service, changed(), Starts(30, 2, 6), tmp_path / "no weight", ptx=data)
    with pytest.raises(InvalidRequest, match="give both or neither"):
        train(service, changed(ptx_weight=1.0), Starts(30, 2, 6), tmp_path / "no text")


def test_texts_come_in_an_order_of_the_seed_each_once_before_one_comes_again():
    data = [text([40, 41, 42]) for _ in range(5)]
    ptx, same, other = Ptx(data, 2.0, 2, 7), Ptx(data, 2.0, 2, 7), Ptx(data, 2.0, 2, 8)
    orders = [[index for number in range(10) for index in one.chosen(number)] for one in (ptx, same, other)]
    assert all(sorted(orders[0][first : first + 5]) == list(range(5)) for first in range(0, 20, 5))
    assert orders[0] == orders[1] != orders[2]
    assert np.array_equal(ptx.data[0].loss_fn_inputs["weights"].to_numpy(), [2.0, 2.0])
    assert data[0].loss_fn_inputs["weights"].to_numpy().tolist() == [1.0, 1.0], "the caller's own stay as they are"
    wrong = types.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [2]})
    with pytest.raises(InvalidRequest, match="datum 1 has target_tokens"):
        Ptx([data[0], wrong], 1.0, 1, 0)


@pytest.mark.parametrize("wrong", [{"loss": "mirror_descent", "decoupled": True}, {"kl_budget": -1.0}, {"ptx_batch": 0}])
def test_options_that_cannot_be_meant(wrong: dict[str, Any]):
    with pytest.raises(InvalidRequest):
        changed(**wrong).check()
