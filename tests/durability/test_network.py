"""The SDK through a network that loses, repeats, delays and replaces answers: each request still counts once."""

from __future__ import annotations

import pytest

from tests.durability.checker import check_history
from tests.durability.proxy import FAULTS, HostileProxy
from tests.durability.test_kills import same_bits
from tests.durability.workload import Plan, play

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PLAN = Plan(seed=31, steps=24)


@pytest.mark.timeout(600)
def test_a_hostile_network_changes_nothing(server, undisturbed) -> None:
    expected = undisturbed(PLAN)
    with HostileProxy(server.url, seed=5) as proxy:
        trace = play(PLAN, proxy.url, server.model)
    assert set(FAULTS) <= set(proxy.faults), f"not every fault happened: {proxy.faults}"
    check_history(server, f"sqlite:///{server.home / 'everlearn.db'}", trace)
    same_bits((server, [trace]), expected)
