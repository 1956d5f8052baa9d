"""A request that succeeded fails when it is replayed: the run stops there, and nothing of what follows it lasts."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
import tinker
from tinker import types

from tests.durability.test_ends import until
from tests.durability.workload import Plan, Trace, checkpoint_folder, final_weights
from tests.live import KEY, LiveServer

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"), pytest.mark.timeout(400)]

PLAN = Plan(seed=9, datums=2)


def train(client: tinker.TrainingClient, first: int, last: int) -> None:
    for step in range(first, last):
        forward = client.forward_backward(PLAN.batch(step), "cross_entropy")
        update = client.optim_step(types.AdamParams(learning_rate=3e-3))
        forward.result(timeout=120)
        update.result(timeout=120)


def weights(server: LiveServer, client: tinker.TrainingClient) -> dict[str, np.ndarray]:
    return final_weights(server, Trace(final=client.save_state("final").result(timeout=120).path))


def snapshots_of(server: LiveServer, run_id: str) -> set[int]:
    """Up to which requests there are snapshots of a run, listed or on the disk."""
    with sqlite3.connect(server.home / "everlearn.db") as db:
        listed = {seq for (seq,) in db.execute("SELECT seq FROM snapshots WHERE model_id = ?", [run_id])}
    return listed | {int(folder.name) for folder in (server.home / "snapshots" / run_id.replace(":", "_")).glob("?" * 12)}


def test_no_snapshot_is_kept_of_a_replay_that_failed(new_server) -> None:
    """The checkpoint that a run loaded is out of reach after a crash, and the engine would snapshot after every update."""
    server = new_server(**{"engine.snapshot_min_steps": 10_000})
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    other, run, twin = (service.create_lora_training_client(server.model, rank=4, seed=seed).result(timeout=120) for seed in (1, 2, 2))
    train(other, 0, 2)
    start = other.save_state("start").result(timeout=120).path
    for client in (run, twin):
        client.load_state(start).result(timeout=120)
        train(client, 0, 4)
    train(twin, 4, 6)
    expected = weights(server, twin)
    server.kill()
    folder = checkpoint_folder(server.home, start)
    aside = folder.rename(server.home / "aside")
    config = server.home / "everlearn.toml"
    config.write_text(config.read_text().replace("snapshot_min_steps = 10000", "snapshot_min_steps = 1\nengine.snapshot_overhead = 1e6"))
    server.environment["EVERLEARN_FAULT"] = "result.emit.after:1:delay"  # before the load, so that what follows it is there
    server.restart()
    with pytest.raises(tinker.TinkerError, match="fails in the replay"):
        run.forward_backward(PLAN.batch(4), "cross_entropy").result(timeout=120)
    train(other, 2, 3)
    until(lambda: bool(snapshots_of(server, other.model_id)), 60)  # they are written in order: so all of the other run's are there
    assert snapshots_of(server, run.model_id) == set()
    aside.rename(folder)
    train(run, 4, 6)
    found = weights(server, run)
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)
    service.close("success").result(timeout=60)
