"""kill -9 of the engine and of the whole server, in the middle of everything: nothing acknowledged is lost, nothing counts twice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.durability.checker import check_history
from tests.durability.conftest import Undisturbed
from tests.durability.killer import Killer, plan_kills
from tests.durability.workload import Plan, Trace, final_weights, play_together
from tests.live import LiveServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ALONE = (Plan(seed=11),)
TOGETHER = (Plan(seed=21), Plan(seed=22, rank=8), Plan(seed=23, datums=2))


def run_with_kills(
    plans: tuple[Plan, ...], seed: int, count: int, store_url: str, new_server: Callable[..., LiveServer]
) -> tuple[LiveServer, list[Trace]]:
    server = new_server(**{"store.url": store_url, "engine.restart_limit": 1000})
    killer = Killer(server, plan_kills(seed, plans[0], count))
    traces = play_together(list(plans), server.url, server.model, killer.on_phase)
    killer.finish()
    assert len(killer.done) == count
    for trace in traces:
        check_history(server, store_url, trace)
    return server, traces


def same_bits(disturbed: tuple[LiveServer, list[Trace]], undisturbed: Undisturbed) -> None:
    server, (trace,) = disturbed
    expected, weights = undisturbed[0]
    assert trace.losses == expected.losses
    assert trace.logprobs == expected.logprobs
    assert trace.gradient_norms == expected.gradient_norms
    for name, tensor in final_weights(server, trace).items():
        assert tensor.tobytes() == weights[name].tobytes(), name
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(trace.samples, expected.samples, strict=True):
        assert tokens == other_tokens
        assert logprobs == pytest.approx(other_logprobs, abs=1e-5)


def nearly_same(disturbed: tuple[LiveServer, list[Trace]], undisturbed: Undisturbed) -> None:
    """Runs that share a row get sums in another order when the company changes, so the last bits may differ."""
    server, traces = disturbed
    for trace, (expected, weights) in zip(traces, undisturbed, strict=True):
        assert trace.losses == pytest.approx(expected.losses, rel=1e-6)
        ours = final_weights(server, trace)
        flat, flat_expected = (np.concatenate([w[name].ravel() for name in sorted(w)]) for w in (ours, weights))
        assert np.linalg.norm(flat - flat_expected) <= 1e-6 * np.linalg.norm(flat_expected)


@pytest.mark.timeout(600)
def test_a_run_survives_kills_bit_for_bit(store_url, new_server, undisturbed) -> None:
    same_bits(run_with_kills(ALONE, 1, 6, store_url, new_server), undisturbed(*ALONE))


@pytest.mark.timeout(600)
def test_runs_side_by_side_survive_kills(store_url, new_server, undisturbed) -> None:
    nearly_same(run_with_kills(TOGETHER, 2, 3, store_url, new_server), undisturbed(*TOGETHER))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_twenty_kills_bit_for_bit(store_url, new_server, undisturbed) -> None:
    same_bits(run_with_kills(ALONE, 3, 20, store_url, new_server), undisturbed(*ALONE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_side_by_side_survive_twenty_kills(store_url, new_server, undisturbed) -> None:
    nearly_same(run_with_kills(TOGETHER, 4, 20, store_url, new_server), undisturbed(*TOGETHER))
