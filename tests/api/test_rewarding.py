"""The task that keeps reward models up: what one deployment's can't do stops no other, and the living model knows nothing deleted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from everlearn.api import rewarding
from everlearn.api.reward_models import find, model_of
from everlearn.api.rewarding import Rewarding
from everlearn.config import Settings
from everlearn.errors import Unavailable
from everlearn.store import deployments, feedback, reward_models
from everlearn.store.db import Database, open_database
from everlearn.store.feedback import Feedback
from tests.store.acts import do
from tests.store.test_records import record, write

SIZE = 4


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = open_database(f"sqlite:///{tmp_path / 'everlearn.db'}")
    yield made
    made.close()


class Services:
    """The store, settings, and a queue of which `taken` of 8 are in use."""

    def __init__(self, db: Database):
        self.db, self.settings = db, Settings()
        self.catalog = SimpleNamespace(resolve=lambda name: None)
        self.engine, self.dispatcher = SimpleNamespace(up=True), SimpleNamespace(draining=False)
        self.serving = SimpleNamespace(sequences=SimpleNamespace(total=0, limit=8))

    async def read(self, fn: Any) -> Any:
        return await asyncio.to_thread(self.db.read, fn)

    async def write(self, fn: Any) -> Any:
        return await asyncio.wrap_future(self.db.write(fn))


class Watched(Rewarding):
    """Without an engine: features tell prompts apart, and come to nothing for the tenants of `broken`."""

    broken: Sequence[str] = ()
    takes = 0  # of the queue, with each answer

    async def features(self, base: Any, tenant: str, inputs: Sequence[list[int]]) -> np.ndarray:
        if tenant in self.broken:
            raise Unavailable("no features")
        self.svc.serving.sequences.total += self.takes
        return np.array([[len(ids), ids[0], ids[-1], 1] for ids in inputs], dtype=np.float32)


def opened(db: Database, tenant: str) -> None:
    do(db, lambda conn: deployments.create(conn, tenant, "desk", "tiny", {"base": "tiny"}, deployments.Act("me")))


def say(db: Database, tenant: str, number: int, value: float) -> str:
    asked = [{"role": "user", "content": f"{number}?"}]
    made = record(number, tenant=tenant, model="desk@0", messages=asked, episode_id=f"{tenant}{number}")
    write(db, made)
    given = Feedback(tenant=tenant, record_id=made.record_id, kind="boolean", value=value)
    return do(db, lambda conn: feedback.add(conn, given)).feedback_id


def known(db: Database, tenant: str) -> list[str]:
    return [one.feedback_id for one in db.read(lambda conn: reward_models.labels(conn, tenant, "desk"))]


def test_what_one_deployment_lacks_or_takes_long_for_stops_no_other(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for tenant in "abc":
        opened(db, tenant)
    for number in range(8):
        say(db, "a", number, number % 2)
        say(db, "b", 100 + number, number % 2)
    monkeypatch.setattr(rewarding, "RETRY_SECONDS", 600.0)
    keeper = Watched(Services(db))  # type: ignore[arg-type]
    keeper.broken = ["a"]

    async def go() -> None:
        await keeper._look()
        assert len(known(db, "b")) == 8 and not known(db, "a")
        assert list(keeper._fits) == [("b", "desk")], "a process fits it"
        said = say(db, "c", 200, 1.0)
        await keeper._look()
        assert known(db, "c") == [said] and keeper._fits, "and another one's labels come meanwhile"
        await asyncio.gather(*keeper._fits.values())
        assert (await keeper.model("b", "desk")).cursor
        keeper.broken = []
        await keeper._look()
        assert not known(db, "a"), "it is tried again after a pause"
        keeper._pauses[("a", "desk")] = time.monotonic()
        await keeper._look()
        assert len(known(db, "a")) == 8
        await keeper.stop()
        assert not keeper._fits

    asyncio.run(go())


def test_it_waits_between_two_pieces_while_serving_needs_the_room(db: Database) -> None:
    opened(db, "a")
    for number in range(rewarding.PIECE + 1):
        say(db, "a", number, 1.0)
    keeper = Watched(Services(db))  # type: ignore[arg-type]
    keeper.takes = 1

    async def go() -> None:
        await keeper._look()
        assert len(known(db, "a")) == rewarding.PIECE and not keeper._fits
        keeper.svc.serving.sequences.total, keeper.takes = 0, 0
        await keeper._look()
        assert len(known(db, "a")) == rewarding.PIECE + 1
        await keeper.stop()

    asyncio.run(go())


def test_the_living_model_knows_nothing_that_was_deleted_and_hears_no_word_twice(db: Database) -> None:
    opened(db, "a")
    for number in range(8):
        say(db, "a", number, number % 2)
    keeper = Watched(Services(db))  # type: ignore[arg-type]
    keeper.svc.rewarding = keeper
    probe_ND = np.array([[3.0, 1.0, 2.0, 1.0]])

    async def go() -> None:
        await keeper._look()
        await asyncio.gather(*keeper._fits.values())
        live = await keeper.model("a", "desk")
        before, first = live.model.score(probe_ND).utility_N[0], known(db, "a")[0]
        num = len(live.model.predictions)
        extra = say(db, "a", 50, 1.0)
        await keeper._look()
        assert (await keeper.model("a", "desk")) is live and len(live.model.predictions) == num + 1
        assert live.model.score(probe_ND).utility_N[0] != before
        do(db, lambda conn: feedback.delete(conn, "a", extra))
        again = await keeper.model("a", "desk")
        assert again.model_id == live.model_id and again.model.score(probe_ND).utility_N[0] == before
        assert await keeper.model("a", "desk") is again, "and is made again once"

        do(db, lambda conn: feedback.edit(conn, "a", first, value=1.0))
        stream, done = await keeper._advance(db.read(lambda conn: deployments.get(conn, "a", "desk")))
        assert done and stream.forgets and len((await keeper.model("a", "desk")).model.predictions) == num
        found = db.read(lambda conn: find(conn, "a", "desk"))
        await keeper._look()
        await asyncio.gather(*keeper._fits.values())
        newer = (await keeper.model("a", "desk")).model_id
        assert newer != found.model_id and (await model_of(keeper.svc, found, living=True))[0] == newer, "a score names what scored"
        assert (await model_of(keeper.svc, found, living=False))[0] == found.model_id
        await keeper.stop()

    asyncio.run(go())
