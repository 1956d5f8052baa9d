"""A kill at every named point of a short run through the SDK: the trace is the one of a run that nobody disturbed.

The process that comes by the point dies, API or engine; whichever it is, it is started again, and the client only waits. By default one run
meets many faults; with `-m slow` each point has a run of its own.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from everlearn.faultpoints import FIRED, POINTS
from tests.durability.checker import check_history
from tests.durability.workload import PATIENCE, Plan, Trace, final_weights, keep
from tests.live import KEY, LiveServer, start_server

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"), pytest.mark.timeout(900)]

PLAN = Plan(seed=5, datums=2)
# Which coming-by is meant: in the midst of the run, or the only one.
NTH = {
    "log.append": 6,
    "log.finish": 6,
    "store.commit": 12,
    "command.send": 6,
    "gradient.join": 3,
    "optimizer.apply": 2,
    "result.emit": 5,
    "folder.file": 3,
    "checkpoint.row": 2,
}
# No such thing happens in this run; tests/store/test_faults.py, tests/loop/test_kills.py, tests/api/test_reward_models.py and
# tests/wire/test_memory.py have them.
ELSEWHERE = ("memory.row", "folder.swap", "key.row", "dataset.row", "deployment.row", "cycle.act", "reward.labels", "reward.version")
KILLS = (  # in a process that was killed before, the counts begin anew
    "optimizer.apply.after:2:kill",
    "store.commit.after:12:kill",
    "folder.rename.before:1:kill",
    "checkpoint.row.committed:1:kill",
    "name.row.committed:1:kill",
    "spool.put.after:1:kill",
    "feedback.row.committed:1:kill",
)
TROUBLE = (
    "log.append.after:6:error",  # the append is undone, the client is told to come again
    "store.commit.before:12:full-disk",
    "store.commit.after:20:error",  # committed, and nobody knows
    "log.finish.before:6:full-disk",
    "log.finish.committed:9:error",
    "command.send.before:6:delay",
    "result.emit.after:5:delay",
    "snapshot.row.before:1:error",
    "snapshot.copy.before:2:full-disk",
    "gradient.join.before:3:error",  # the engine doesn't outlive a fault in the midst of an effect
    "optimizer.apply.after:2:error",
    "weights.load.after:1:error",
    "record.row.after:1:full-disk",
    "spool.put.before:1:full-disk",
    "name.row.after:1:full-disk",
)
MOST_DEATHS = 20
SETTINGS = {"engine.snapshot_min_steps": 1, "engine.snapshot_overhead": 1e6, "engine.restart_limit": 1000}


def insist(server: LiveServer, path: str, body: dict[str, object]) -> httpx.Response:
    """A request by a client that sends it again until it is answered."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            reply = httpx.post(server.url + path, json=body, timeout=60)
            if reply.status_code < 500 or time.monotonic() > until:
                return reply.raise_for_status()
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def run(server: LiveServer, on_step: Callable[[int], None] = lambda step: None) -> Trace:
    """All kinds of training requests, samples from a named and from an unnamed version, and an answer by the adapter's name."""
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    client = service.create_lora_training_client(server.model, rank=4, seed=3).result(timeout=PATIENCE)
    trace = Trace(run_id=client.model_id, requests=1)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            on_step(step)
            forward = client.forward_backward(PLAN.batch(step), "cross_entropy")
            update = client.optim_step(types.AdamParams(learning_rate=3e-3, grad_clip_norm=1.0))
            keep(trace, forward.result(timeout=PATIENCE), update.result(timeout=PATIENCE))

    def sample(sampler: tinker.SamplingClient) -> None:
        parameters = types.SamplingParams(max_tokens=8, temperature=1.0, seed=7)
        answer = sampler.sample(types.ModelInput.from_ints([1, 40, 41]), 2, parameters).result(timeout=PATIENCE)
        trace.samples += [(list(sequence.tokens), list(sequence.logprobs or [])) for sequence in answer.sequences]

    steps(0, 2)
    saved = client.save_state("middle").result(timeout=PATIENCE).path
    steps(2, 4)
    client.load_state_with_optimizer(saved).result(timeout=PATIENCE)
    published = client.save_weights_for_sampler("published").result(timeout=PATIENCE).path
    sample(service.create_sampling_client(model_path=published))
    insist(server, "/v1/adapters", {"name": "kept", "path": published})
    answer = insist(server, "/v1/completions", {"model": "kept", "prompt": "Where is my parcel?", "max_tokens": 4, "seed": 1})
    trace.records.append(answer.headers["x-everlearn-record"])
    said = {"record_id": trace.records[-1], "kind": "boolean", "value": True, "idempotency_key": "once"}
    insist(server, "/v1/feedback", said)
    steps(4, 6)
    sample(client.save_weights_and_get_sampling_client())
    steps(6, 8)
    trace.saved = [path.removeprefix(f"tinker://{trace.run_id}/") for path in (saved, published)]
    trace.final = client.save_state("final").result(timeout=PATIENCE).path
    trace.requests += 5
    service.close("success").result(timeout=PATIENCE)
    return trace


class Reviver:
    """Starts the server again whenever it has died, as a service manager does."""

    def __init__(self, server: LiveServer):
        self.server, self.deaths = server, 0
        self.failure: BaseException | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            if self.server.process.poll() is None:
                continue
            self.deaths += 1
            try:
                self.server.restart()
            except AssertionError as error:  # perhaps it came by the next point before it was ready
                if self.deaths > MOST_DEATHS or self.server.process.poll() is None:
                    self.failure = error
                    return

    def end(self) -> None:
        self.over.set()
        self.thread.join()
        if self.failure is not None:
            raise self.failure


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trace, dict[str, np.ndarray]]]:
    server = start_server(tmp_path_factory.mktemp("home"), tiny_model, SETTINGS)
    trace = run(server)
    yield trace, final_weights(server, trace)
    server.stop()


def play(tiny_model: Path, home: Path, fault: str, then: Callable[[LiveServer], Callable[[int], None]]) -> tuple[LiveServer, Trace, int]:
    server = start_server(home, tiny_model, SETTINGS, variables={"EVERLEARN_FAULT": fault})
    reviver = Reviver(server)
    try:
        try:
            trace = run(server, then(server))
        finally:
            reviver.end()
    except BaseException:
        server.stop()
        raise
    return server, trace, reviver.deaths


def compare(server: LiveServer, trace: Trace, expected: tuple[Trace, dict[str, np.ndarray]]) -> None:
    other, weights = expected
    assert other.optimizer_steps == [1, 2, 3, 4, 3, 4, 5, 6], "the load goes back to the second step"
    check_history(server, f"sqlite:///{server.home / 'everlearn.db'}", trace, other.optimizer_steps)
    assert trace.losses == other.losses
    assert trace.logprobs == other.logprobs
    assert trace.gradient_norms == other.gradient_norms
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(trace.samples, other.samples, strict=True):
        assert tokens == other_tokens and logprobs == pytest.approx(other_logprobs, abs=1e-5)
    for name, tensor in final_weights(server, trace).items():
        assert tensor.tobytes() == weights[name].tobytes(), name
    check_records(server, trace)


def check_records(server: LiveServer, trace: Trace) -> None:
    """What was answered is recorded, each record is counted once, and the name means what it was given."""
    for record_id in trace.records:
        assert httpx.get(f"{server.url}/v1/records/{record_id}").raise_for_status().json()["usage"]["completion_tokens"] == 4
    (said,) = httpx.get(f"{server.url}/v1/feedback").raise_for_status().json()["data"]
    assert said["target"]["record_id"] == trace.records[-1] and said["counts"]
    (adapter,) = httpx.get(f"{server.url}/v1/adapters/kept").raise_for_status().json()["versions"]
    assert adapter["path"] == f"tinker://{trace.run_id}/sampler_weights/published" and adapter["number"] == 1
    server.stop()
    assert not list((server.home / "spool").iterdir())
    with sqlite3.connect(server.home / "everlearn.db") as connection:
        (there,) = connection.execute("SELECT COUNT(*) FROM records").fetchone()
        (counted,) = connection.execute("SELECT SUM(requests) FROM usage WHERE kind = 'completions'").fetchone()
    connection.close()
    assert there == counted >= len(trace.records)


def undisturbed(server: LiveServer) -> Callable[[int], None]:
    return lambda step: None


def engine_dies(server: LiveServer) -> Callable[[int], None]:
    """Something to rebuild: without it nothing is restored in so short a run."""
    return lambda step: server.kill_engine() if step == 5 else None


def fired(server: LiveServer) -> set[str]:
    return {path.name for path in (server.home / FIRED).iterdir()}


def test_kills_one_after_the_other_change_nothing(tiny_model: Path, tmp_path: Path, expected) -> None:
    server, trace, deaths = play(tiny_model, tmp_path / "home", ",".join(KILLS), undisturbed)
    try:
        assert fired(server) == set(KILLS) and deaths >= 4
        compare(server, trace, expected)
    finally:
        server.stop()


@pytest.mark.slow
def test_errors_and_delays_that_clients_never_see(tiny_model: Path, tmp_path: Path, expected) -> None:
    server, trace, deaths = play(tiny_model, tmp_path / "home", ",".join(TROUBLE), undisturbed)
    try:
        assert fired(server) == set(TROUBLE) and not deaths
        compare(server, trace, expected)
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in POINTS if point.rpartition(".")[0] not in ELSEWHERE])
def test_a_kill_at_any_point_changes_nothing(tiny_model: Path, tmp_path: Path, expected, point: str) -> None:
    effect = point.rpartition(".")[0]
    then = engine_dies if effect == "restore.send" else undisturbed
    server, trace, _ = play(tiny_model, tmp_path / "home", f"{point}:{NTH.get(effect, 1)}:kill", then)
    try:
        assert fired(server), "nobody came by"
        compare(server, trace, expected)
    finally:
        server.stop()
