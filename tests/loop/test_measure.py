"""What the gate is told before any traffic, measured of two real versions."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.live import LiveServer
from tests.loop.conftest import train
from tests.loop.test_cycle import events, parts, replayed  # noqa: F401  (parts is a fixture)

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(600)]
GATE: dict[str, Any] = {
    "owner": "maria",
    "promote": "ask",
    "safety": {"margin": 0.5, "unsure": "pass"},
    "retained": {"margin": 0.5, "unsure": "pass", "suites": ["general", "questions"]},
    "kl": {"most": 50.0},
    "parity": {"most": 0.01, "min_num": 100},
}


def test_all_that_a_rule_may_ask_is_measured(server: LiveServer, http: httpx.Client, parts: Any) -> None:  # noqa: F811
    runner, _ = parts("measured", {"base": "tiny", "gate": GATE})
    path = train(server, "who is it?", "the lazy dog", steps=8)
    http.post("/v1/adapters", json={"name": "measured", "path": path}).raise_for_status()
    runner.enter(1)
    lines: list[str] = []
    runner.say = lines.append
    now = runner.run()
    assert now.state == "gate" and "leaves the promotion to a person" in now.cycle["asks"], lines
    told = len(lines)
    assert runner.run().state == "gate" and len(lines) == told, "a person is waited for without asking it all again"
    http.post("/v1/deployments/measured/promote", json={}).raise_for_status()

    runner.api.patch("/v1/deployments/measured", {"description": {"base": "tiny", "gate": {**GATE, "kl": {"most": 1e-6}}}})
    http.post("/v1/deployments/measured/promote", json={"number": 0}).raise_for_status()
    runner.enter(1)
    assert runner.run().state == "collect"
    last = events(http, "measured")[-1]
    assert last["kind"] == "rejected" and last["reason"].startswith("kl:") and replayed(last) == "reject"
    found = last["evidence"]["evidence"]
    assert len(found["safety"]) == 64 and [suite["suite"] for suite in found["retained"]] == ["general", "questions"]
    assert 0 <= found["parity"]["mean"] < 0.001 and found["parity"]["num"] >= 100, "the sampler and one forward pass agree"
    shown = {part["name"]: part["result"] for part in last["evidence"]["verdict"]["parts"]}
    assert shown["parity"] == shown["safety"] == "pass" and shown["kl"] == "fail"
