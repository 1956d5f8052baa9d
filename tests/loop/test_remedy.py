"""Corrections of answers in memories: which go into the memory and which into the weights, and that the loop does so."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import tinker

from everlearn.cli.client import Client
from everlearn.loop.remedy import Case, alike, remedies
from everlearn.loop.runner import Runner
from tests.live import KEY, LiveServer


def places(*cases: Case) -> list[str]:
    return [remedy.place for remedy in remedies(cases)]


def test_a_users_own_facts_go_into_the_memory_and_all_else_into_the_weights():
    mine = Case("1", "Where does my sister live?", "In Porto.", "ann")
    world = Case("2", "What is the capital of Peru?", "Lima.", "ann")
    addressed = Case("3", "When is the meeting?", "Your meeting is at nine.", "bob")
    nowhere = Case("4", "Where does my sister live?", "In Porto.")
    assert places(mine, world, addressed, nowhere) == ["memory", "weights", "memory", "weights"]
    reasons = [remedy.reason for remedy in remedies([mine, world, addressed, nowhere])]
    assert reasons[0] == "it is about the user ('my'), and one memory's alone" and "'Your'" in reasons[2]
    assert reasons[1] == "it isn't about the user" and reasons[3] == "the answer was given in no memory"


def test_what_several_users_say_alike_is_everybodys():
    ours = Case("1", "When does our office open?", "At nine.", "ann")
    same = Case("2", "When will our office open?", "at nine", "bob")
    again = Case("3", "When does our office open?", "At nine.", "ann")
    other = Case("4", "When does our office open?", "At ten.", "cleo")
    assert alike(ours, same) and not alike(ours, other)
    assert places(ours, same, other) == ["weights", "weights", "memory"]
    assert places(ours, again) == ["memory", "memory"], "one user twice is one user"
    assert [remedy.place for remedy in remedies([ours, same], several=3)] == ["memory", "memory"]
    assert "the users of 2 memories" in remedies([ours, same])[0].reason


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_loop_edits_a_memory_instead_of_weights(server: LiveServer, http: httpx.Client):
    description: dict[str, Any] = {"base": "tiny", "triggers": {"labels": 1}, "gate": {"owner": "maria"}}
    http.post("/v1/deployments", json={"name": "keeper", "description": description}).raise_for_status()
    said: list[str] = []
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client,
        tinker.ServiceClient(base_url=server.url, api_key=KEY) as service,
    ):
        body = {"memory": {"id": "rosa", "budget": 400}, "store": True}
        question = "Where does my sister live?"
        asked: list[Any] = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(model="keeper", messages=asked, max_tokens=6, extra_body=body)
        record = answer.model_extra["everlearn"]["record"]
        told = {"record_id": record, "kind": "demonstration", "text": "In Porto."}
        http.post("/v1/feedback", json=told).raise_for_status()
        runner = Runner(Client(server.url, KEY), service, "keeper", said.append)
        runner.run()
        runner.begin("again")
        runner.run()
        once = http.get("/v1/memories/rosa").json()
        turn = http.get("/v1/memories/rosa/turns/1").json()
        http.delete("/v1/memories/rosa/turns/1").raise_for_status()
        runner.begin("and what was forgotten?")
        runner.run()
        http.delete("/v1/memories/rosa").raise_for_status()
        client.chat.completions.create(model="keeper", messages=[{"role": "user", "content": "hi"}], max_tokens=6, extra_body=body)
        runner.begin("and what another memory of that name says?")
        runner.run()
        anew = http.get("/v1/memories/rosa").json()
    assert any("answered in memories" in line for line in said)
    assert turn["superseded_by"] == 2 and once["turns"] == 3, "the second cycle found it done"
    (chunk,) = [chunk for chunk in once["chunks"] if 2 in chunk["sources"]]
    assert chunk["pinned"] and chunk["text"] == f"{question} In Porto."
    events = http.get("/v1/deployments/keeper/history", params={"limit": 100}).json()["data"]
    first, last, *after = [event for event in events if event["kind"] == "ended"][::-1]
    places = [event["evidence"]["remedies"][record]["place"] for event in after]
    assert places == ["nowhere"] * 2, "nor do the weights learn what was forgotten"
    assert anew["turns"] == 2 and not any(chunk["pinned"] for chunk in anew["chunks"])
    assert first["evidence"]["remedies"][record] == last["evidence"]["remedies"][record]
    assert first["evidence"]["remedies"][record]["place"] == "memory" and first["evidence"]["remedies"][record]["edit"] == 2
    rows = http.get(f"/v1/records/{record}").json()
    episode = http.get(f"/v1/episodes/{rows['episode_id']}").json()
    acts = [entry for entry in episode["timeline"] if entry.get("name") == "memory edit"]
    assert len(acts) == 1 and "about the user" in acts[0]["text"]
    assert [entry["name"] for entry in episode["timeline"] if entry.get("kind") == "memory"] == ["rosa", "rosa"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_weights_that_move_don_t_learn_a_users_own_facts_either(server: LiveServer, http: httpx.Client):
    moves = {"steps": 1, "gate_every": 2, "staleness": 4, "quiet": 0.0, "rewards": False}
    update = {"rank": 4, "paraphrases": 0, "rehearsed": 0}
    description: dict[str, Any] = {"base": "tiny", "triggers": {"continuous": True}, "continuous": moves, "update": update}
    http.post("/v1/deployments", json={"name": "steady", "description": description}).raise_for_status()
    said: list[str] = []
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client,
        tinker.ServiceClient(base_url=server.url, api_key=KEY) as service,
    ):
        runner = Runner(Client(server.url, KEY), service, "steady", said.append)
        for question, text in (("Where does my brother live?", "In Faro."), ("Where is Faro?", "In Portugal.")):
            answer = client.chat.completions.create(
                model="steady",
                messages=[{"role": "user", "content": question}],
                max_tokens=6,
                extra_body={"memory": {"id": "ines", "budget": 400}, "store": True},
            )
            told = {"record_id": answer.model_extra["everlearn"]["record"], "kind": "demonstration", "text": text}
            http.post("/v1/feedback", json=told).raise_for_status()
        while not runner.mover.reservoir:
            assert runner.step()
        again = Runner(runner.api, service, "steady")
        while not again.mover.reservoir:
            assert again.step()
    texts = [chunk["text"] for chunk in http.get("/v1/memories/ines").json()["chunks"] if chunk["pinned"]]
    assert texts == ["Where does my brother live? In Faro."] and "1 corrections are answered in memories, not by weights" in said
    assert [[one.answer for one in moved.mover.reservoir] for moved in (runner, again)] == [["In Portugal."]] * 2
