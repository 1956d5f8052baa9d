"""Stores of both kinds for whole servers, and the runs that nobody disturbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.durability.workload import Plan, Trace, final_weights, play_together
from tests.live import LiveServer
from tests.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]

Undisturbed = list[tuple[Trace, dict[str, np.ndarray]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'home' / 'everlearn.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(scope="session")
def undisturbed(server: LiveServer) -> Callable[..., Undisturbed]:
    """Plays plans on a server that nothing happens to: traces and final weights. The same plans are played once."""
    played: dict[tuple[Plan, ...], Undisturbed] = {}

    def play(*plans: Plan) -> Undisturbed:
        if plans not in played:
            played[plans] = [(trace, final_weights(server, trace)) for trace in play_together(list(plans), server.url, server.model)]
        return played[plans]

    return play
