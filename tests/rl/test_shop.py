"""The shop: its tools, its rewards for conversations of every kind, and its splits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from everlearn.errors import InvalidRequest
from everlearn.rl.agents import AgentServer
from everlearn.rl.envs.shop import ITEMS, Shop, Task, evaluate, toolbox
from everlearn.rl.rollouts import Limits, count, play_now
from everlearn.rl.tools import ToolFailed
from tests.live import KEY, LiveServer

TASK = Task("lamp", 6, {"lamp": 37, "chair": 20})


def test_the_tools_answer_what_they_are_asked():
    box = toolbox(TASK)

    def told(name: str, arguments: str) -> Any:
        result = asyncio.run(box.call(name, arguments))
        return result.content, result.failure

    assert told("price", '{"item": "lamp"}') == ("37", "") and told("calculate", '{"expression": "6 * 37"}') == ("222", "")
    assert told("price", '{"item": "lamps"}')[1] == "raised" and told("price", f'{{"item": "{"x" * 21}"}}')[1] == "arguments"
    assert (TASK.question, TASK.answer) == ("How much do 6 lamps cost together?", 222)
    assert box.schemas[0]["function"]["parameters"]["properties"]["item"] == {"type": "string", "maxLength": 20}
    assert not any(schema["function"]["strict"] for schema in toolbox(TASK, strict=False).schemas)


def test_the_calculator_calculates_and_does_nothing_else():
    assert [evaluate(text) for text in ("2 + 3 * 4", "(2+3)*4", "-7", "7 / 2", "8 / 2", "0.5 * 4")] == [14, 20, -7, 3.5, 4, 2]
    for text in ("", "2 **", "9 ** 9", "x", "__import__('os')", "1 / 0", "True", "'a' * 9", "2 == 2", "(" * 30, "1e308 * 10"):
        with pytest.raises(ToolFailed, match="can't be calculated"):
            evaluate(text)


def test_splits_are_disjoint_and_tasks_follow_from_the_seed():
    train, test = Shop(), Shop(split="test")
    pairs = [{(shop.task(number).item, shop.task(number).count) for number in range(300)} for shop in (train, test)]
    assert not pairs[0] & pairs[1] and {item for item, _ in pairs[1]} <= set(ITEMS)
    assert train.task(3) == Shop().task(3) != Shop(seed=1).task(3)
    assert len(train.get_batch(999)) == 8
    with pytest.raises(InvalidRequest, match="no batch 1000"):
        train.get_batch(1000)
    with pytest.raises(InvalidRequest, match="no split 'valid'"):
        Shop(split="valid")  # type: ignore[arg-type]


def test_conversations_are_played_and_scored(server: LiveServer):
    """A model of random weights answers nonsense: no episode fails, and what it says is scored, with reasons."""
    shop = Shop(groups_per_batch=2, group_size=2, turns=2, max_tokens=24)
    groups = play_now(shop.get_batch(0), AgentServer(server.url + "/v1", KEY, server.model), Limits(seconds=120), seed=1)
    assert count(groups) == {"episodes": 4, "failed": 0, "groups_failed": 0}
    for group in groups:
        assert group.tags == ["shop"]
        for one in group.trajectories_G:
            last = one.transitions[-1]
            assert set(last.reward.values) == {"right", "ended"} and last.reward.parts[0].reason
            assert {"right", "ended", "tools/calls", "tools/valid", "tools/failed"} <= set(last.metrics)
            assert last.logs["question"].startswith("How much do")
