"""kill -9 of the runner and of the server, between feedback accepted and promotion finished: nothing is lost, nothing happens twice, and
what serves is always whole and gated. Whoever was killed is simply started again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from everlearn.store import reward_models
from everlearn.store.db import open_database
from tests.live import KEY, READY_SECONDS, LiveServer, start_server
from tests.loop import test_continuous
from tests.loop.test_cycle import DESCRIPTION, TRUTHS

pytestmark = pytest.mark.timeout(1800)
GATED: dict[str, Any] = {**DESCRIPTION, "gate": {"owner": "maria", "promote": "automatic", "corrections": {"min_right": 0.9}}}
MOVING = test_continuous.DESCRIPTION
SERVER_FAULTS = "deployment.row.after:2:kill,deployment.row.committed:3:kill,name.row.committed:1:kill,dataset.row.after:1:kill"
RUNS = 40  # more than all kills: a run that ends by itself without having come further is the last


@pytest.fixture
def killed(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server that dies at each of SERVER_FAULTS once, and is started again."""
    live = start_server(tmp_path / "home", tiny_model, variables={"EVERLEARN_FAULT": SERVER_FAULTS})
    over = threading.Event()

    def revive() -> None:
        while not over.wait(0.2):
            if live.process.poll() is not None:
                with contextlib.suppress(AssertionError):  # it may meet its next fault before it is ready
                    live.restart()

    keeper = threading.Thread(target=revive)
    keeper.start()
    yield live
    over.set()
    keeper.join()
    live.stop()


def insist(server: LiveServer, method: str, path: str, episode: str = "", **more: Any) -> Any:
    """A request by a client that sends it again until it is answered."""
    headers = {"X-API-Key": KEY, **({"x-everlearn-episode": episode} if episode else {})}
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            answer = httpx.request(method, server.url + path, headers=headers, timeout=60, **more)
            if answer.status_code < 500:
                return answer.raise_for_status()
        except httpx.TransportError:
            pass
        threading.Event().wait(0.5)
    raise AssertionError(f"{path} was never answered")


def ask(server: LiveServer, question: str, episode: str) -> tuple[str, str, str]:
    """The record, the version, and what was said."""
    body = {"model": "support", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    answer = insist(server, "POST", "/v1/chat/completions", episode, json=body)
    said = answer.json()
    return answer.headers["x-everlearn-record"], said["model"], said["choices"][0]["message"]["content"]


def run_killed(server: LiveServer, home: Path, rng: random.Random) -> int:
    """`everlearn deploy run support --once`, killed at a fault point or at a line that it prints. Its exit code."""
    command = [sys.executable, "-m", "everlearn.cli.main", "deploy", "run", "support", "--once", "--url", server.url, "--key", KEY]
    point = f"cycle.act.{rng.choice(['before', 'after'])}:{rng.randint(1, 4)}:kill"
    lines = rng.randint(1, 8) if rng.random() < 0.5 else 0
    environment = {**os.environ, "EVERLEARN_HOME": str(home), **({} if lines else {"EVERLEARN_FAULT": point})}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for number, _ in enumerate(process.stderr, 1):
        if number == lines:
            process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("seed", "kills"), [(1, 6), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_whoever_is_killed_is_continued_by_the_next(killed: LiveServer, tmp_path: Path, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    insist(killed, "POST", "/v1/deployments", json={"name": "support", "description": GATED})
    for number in range(6):
        for place, (question, truth) in enumerate(TRUTHS.items()):
            record, _, _ = ask(killed, question, f"e{number}-{place}")
            given = {"record_id": record, "kind": "demonstration", "text": truth, "idempotency_key": f"k{number}-{place}"}
            insist(killed, "POST", "/v1/feedback", json=given)
    codes = [run_killed(killed, tmp_path / f"runner{number}", rng) for number in range(kills)]
    for number in range(RUNS):
        now = insist(killed, "GET", "/v1/deployments/support").json()
        if (now["state"], now["champion"]) == ("collect", "support@1"):
            break
        run_killed(killed, tmp_path / f"last{number}", random.Random(0)) if number % 2 else _run(killed, tmp_path / f"last{number}")
    events = insist(killed, "GET", "/v1/deployments/support/history?limit=100").json()["data"][::-1]
    assert [(event["kind"], event["state"]) for event in events] == [
        ("created", "collect"), ("advanced", "dataset"), ("advanced", "update"), ("advanced", "gate"), ("promoted", "collect")
    ]  # fmt: skip
    assert -signal.SIGKILL in codes
    adapter = insist(killed, "GET", "/v1/adapters/support").json()
    assert [version["model"] for version in adapter["versions"]] == ["support@1"], "one cycle, one version"
    assert len(insist(killed, "GET", "/v1/feedback?limit=100&kind=demonstration").json()["data"]) == 6 * len(TRUTHS)
    for place, (question, truth) in enumerate(TRUTHS.items()):
        _, version, text = ask(killed, question, f"after{place}")
        assert version == "support@1" and truth in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_weights_that_move_with_every_episode_outlive_many_kills(killed: LiveServer, tmp_path: Path) -> None:
    """20 kills of the runner, and those of the server: each piece of feedback is taken once, by the learner and by the reward model, and so
    is each edit in between."""
    rng = random.Random(3)
    insist(killed, "POST", "/v1/deployments", json={"name": "support", "description": MOVING})
    ids = []
    for number in range(6):
        for place, (question, truth) in enumerate(TRUTHS.items()):
            record, _, _ = ask(killed, question, f"e{number}-{place}")
            given = {"record_id": record, "kind": "demonstration", "text": truth, "idempotency_key": f"k{number}-{place}"}
            ids.append(insist(killed, "POST", "/v1/feedback", json=given).json()["id"])
    codes = [run_killed(killed, tmp_path / f"runner{number}", rng) for number in range(10)]
    truths = {**TRUTHS, (moved := "where is it?"): "the quick brown fox"}
    about = ids[list(TRUTHS).index(moved) :: len(TRUTHS)]
    for said in about:
        insist(killed, "PATCH", f"/v1/feedback/{said}", json={"text": truths[moved]})
    codes += [run_killed(killed, tmp_path / f"later{number}", rng) for number in range(10)]
    for number in range(RUNS):
        now = insist(killed, "GET", "/v1/deployments/support").json()
        moving = now["cycle"].get("moving", {"step": 0, "steps": {}})
        if now["state"] == "collect" and moving["step"] == moving["steps"].get(now["champion"], -1) > 0:
            break
        _run(killed, tmp_path / f"last{number}")
    assert -signal.SIGKILL in codes and moving["behind"] == max(ids), "all of it was taken"
    events = insist(killed, "GET", "/v1/deployments/support/history?limit=100").json()["data"][::-1]
    tried = [event["evidence"]["update"]["step"] for event in events if (event["kind"], event["state"]) == ("advanced", "gate")]
    assert tried == [20 * place for place in range(1, len(tried) + 1)], "every 20 steps, whoever made them"
    adapter = insist(killed, "GET", "/v1/adapters/support").json()
    assert len(adapter["versions"]) == len(tried), "one version for each time"
    edited = [said for event in events for said in event["evidence"].get("feedback", {})]
    assert len(edited) == len(set(edited)) and set(edited) <= set(about), "each edit once, if it came after the first taking"
    for place, (question, truth) in enumerate(truths.items()):
        _, version, text = ask(killed, question, f"after{place}")
        assert version == now["champion"] and truth in text
    until = time.monotonic() + 120
    while len(found := _labels(killed)) < len(ids):
        assert time.monotonic() < until, found
        time.sleep(0.5)
    assert sorted(found) == sorted(ids)


def _labels(server: LiveServer) -> list[str]:
    """The ids of the feedback that the reward model learns from."""
    db = open_database(f"sqlite:///{server.home / 'everlearn.db'}")
    try:
        return [one.feedback_id for one in db.read(lambda conn: reward_models.labels(conn, "default", "support"))]
    finally:
        db.close()


def _run(server: LiveServer, home: Path) -> None:
    command = [sys.executable, "-m", "everlearn.cli.main", "deploy", "run", "support", "--once", "--url", server.url, "--key", KEY]
    subprocess.run(command, env={**os.environ, "EVERLEARN_HOME": str(home)}, capture_output=True, timeout=600, check=False)
