"""The reward model that lives with the server: it follows feedback, publishes what it is worth, forgets what is deleted, and counts nothing
twice, whatever ends the server between. On a real server with the tiny model."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from everlearn.loop import rewarded
from everlearn.rewards import refit
from everlearn.rewards.stream import StreamSettings
from everlearn.store import reward_models
from everlearn.store.db import open_database
from tests.live import KEY, LiveServer

pytestmark = pytest.mark.timeout(600)
SAID = ("paris", "hello, world!", "the lazy dog", "what is it?")


class Product:
    """A deployment `desk` whose users like some questions' answers and not others'."""

    def __init__(self, server: LiveServer, name: str = "desk", reward: dict[str, Any] | None = None, **more: Any):
        self.server, self.name = server, name
        self.http = httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=60)
        self.post("/v1/deployments", {"name": name, "description": {"base": "tiny", "reward": reward or {}, **more}})

    def post(self, path: str, body: Any = None) -> Any:
        return self.http.post(path, json=body).raise_for_status().json()

    def get(self, path: str, **params: Any) -> Any:
        return self.http.get(path, params=params).raise_for_status().json()

    def ask(self, text: str, episode: str, n: int = 1) -> str:
        """The record of `n` answers. Sampled, so that answers differ, and the same in every run."""
        body = {"model": self.name, "messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 1.0, "n": n}
        body["seed"] = zlib.crc32(episode.encode())
        reply = self.http.post("/v1/chat/completions", json=body, headers={"x-everlearn-episode": episode}).raise_for_status()
        return str(reply.headers["x-everlearn-record"])

    def thumbs(self, num: int, first: int = 0, n: int = 4) -> list[str]:
        """Thumbs for `n` answers to so many requests: up for two of the four questions. Their ids."""
        found = []
        for number in range(first, first + num):
            place = number % len(SAID)
            record = self.ask(SAID[place], f"{self.name}-{number}", n)
            for choice in range(n):
                body = {"record_id": record, "choice": choice, "kind": "boolean", "value": place < 2, "source_id": f"user {number}"}
                found.append(str(self.post("/v1/feedback", body)["id"]))
        return found

    def taught(self) -> dict[str, Any]:
        """A version that learned enough thumbs to be a reward, and stays one with those that still come."""
        self.thumbs(48)
        found = self.newest(lambda one: one["labels"] >= 64)
        assert found["earned"], found["why"]
        return found

    def labels(self) -> list[str]:
        """The ids of what the model learns from, as the store has it."""
        db = open_database(f"sqlite:///{self.server.home / 'everlearn.db'}")
        try:
            return [one.feedback_id for one in db.read(lambda conn: reward_models.labels(conn, "default", self.name))]
        finally:
            db.close()

    def settled(self, num: int) -> None:
        """Returns once there are so many labels."""
        until = time.monotonic() + 60
        while len(self.labels()) < num:
            assert time.monotonic() < until, self.server.log.read_text()[-2000:]
            time.sleep(0.2)

    def newest(self, enough: Callable[[dict[str, Any]], bool], seconds: float = 60.0) -> dict[str, Any]:
        """The newest version, once it is as wanted."""
        until = time.monotonic() + seconds
        found: list[dict[str, Any]] = []
        while time.monotonic() < until:
            found = self.get("/v1/reward-models", deployment=self.name, limit=1)["data"]
            if found and enough(found[0]):
                return found[0]
            time.sleep(0.1)
        raise AssertionError(f"no such version came; the newest is {found}\n{self.server.log.read_text()[-2000:]}")


def test_it_learns_from_each_label_and_says_what_it_is_worth(server: LiveServer) -> None:
    product = Product(server, "learns", reward={"asked": 1.0})
    found = product.taught()
    before = found["report"]["prequential"]
    assert before["auc"] > 0.7 and before["ece"] < 0.3 and before["brier"] < 0.25, "which question was asked is easily told"
    assert found["report"]["held_out"]["num"] > 0 and sum(count for *_, count in found["report"]["reliability"]) == found["labels"]
    numbers = [one["number"] for one in product.get("/v1/reward-models", deployment="learns")["data"]]
    assert numbers == list(range(len(numbers), 0, -1)), "versions are numbered, the newest first"

    up, down = (product.ask(SAID[place], f"scored-{place}") for place in (0, 3))
    scored = product.post("/v1/reward-models/learns/score", {"records": [up, down], "as_reward": True})
    better, worse = scored["data"]
    listed = [one["id"] for one in product.get("/v1/reward-models", deployment="learns")["data"]]
    assert better["chance"] > worse["chance"] and scored["reward_model"] in listed[: listed.index(found["id"]) + 1]
    same = product.post(f"/v1/reward-models/{found['id']}/score", {"records": [up, down]})
    assert same["data"][0]["chance"] > same["data"][1]["chance"], "a version doesn't learn, but it knows most of it"
    assert product.http.post("/v1/reward-models/rm_none/score", json={"records": [up]}).status_code == 404


def test_it_is_no_reward_before_it_has_earned_that(server: LiveServer) -> None:
    product = Product(server, "early")
    product.thumbs(2)
    found = product.newest(lambda one: one["labels"] + one["report"]["held_out"]["num"] == 8)
    assert not found["earned"] and "fewer than 50 labels" in found["why"]
    refused = product.http.post("/v1/reward-models/early/score", json={"input": "paris", "as_reward": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reward_not_earned")
    assert product.post("/v1/reward-models/early/score", {"input": "paris"})["earned"] is False
    refused = product.http.post("/v1/reward-models/early@1/score", json={"input": "paris"})
    assert refused.status_code == 400 and "have ids" in refused.json()["error"]["message"], "that is a version of the policy"


def test_what_it_is_unsure_of_becomes_a_doubt_until_somebody_says(server: LiveServer) -> None:
    product = Product(server, "unsure", reward={"asked": 1.0, "review_sd": 0.01})
    product.thumbs(2)
    product.newest(lambda one: one["number"] >= 1)
    record = product.ask("0123456789", "unsure-new")
    until = time.monotonic() + 30
    while record not in (there := [one["record_id"] for one in product.get("/v1/doubts", deployment="unsure")["data"]]):
        assert time.monotonic() < until, there
        time.sleep(0.1)
    product.post("/v1/feedback", {"record_id": record, "kind": "boolean", "value": True})
    while record in [one["record_id"] for one in product.get("/v1/doubts", deployment="unsure")["data"]]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_was_deleted_was_never_there(server: LiveServer) -> None:
    """The version after a deletion is, bit for bit, one that is fitted from the labels that are left."""
    product = Product(server, "forgets")
    ids = product.thumbs(4)
    record = product.ask("déjà vu", "forgets-correction")
    product.post("/v1/feedback", {"record_id": record, "kind": "demonstration", "text": "paris"})
    before = product.newest(lambda one: one["labels"] + one["report"]["held_out"]["num"] >= 8)
    product.settled(17)
    product.http.delete(f"/v1/feedback/{ids[3]}").raise_for_status()
    product.http.delete(f"/v1/records/{record}").raise_for_status()
    gone = product.get(f"/v1/reward-models/{before['id']}")
    assert ids[3] not in product.labels() and not gone["has_weights"], "it had learned from it, and goes with it"
    after = product.newest(lambda one: one["cause"] == "deleted" and one["labels"] + one["report"]["held_out"]["num"] == 15)
    db = open_database(f"sqlite:///{server.home / 'everlearn.db'}")
    try:
        left = db.read(lambda conn: reward_models.labels(conn, "default", "forgets"))
        assert {one.feedback_id for one in left} == set(ids) - {ids[3]}
        labels = rewarded.labels_of(left, 100.0, {"human": 1.0, "program": 1.0, "model": 0.5})
        settings = StreamSettings(size=len(labels[0].features))
        made = refit.fit(refit.job("default", after["number"], settings, labels))
        assert db.read(lambda conn: reward_models.weights(conn, "default", after["id"])) == (made.manifest, made.tensors)
    finally:
        db.close()


def harm(server: LiveServer, kills: int, seed: int) -> None:
    """Feedback comes while the server is killed; then every label is there once."""
    product, rng = Product(server, "harmed"), random.Random(seed)
    ids: list[str] = []
    for number in range(kills):
        ids += product.thumbs(1, first=number)
        time.sleep(rng.uniform(0.0, 1.0))
        server.kill()
        server.restart()
    ids += product.thumbs(2, first=kills)
    product.settled(len(ids))
    assert product.labels() == sorted(ids)
    found = product.newest(lambda one: one["labels"] + one["report"]["held_out"]["num"] >= len(ids) // 2)
    assert found["has_weights"]


@pytest.mark.slow
def test_labels_are_counted_once_whatever_ends_the_server(new_server: Any) -> None:
    faults = "reward.labels.committed:1:kill,reward.labels.after:3:kill,reward.version.committed:1:kill"
    live = new_server()
    live.environment["EVERLEARN_FAULT"] = faults
    live.kill()
    live.restart()
    over = threading.Event()

    def revive() -> None:
        while not over.wait(0.1):
            if live.process.poll() is not None:
                live.restart()

    product = Product(live, "faulty")
    keeper = threading.Thread(target=revive)
    keeper.start()
    try:
        ids: list[str] = []
        number = 0
        fired = live.home / "faults.fired"
        while len(ids) < 16 or (len(list(fired.glob("*"))) < 3 and len(ids) < 80):  # how many labels one transaction takes, timing decides
            number += 1
            try:
                ids += product.thumbs(1, first=number)
            except httpx.HTTPError:
                time.sleep(0.2)
        product.settled(len(ids))
        found = product_newest(product, len(ids))
    finally:
        over.set()
        keeper.join()
    assert len(list(fired.iterdir())) == 3
    assert found["labels"] + found["report"]["held_out"]["num"] >= len(ids) // 2
    db = open_database(f"sqlite:///{live.home / 'everlearn.db'}")
    try:
        kept = db.read(lambda conn: reward_models.labels(conn, "default", "faulty"))
        numbers = [one.number for one in db.read(lambda conn: reward_models.list_versions(conn, "default", deployment="faulty"))]
    finally:
        db.close()
    assert len({one.feedback_id for one in kept}) == len(kept) and set(ids) <= {one.feedback_id for one in kept}
    assert numbers == list(range(len(numbers), 0, -1))


def product_newest(product: Product, least: int) -> dict[str, Any]:
    """As `newest`, of a server that may be away."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            return product.newest(lambda one: 2 * (one["labels"] + one["report"]["held_out"]["num"]) >= least, seconds=5)
        except (httpx.HTTPError, AssertionError):
            time.sleep(0.2)
    raise AssertionError(product.server.log.read_text()[-2000:])


@pytest.mark.slow
def test_labels_outlive_many_kills(new_server: Any) -> None:
    harm(new_server(), kills=20, seed=7)
