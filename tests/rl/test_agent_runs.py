"""Agents on the openai client in train(): the same loop, measured, evaluated, continued bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinker

from everlearn.api import bounds
from everlearn.errors import InvalidRequest
from everlearn.rl.agent_runs import HIGHEST, AgentHost, AgentTasks
from everlearn.rl.agents import Chat
from everlearn.rl.rollouts import Limits
from everlearn.rl.settings import Settings
from everlearn.rl.temperature import Temperature
from everlearn.rl.train import train
from tests.live import KEY, LiveServer
from tests.rl.test_train import lines, played, without_time

SETTINGS = Settings(
    "tiny", steps=4, rank=4, learning_rate=3e-2, limits=Limits(episodes_at_once=1), seed=5, evaluate_every=2, save_every=2, temperature=0.8
)


def agent(number: int) -> Any:
    async def asks(chat: Chat) -> float:
        """Two requests; earns by how much of the answers is plain letters."""
        texts = []
        for turn in range(2):
            answer = await chat.client.completions.create(model="x", prompt=[20, 30 + number, 40 + turn], max_tokens=3, temperature=0.1)
            texts.append(answer.choices[0].text)
        said = "".join(texts)
        chat.metrics["letters"] = sum(one.isascii() and one.isalpha() for one in said) / max(len(said), 1)
        return chat.metrics["letters"]

    return asks


def run(
    service: tinker.ServiceClient, host: AgentHost, folder: Path, settings: Settings = SETTINGS, **options: Any
) -> list[dict[str, float]]:
    tasks, held_out = AgentTasks(agent, 10, 2, 4, ["letters"]), AgentTasks(lambda number: agent(50 + number), 1, 2, 1)
    return train(service, settings, tasks, folder, held_out, agents=host, **options)


def test_agents_are_trained_in_the_loop_and_go_on_bit_for_bit(service: tinker.ServiceClient, server: LiveServer, tmp_path: Path):
    host, calm, hit = AgentHost(server.url + "/v1", KEY), tmp_path / "calm", tmp_path / "hit"
    rows = run(service, host, calm)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[:-1]:
        assert row["episodes"] == 8 and row["failed"] == 0 and row["turns/mean"] == 2 and row["temperature"] == 0.8
        assert row["kl/k3"] < 1e-8 and row["ratio/max"] == pytest.approx(1.0, abs=1e-4), "sampler and trainer agree"
        assert row["agents/continued"] == 0.0 and 0 < row["env/letters"] <= 1
    assert [row["step"] for row in rows if "held_out/env/letters" in row] == [0, 2, 4]
    training = json.loads((calm / "run.json").read_text())["run_id"]
    kept = tinker.RestClient(base_url=server.url, api_key=KEY).list_checkpoints(training).result().checkpoints
    assert [one.checkpoint_id for one in kept if "agents-" in one.checkpoint_id] == ["sampler_weights/agents-000004"], (
        "only the last is left"
    )

    def stops(row: dict[str, float]) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(service, host, hit, on_step=stops)
    assert without_time(run(service, host, hit)) == without_time(rows) == without_time(lines(calm / "metrics.jsonl"))
    records = [[without_names(row) for row in played(folder)] for folder in (calm, hit)]
    assert records[0] == records[1]


def without_names(row: dict[str, Any]) -> dict[str, Any]:
    """Records and versions are new with each run."""
    for member in row["members"]:
        for turn in member["turns"]:
            for name in ("record", "version"):
                turn["logs"].pop(name)
    return row


def test_what_cannot_be_meant(service: tinker.ServiceClient, tmp_path: Path):
    with pytest.raises(InvalidRequest, match="records don't have"):
        run(service, AgentHost("http://127.0.0.1:9/v1", KEY), tmp_path, Settings("tiny", steps=1, loss="stable_reinforce"))
    for hot in (2.5, Temperature(1.0, 3.0, 5), Temperature(3.0, 1.0, 5)):
        with pytest.raises(InvalidRequest, match="takes at most 2"):
            run(service, AgentHost("http://127.0.0.1:9/v1", KEY), tmp_path, Settings("tiny", steps=1, temperature=hot))
    assert HIGHEST == bounds.MAX_TEMPERATURE
    with pytest.raises(InvalidRequest, match="group_size is 0"):
        AgentTasks(agent, 1, 1, 0)
