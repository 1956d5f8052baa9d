"""What keeps disk and memory bounded, on a real store beside a real engine with short times and small bounds; and the status line."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from everlearn.api.app import create_app
from everlearn.api.housekeeping import STATUS_SECONDS, Housekeeping
from everlearn.config import Settings
from everlearn.store import log as request_log
from everlearn.store import records, tables
from tests.wire.raw import Raw, batch, sample

BOUNDS = {
    "result_retention_seconds": 1.0,
    "session_retention_seconds": 3600.0,
    "log_max_bytes": 20_000,
    "record_max_bytes": 10_000,
}
ENGINE = {"threads": 1, "kv_tokens": 4096, "snapshot_min_steps": 10_000}  # no snapshot but those that are asked for
STATUS = re.compile(r"training (\d+) tok/s, \d+ requests wait; sampling (\d+) tok/s, \d+ run, \d+ wait; KV \d+ %; \d+ adapters; \w+")


class Kept(Raw):
    """A client of an app in this process, and the housekeeper's rounds."""

    def __init__(self, client: TestClient):
        self.client, self.http, self.model = client, client, "tiny"
        self.svc = client.app.state.services  # type: ignore[attr-defined]
        self.session = self.ok("/create_session", sdk_version="0.38.0", tags=[])["session_id"]

    def sweep(self) -> None:
        self.client.portal.call(Housekeeping(self.svc)._expire)  # type: ignore[union-attr]

    def age(self, seconds: float) -> None:
        """All sessions and samplers become so much older."""
        rows, samplers = tables.sessions, tables.samplers

        def write(conn: sa.Connection) -> None:
            older = {name: rows.c[name] - seconds for name in ("created_at", "last_heartbeat")}
            conn.execute(rows.update().values(older))
            conn.execute(samplers.update().values(last_used=samplers.c.last_used - seconds))

        self.svc.db.write(write).result()

    def payload_bytes(self) -> int:
        return int(self.svc.db.read(request_log.usage).payload_bytes)

    def record_bytes(self) -> int:
        return int(self.svc.db.read(records.size))


@pytest.fixture(scope="module")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    models = {"default": "tiny", "base": [{"name": "tiny", "path": str(tiny_model)}]}
    home = tmp_path_factory.mktemp("kept")
    given = Settings.model_validate({"home": home, "models": models, "store": BOUNDS, "engine": ENGINE})
    with TestClient(create_app(given), base_url="http://testserver/api/v1") as client:
        until(lambda: client.get("http://testserver/readyz").status_code == 200, 300.0)
        yield Kept(client)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def train(kept: Kept, run: str, seqs: range, tokens: int = 64) -> list[str]:
    asked = []
    for seq in seqs:
        reply = kept.forward_backward(batch(run, seq, list(range(3, 3 + tokens))).SerializeToString())
        assert reply.status_code == 200, reply.text
        asked.append(reply.json()["request_id"])
        kept.result(asked[-1])
    return asked


def test_results_can_be_fetched_until_their_time_is_over(kept: Kept) -> None:
    run = kept.create(0)
    trained, drawn = train(kept, run, range(1, 2))[0], kept.ok("/asample", **sample(kept.sampler(0), 0))["request_id"]
    assert kept.result(drawn)["sequences"]
    kept.sweep()
    assert kept.poll(trained).status_code == 200 and kept.poll(drawn).status_code == 200, "no sooner than that"
    time.sleep(BOUNDS["result_retention_seconds"] + 0.1)
    kept.sweep()
    assert kept.svc.db.read(request_log.usage).result_bytes == 0
    kept.svc.dispatcher.ledger._answers.clear()  # small ones are there for another minute, which is not waited for here
    assert (kept.poll(trained).status_code, kept.poll(drawn).status_code) == (410, 404)
    assert kept.payload_bytes() > 0, "what a rebuild needs stays"
    kept.result(kept.ok("/optim_step", model_id=run, seq_id=2, adam_params={"learning_rate": 1e-3})["request_id"])


def test_a_log_over_its_bound_is_shortened_by_snapshots(kept: Kept) -> None:
    run, seq = kept.create(1), 1
    while kept.payload_bytes() <= BOUNDS["log_max_bytes"]:
        train(kept, run, range(seq, seq + 8))
        seq += 8
    kept.sweep()
    until(lambda: kept.payload_bytes() <= BOUNDS["log_max_bytes"])
    snapshot = kept.svc.db.read(lambda conn: request_log.newest_snapshot(conn, run))
    assert snapshot is not None and Path(snapshot.folder).is_dir()
    train(kept, run, range(seq, seq + 1))
    step = {"model_id": run, "seq_id": seq + 1, "adam_params": {"learning_rate": 1e-3}}
    kept.result(kept.ok("/optim_step", **step)["request_id"])


def test_records_over_their_bound_go_the_oldest_first(kept: Kept) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello, world! " * 20}], "max_tokens": 8}
    made = []
    while len(made) < 8 or kept.record_bytes() <= BOUNDS["record_max_bytes"]:
        reply = kept.http.post("http://testserver/v1/chat/completions", json=body)
        made.append(reply.headers["x-everlearn-record"])
        assert kept.http.get(f"http://testserver/v1/records/{made[-1]}").status_code == 200
        assert len(made) < 500
    kept.sweep()
    left = [kept.http.get(f"http://testserver/v1/records/{record}").status_code == 200 for record in made]
    assert 0 < kept.record_bytes() <= BOUNDS["record_max_bytes"]
    assert left == sorted(left) and not left[0] and left[-1]


def test_sessions_that_nothing_refers_to_go_in_time(kept: Kept) -> None:
    empty, sampling = (kept.ok("/create_session", sdk_version="0.38.0", tags=[])["session_id"] for _ in range(2))
    sampler = kept.ok("/create_sampling_session", session_id=sampling, sampling_session_seq_id=0, base_model="tiny")["sampling_session_id"]
    kept.result(kept.ok("/asample", **sample(sampler, 0))["request_id"])
    kept.sweep()
    assert kept.http.get(f"/sessions/{empty}").status_code == 200
    kept.age(BOUNDS["session_retention_seconds"])
    time.sleep(BOUNDS["result_retention_seconds"] + 0.2)  # a sampler stays as long as its answers
    kept.sweep()
    assert kept.http.get(f"/sessions/{empty}").status_code == 404 and kept.http.get(f"/samplers/{sampler}").status_code == 404
    reply = kept.post("/asample", **sample(sampler, 1))
    assert reply.status_code == 404 and "create_sampling_session" in reply.text
    assert kept.http.get(f"/sessions/{kept.session}").status_code == 200, "it has training runs"


def test_a_line_every_ten_seconds_says_what_the_server_does(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[re.Match[str]]:
        found: Any = [STATUS.fullmatch(record.message) for record in caplog.records if record.name == "everlearn.api.housekeeping"]
        return [line for line in found if line]

    run = kept.create(2)
    with caplog.at_level(logging.INFO, "everlearn.api.housekeeping"):
        train(kept, run, range(1, 3))
        kept.result(kept.ok("/asample", **sample(kept.sampler(7), 0))["request_id"])
        started = time.monotonic()
        until(lambda: bool(lines()), 3 * STATUS_SECONDS)
        assert time.monotonic() - started <= STATUS_SECONDS + 5.0 and STATUS_SECONDS == 10.0
        kept.client.portal.call(Housekeeping(kept.svc)._status)  # type: ignore[union-attr]
    trained, sampled = lines()[-1].groups()
    assert int(trained) > 0 and int(sampled) > 0
