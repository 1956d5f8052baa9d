"""A deployment in front of real clients: the champion, a candidate on a sticky share or in the shadow, a rollback within a second."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from everlearn.cli.client import Client
from everlearn.loop import outcomes
from everlearn.loop.service import read
from tests.live import AT_ONCE, KEY, LiveServer
from tests.loop.conftest import train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaves its sockets
ASK: list[Any] = [{"role": "user", "content": "who?"}]


@pytest.fixture(scope="module")
def paths(server: LiveServer) -> list[str]:
    """Two adapters: one says "the lazy dog", the other "in france"."""
    return [train(server, "who?", answer) for answer in ("the lazy dog", "in france")]


@pytest.fixture
def deployed(http: httpx.Client, paths: list[str]) -> Iterator[str]:
    """The name of a deployment whose champion is version 1; there is a version 2."""
    name = f"support-{secrets.token_hex(4)}"
    for path in paths:
        http.post("/v1/adapters", json={"name": name, "path": path}).raise_for_status()
    http.post("/v1/deployments", json={"name": name, "description": {"base": "tiny"}}).raise_for_status()
    yield name
    http.delete(f"/v1/deployments/{name}")


def advance(http: httpx.Client, name: str, to: str, **more: Any) -> dict[str, Any]:
    now = http.get(f"/v1/deployments/{name}").raise_for_status().json()
    answer = http.post(f"/v1/deployments/{name}/advance", json={"to": to, "expected": now["revision"], **more})
    return dict(answer.raise_for_status().json())


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as made:
        yield made


def ask(client: openai.OpenAI, model: str, episode: str | None = None, **more: Any) -> tuple[str, str]:
    """The version that answered, and what it said."""
    headers = {"x-everlearn-episode": episode} if episode else {}
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=more.pop("messages", ASK), temperature=0, max_tokens=12, extra_headers=headers, **more
    )
    answer = raw.parse()
    assert raw.headers["x-everlearn-version"] == answer.model
    return answer.model, answer.choices[0].message.content or ""


def test_the_base_model_is_served_under_a_name_before_it_has_learned(http: httpx.Client, client: openai.OpenAI) -> None:
    made = http.post("/v1/deployments", json={"name": "unborn", "description": {"base": "tiny"}}).raise_for_status().json()
    assert (made["champion"], made["candidate"], made["state"]) == ("unborn@0", None, "collect")
    version, text = ask(client, "unborn")
    assert (version, text) == ("unborn@0", ask(client, "tiny")[1]) and ask(client, "unborn@0")[0] == "unborn@0"
    http.delete("/v1/deployments/unborn").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        ask(client, "unborn")


def test_a_candidate_answers_a_sticky_share_of_the_episodes(http: httpx.Client, client: openai.OpenAI, deployed: str) -> None:
    assert ask(client, deployed) == (f"{deployed}@1", "the lazy dog")
    advance(http, deployed, "gate", candidate=2)
    advance(http, deployed, "canary", share=0.5)
    first = {f"e{number}": ask(client, deployed, f"e{number}") for number in range(24)}
    assert set(first.values()) == {(f"{deployed}@1", "the lazy dog"), (f"{deployed}@2", "in france")}
    assert 4 <= sum(version.endswith("@2") for version, _ in first.values()) <= 20
    assert first == {episode: ask(client, deployed, episode) for episode in first}, "whoever talks with it goes on talking with it"
    assert ask(client, f"{deployed}@1", "e0")[0].endswith("@1"), "a version that is named is that version"


def test_what_an_episode_hears_when_the_share_has_grown_isn_t_booked_on_who_began_it(
    http: httpx.Client, client: openai.OpenAI, server: LiveServer, deployed: str
) -> None:
    def says(episode: str, good: bool) -> str:
        """Asks, and judges the answer; which version gave it."""
        raw = client.chat.completions.with_raw_response.create(
            model=deployed, messages=ASK, temperature=0, max_tokens=12, extra_headers={"x-everlearn-episode": episode}
        )
        told = {"record_id": raw.headers["x-everlearn-record"], "kind": "boolean", "value": good, "source_id": episode}
        http.post("/v1/feedback", json=told).raise_for_status()
        return raw.headers["x-everlearn-version"]

    began = time.time()
    advance(http, deployed, "gate", candidate=2)
    advance(http, deployed, "canary", share=0.3)
    first: dict[str, str] = {}
    while len(first) < 16 or len(set(first.values())) < 2:  # a deployment's share falls on other episodes each time one is made
        first[f"g{len(first)}"] = says(f"g{len(first)}", True)
        assert len(first) < 100
    advance(http, deployed, "canary", share=1.0)
    assert {says(episode, False) for episode in first} == {f"{deployed}@2"}
    api = Client(server.url, KEY)
    found = outcomes.Traffic(api, read(api, deployed), began, 0.0, time.time())
    told = outcomes.evident(found.told(["length"]))["feedback"]
    both = [[one.value for one in told if one.candidate == arm] for arm in (False, True)]
    assert len(both[0]) == sum(version.endswith("@1") for version in first.values()) > 0
    assert set(both[0]) == {1.0}, "the champion was liked, and has said nothing else"
    assert set(both[1]) == {0.5} and len(both[0]) + len(both[1]) == len(first), "each episode is one outcome"


def test_without_an_id_an_episode_is_its_user_or_how_it_began(http: httpx.Client, client: openai.OpenAI, deployed: str) -> None:
    advance(http, deployed, "gate", candidate=2)
    advance(http, deployed, "canary", share=0.5)
    users = {ask(client, deployed, user=f"user{number}")[0] for number in range(16)}
    assert len(users) == 2
    begun: list[set[str]] = []
    for number in range(16):
        turns: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": f"who is {number}?"}]
        longer = [*turns, {"role": "assistant", "content": "nobody"}, {"role": "user", "content": "who?"}]
        begun.append({ask(client, deployed, messages=turns)[0], ask(client, deployed, messages=longer)[0]})
    assert all(len(versions) == 1 for versions in begun) and len(set.union(*begun)) == 2


def test_every_api_knows_arms(http: httpx.Client, client: openai.OpenAI, server: LiveServer, deployed: str) -> None:
    advance(http, deployed, "gate", candidate=2)
    advance(http, deployed, "canary", share=0.5)
    theirs = {f"e{number}": ask(client, deployed, f"e{number}")[0] for number in range(8)}
    with anthropic.Anthropic(base_url=f"{server.url}/anthropic/api", api_key=KEY) as other:
        for episode, version in theirs.items():
            headers = {"x-everlearn-episode": episode}
            text = client.completions.create(model=deployed, prompt="who?", max_tokens=2, extra_headers=headers)
            response = client.responses.create(model=deployed, input="who?", max_output_tokens=4, extra_headers=headers)
            message = other.messages.create(model=deployed, messages=ASK, max_tokens=4, extra_headers=headers)
            stream = client.chat.completions.create(model=deployed, messages=ASK, max_tokens=4, stream=True, extra_headers=headers)
            assert {text.model, response.model, message.model, *(chunk.model for chunk in stream)} == {version}
    with pytest.raises(openai.BadRequestError, match="episode 'not an id'"):
        ask(client, deployed, "not an id")


def test_a_shadow_answers_unseen_and_is_recorded_beside_what_was_shown(http: httpx.Client, client: openai.OpenAI, deployed: str) -> None:
    advance(http, deployed, "gate", candidate=2)
    advance(http, deployed, "shadow", shadow=1.0)
    assert ask(client, deployed) == (f"{deployed}@1", "the lazy dog")
    deadline = time.monotonic() + 30
    while not (rows := [row for row in records(http, deployed) if row["route"] == "shadow"]):
        assert time.monotonic() < deadline, "no shadow answer was recorded"
        time.sleep(0.1)
    shown = next(row for row in records(http, deployed) if row["route"] != "shadow")
    content = http.get(f"/v1/records/{rows[0]['id']}").raise_for_status().json()["content"]
    assert rows[0]["model"] == f"{deployed}@2" and content["metadata"] == {"shadow_of": shown["id"]}
    assert content["answer"][0]["content"] == "in france" and content["messages"] == ASK


def records(http: httpx.Client, name: str) -> list[dict[str, Any]]:
    return list(http.get("/v1/records", params={"model": name, "limit": 100}).raise_for_status().json()["data"])


def test_a_rollback_takes_the_next_request_at_once(http: httpx.Client, client: openai.OpenAI, deployed: str) -> None:
    before = ask(client, deployed)
    http.post(f"/v1/deployments/{deployed}/promote", json={"number": 2, "reason": "looks good"}).raise_for_status()
    assert ask(client, deployed) == (f"{deployed}@2", "in france")
    began = time.monotonic()
    http.post(f"/v1/deployments/{deployed}/rollback", json={"reason": "it doesn't"}).raise_for_status()
    back = ask(client, deployed)
    assert time.monotonic() - began <= AT_ONCE
    assert back == before, "the same weights, the same words"
    kinds = [event["kind"] for event in http.get(f"/v1/deployments/{deployed}/history").json()["data"]]
    assert kinds == ["rolled_back", "promoted", "created"]


def test_a_pause_takes_the_candidate_out_and_its_end_brings_it_back(http: httpx.Client, client: openai.OpenAI, deployed: str) -> None:
    advance(http, deployed, "gate", candidate=2)
    advance(http, deployed, "canary", share=1.0)
    assert ask(client, deployed, "e1")[0] == f"{deployed}@2"
    http.patch(f"/v1/deployments/{deployed}", json={"paused": True}).raise_for_status()
    assert ask(client, deployed, "e1")[0] == f"{deployed}@1"
    http.patch(f"/v1/deployments/{deployed}", json={"paused": False}).raise_for_status()
    assert ask(client, deployed, "e1")[0] == f"{deployed}@2"


def test_the_name_and_its_versions_are_the_deployment_s(http: httpx.Client, deployed: str) -> None:
    moved = http.post(f"/v1/adapters/{deployed}/move", json={"number": 2})
    assert moved.json()["error"]["code"] == "conflict" and "follows the deployment" in moved.json()["error"]["message"]
    assert http.delete(f"/v1/adapters/{deployed}@1").json()["error"]["code"] == "conflict"
    assert http.get(f"/v1/deployments/{deployed}/nothing").status_code == 404


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"name": "x", "description": {"base": "tiny", "updaet": {}}}, "updaet"),
        ({"name": "x", "description": {"base": "tiny", "update": {"rank": 0}}}, "update.rank"),
        ({"name": "x", "description": {"base": "tiny", "triggers": {"at": "25:00"}}}, "triggers.at"),
        ({"name": "x", "description": {"base": "tiny", "gate": {"guardrails": {"mood": {"worse": "up", "margin": 0.1}}}}}, "mood"),
        ({"name": "x", "description": {"base": "nowhere"}}, "nowhere"),
        ({"name": "tiny", "description": {"base": "tiny"}}, "base model's name"),
        ({"name": "x@3", "description": {"base": "tiny"}}, "names a version"),
    ],
)
def test_what_can_t_be_meant_is_refused_by_name(http: httpx.Client, body: dict[str, Any], names: str) -> None:
    answer = http.post("/v1/deployments", json=body)
    assert answer.status_code in (400, 404) and names in answer.json()["error"]["message"]
