"""Order, idempotence and replay, against a peer that speaks the engine's protocol."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from everlearn import errors
from everlearn.api.dispatch import Done, Waiting
from everlearn.api.quarantine import SUSPECT_BLAME
from everlearn.engine import protocol as p
from everlearn.store import log as request_log
from everlearn.store import runs
from everlearn.store.log import Entry
from everlearn.types import AdamParams

from .conftest import rig


def test_commands_reach_the_engine_in_seq_order(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            for seq in (4, 3, 2):
                await r.forward(model, seq)
            await r.step(model, 5)
            await r.up()  # until then it is the engine that is waited for
            waiting = await r.outcome(f"{model}:2", timeout=1.5)
            assert isinstance(waiting, Waiting) and "waits for request 1" in str(waiting.reason), waiting
            await r.forward(model, 1)
            assert await r.effects(model, 5) == [0, 1, 2, 3, 4, 5]

    asyncio.run(go())


def test_a_repeated_request_has_one_effect_and_another_payload_is_a_conflict(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            entries = await asyncio.gather(*(r.forward(model, 1) for _ in range(5)))
            assert len({entry.request_id for entry in entries}) == 1
            await r.outcome(f"{model}:1")
            await r.forward(model, 1)
            await r.step(model, 2)
            assert await r.effects(model, 2) == [0, 1, 2]
            with pytest.raises(errors.Conflict):
                await r.forward(model, 1, other=1.0)

    asyncio.run(go())


def test_nothing_is_lost_or_doubled_over_many_kills(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model, other = await r.create(0), await r.create(1)
            seq = 0
            for round_ in range(6):
                for _ in range(4):
                    seq += 1
                    await r.forward(model, seq)
                    await r.forward(other, seq)
                seq += 1
                await r.step(model, seq)
                await r.step(other, seq)
                if round_ == 3:
                    await r.outcome(f"{model}:{seq}")
                    r.engine.send(p.TakeSnapshot(model))
                await r.kill()
                await r.up()
            assert await r.effects(model, seq) == list(range(seq + 1))
            assert await r.effects(other, seq) == list(range(seq + 1))

    asyncio.run(go())


def test_a_snapshot_shortens_the_replay(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            for seq in range(1, 8):
                await r.step(model, seq)
            await r.outcome(f"{model}:7")
            r.engine.send(p.TakeSnapshot(model))
            await r.until(lambda: r.dispatcher.feeds[model].snapshot_seq == 7)
            await r.step(model, 8)
            await r.outcome(f"{model}:8")
            await r.kill()
            await r.up()
            pid = r.engine.pid
            await r.step(model, 9)
            assert await r.effects(model, 9) == list(range(10))
            assert [(h["op"], h.get("seq")) for h in r.heard() if h["pid"] == pid] == [
                ("Replay", None),
                ("Restore", None),
                ("OptimStep", 8),
                ("OptimStep", 9),
            ]

    asyncio.run(go())


def test_a_new_server_goes_on_where_the_old_one_died(tmp_path: Path) -> None:
    async def first() -> tuple[str, str, str]:
        async with rig(tmp_path) as r:
            model, idle, sampler = await r.create(0), await r.create(1), await r.sampler()
            await r.step(idle, 1)
            await r.outcome(f"{idle}:1")
            await r.step(model, 1)
            await r.outcome(f"{model}:1")
            await r.forward(model, 2, wish="slow", seconds=2)
            await r.step(model, 3)
            await r.sample(sampler, 0)
            return model, idle, sampler

    async def second(model: str, idle: str, sampler: str) -> None:
        async with rig(tmp_path, session=model.split(":")[0]) as r:
            await r.up()
            assert idle not in r.dispatcher.feeds, "a run without pending work is rebuilt when it is needed"
            assert isinstance(await r.outcome(f"{model}:1"), Done)
            assert isinstance(await r.outcome(f"{sampler}:0"), Done)
            await r.step(idle, 2)
            assert await r.effects(idle, 2) == [0, 1, 2]
            replayed = [h["seq"] for h in r.heard() if h["pid"] == r.engine.pid and h.get("model_id") == model and "seq" in h]
            assert replayed[:2] == [1, 2]

    asyncio.run(second(*asyncio.run(first())))


def test_a_refused_request_uses_up_its_seq(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            error = errors.InvalidRequest("token 9999 is out of range", param="data")
            refusal = {"model_id": model, "request_id": f"{model}:2", "fingerprint": "f", "error": error}
            await r.dispatcher.refuse("a", seq=2, **refusal)
            await r.step(model, 3)
            await r.step(model, 1)
            assert await r.effects(model, 3) == [0, 1, 3]
            assert (await r.failed(f"{model}:2"))["message"] == error.message
            await r.dispatcher.refuse("a", seq=2, **refusal)
            await r.kill()
            await r.up()
            await r.step(model, 4)
            assert await r.effects(model, 4) == [0, 1, 3, 4]

    asyncio.run(go())


def test_the_first_entry_is_the_answer_whatever_is_said_now(tmp_path: Path) -> None:
    """A request that was accepted stays accepted when it comes again and would be refused, and the other way round."""

    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            accepted = await r.step(model, 1)
            refusal = {"model_id": model, "error": errors.NotFound("its checkpoint is gone", param="path")}
            again = await r.dispatcher.refuse("a", seq=1, request_id=f"{model}:1", fingerprint=accepted.fingerprint, **refusal)
            assert again is not None and again.existing and "refused" not in again.meta
            command = p.OptimStep(f"{model}:2", model, 2, AdamParams())
            place = {"seq": 2, "request_id": f"{model}:2", "fingerprint": "f"}
            assert await r.dispatcher.refuse("a", **place, **refusal) is None, "it is the first"
            later = await r.dispatcher.submit("a", command, fingerprint="f", meta={})
            assert later.meta["refused"]["code"] == "not_found"
            assert await r.dispatcher.refuse("a", **place | {"fingerprint": "other"}, **refusal) is None
            await r.step(model, 3)
            assert await r.effects(model, 3) == [0, 1, 3]

    asyncio.run(go())


def test_what_was_accepted_is_never_sent_away(tmp_path: Path) -> None:
    """No queue, no drain and no missing engine concern a request that is in the log."""

    async def go() -> None:
        async with rig(tmp_path, restart_limit=1) as r:
            model, sampler = await r.create(), await r.sampler()
            step, sample = await r.step(model, 1), await r.sample(sampler, 0)
            await r.outcome(step.request_id)
            await r.outcome(sample.request_id)
            r.dispatcher.draining = True
            assert (await r.step(model, 1)).existing or (await r.step(model, 1)).status == "done"
            assert (await r.sample(sampler, 0)).request_id == sample.request_id
            with pytest.raises(errors.Unavailable):
                await r.sample(sampler, 1)
            r.dispatcher.draining = False
            await r.forward(model, 2, wish="die")
            await r.until(lambda: r.engine.state == "failed")
            assert (await r.step(model, 1)).status == "done"
            with pytest.raises(errors.Unavailable):
                await r.step(model, 3)

    asyncio.run(go())


def test_a_request_that_never_comes_is_passed_over(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path, api={"gap_seconds": 0.5}) as r:
            model = await r.create()
            await r.step(model, 3)
            waiting = await r.outcome(f"{model}:3", timeout=0.1)
            assert isinstance(waiting, Waiting)
            await r.forward(model, 1)
            assert await r.effects(model, 3) == [0, 1, 3]
            with pytest.raises(errors.Conflict, match=r"did not come within 0\.5 s"):
                await r.forward(model, 2)
            assert (await r.failed(f"{model}:2"))["code"] == "conflict"
            await r.step(model, 6)
            await r.kill()
            assert await r.effects(model, 6) == [0, 1, 3, 6]
            far = await r.step(model, 10**12)
            assert isinstance(await r.outcome(far.request_id, timeout=1.5), Waiting), "no such gap comes from a client that counts"

    asyncio.run(go())


def test_a_failed_request_has_no_effect_after_a_replay(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            await r.forward(model, 1, wish="fail")
            await r.forward(model, 2, only=True)
            await r.step(model, 3)
            assert (await r.failed(f"{model}:1"))["code"] == "invalid_request"
            assert await r.effects(model, 3) == [0, 3]
            await r.kill()
            await r.up()
            await r.step(model, 4)
            assert await r.effects(model, 4) == [0, 3, 4]

    asyncio.run(go())


def test_the_request_that_kills_the_engine_is_found_and_the_others_go_on(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model, other = await r.create(0), await r.create(1)
            await r.forward(model, 1, wish="die")
            await r.step(model, 2)
            for seq in range(1, 20):
                await r.step(other, seq)
            error = await r.failed(f"{model}:1")
            assert error["code"] == "internal" and "died again and again" in error["message"]
            assert await r.effects(other, 19) == list(range(20))
            assert await r.effects(model, 2) == [0, 2]
            assert r.engine.restarts < 8

    asyncio.run(go())


def test_waiting_clients_are_told_that_the_engine_is_down(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path, restart_limit=1) as r:
            model = await r.create()
            await r.outcome(f"{model}:0")
            await r.forward(model, 1, wish="die")
            await r.until(lambda: r.engine.state == "failed")
            ready, reason = r.dispatcher.readiness()
            assert not ready and "restart_limit" in reason and "exit status 3" in reason
            waiting = await r.outcome(f"{model}:1", timeout=0)
            assert isinstance(waiting, Waiting) and waiting.queue_state == "paused_capacity" and waiting.reason == reason
            with pytest.raises(errors.Unavailable):
                await r.step(model, 2)

    asyncio.run(go())


def test_samples_are_cancelled_limited_and_kept_from_other_tenants(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path, queue_limit=3) as r:
            sampler = await r.sampler()
            await r.sample(sampler, 0, max_tokens=666, num_samples=2)
            with pytest.raises(errors.Overloaded):
                await r.sample(sampler, 1, num_samples=2)
            with pytest.raises(errors.NotFound):
                await r.outcome(f"{sampler}:0", tenant="b")
            with pytest.raises(errors.NotFound):
                await r.dispatcher.samples.cancel("b", f"{sampler}:0")
            assert await r.dispatcher.samples.cancel("a", f"{sampler}:0")
            assert (await r.failed(f"{sampler}:0"))["code"] == "cancelled"
            await r.sample(sampler, 2, num_samples=2)
            assert isinstance(await r.outcome(f"{sampler}:2"), Done)
            assert not await r.dispatcher.samples.cancel("a", f"{sampler}:2")
            found = await r.dispatcher.samples.finished("a", sampler, range(10), 0, 5.0)
            assert [entry.request_id for entry in found] == [f"{sampler}:0", f"{sampler}:2"]

    asyncio.run(go())


def test_pending_samples_are_sent_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            sampler = await r.sampler()
            model = await r.create()
            await r.forward(model, 1, wish="slow", seconds=3)
            await r.sample(sampler, 7)
            await r.kill()
            done = await r.outcome(f"{sampler}:7")
            assert isinstance(done, Done) and done.result.sequences[0].tokens.data[0] == 47

    asyncio.run(go())


def test_a_cursor_of_finished_samples_outlives_the_server(tmp_path: Path) -> None:
    async def first() -> tuple[str, int]:
        async with rig(tmp_path) as r:
            sampler = await r.sampler()
            for seq in (1, 0):
                await r.sample(sampler, seq)
                await r.outcome(f"{sampler}:{seq}")
            found = await r.dispatcher.samples.finished("a", sampler, range(9), 0, 5.0)
            assert [entry.seq for entry in found] == [1, 0]
            return sampler, found[-1].finish_order

    async def second(sampler: str, cursor: int) -> None:
        async with rig(tmp_path, session=sampler.split(":")[0]) as r:
            assert await r.dispatcher.samples.finished("a", sampler, range(9), cursor, 0.1) == []
            waiting = asyncio.create_task(r.dispatcher.samples.finished("a", sampler, range(9), cursor, 20.0))
            await r.sample(sampler, 2)
            assert [entry.seq for entry in await waiting] == [2]

    asyncio.run(second(*asyncio.run(first())))


def test_memory_holds_what_is_unfinished_only(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            for seq in range(1, 30):
                await r.step(model, seq)
            await r.outcome(f"{model}:29")
            assert len(r.dispatcher.ledger) == 0 and r.dispatcher.budget.used == 0
            assert not r.dispatcher.ledger.per_tenant and not r.dispatcher.stats()["commands_in_engine"]
            assert r.db.read(lambda conn: request_log.unfinished(conn, "a")) == 0

    asyncio.run(go())


def test_an_idle_adapter_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    from everlearn.api.housekeeping import Housekeeping
    from everlearn.api.services import Services

    async def go() -> None:
        async with rig(tmp_path, idle_unload_seconds=0.3) as r:
            model = await r.create()
            await r.step(model, 1)
            await r.outcome(f"{model}:1")
            svc = Services(r.settings, r.db, None, r.engine, r.dispatcher, r.dispatcher.metrics, *[None] * 6)  # type: ignore[arg-type]
            housekeeping = Housekeeping(svc)
            housekeeping.start()
            await r.until(lambda: model not in r.dispatcher.feeds)
            await housekeeping.stop()
            await r.until(lambda: [h["op"] for h in r.heard()][-2:] == ["TakeSnapshot", "Unload"])
            await r.step(model, 2)
            assert await r.effects(model, 2) == [0, 1, 2]
            assert [h["op"] for h in r.heard()][-2:] == ["Restore", "OptimStep"]

    asyncio.run(go())


def test_draining_waits_for_what_was_accepted(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            await r.forward(model, 1, wish="slow", seconds=0.5)
            assert await r.dispatcher.drain(10) == 0
            with pytest.raises(errors.Unavailable):
                await r.step(model, 2)
            assert isinstance(await r.outcome(f"{model}:1"), Done)

    asyncio.run(go())


def test_a_replay_that_fails_is_never_trained_upon(tmp_path: Path) -> None:
    """The request succeeded before the crash and fails after it: what comes next must not run on a state that the log doesn't know."""

    async def go() -> None:
        async with rig(tmp_path) as r:
            model, other = await r.create(0), await r.create(1)
            await r.forward(model, 1, wish="replay fails")
            await r.step(model, 2)
            await r.step(other, 1)
            assert await r.effects(model, 2) == [0, 1, 2]
            (tmp_path / "no-replay").touch()
            await r.kill()
            await r.up()
            await r.step(model, 3)
            await r.step(other, 2)
            assert "fails in the replay: as you wished" in (await r.failed(f"{model}:3"))["message"]
            assert await r.effects(other, 2) == [0, 1, 2]
            (tmp_path / "no-replay").unlink()
            await r.step(model, 4)
            assert await r.effects(model, 4) == [0, 1, 2, 4]

    asyncio.run(go())


def test_the_engine_is_told_what_succeeded_before(tmp_path: Path) -> None:
    """So that it stops at the first of these that fails. What has an effect and no answer, or failed before, may fail."""

    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            await r.forward(model, 1)
            await r.forward(model, 2, wish="fail")
            await r.forward(model, 3, only=True)
            await r.step(model, 4)
            assert await r.effects(model, 4) == [0, 1, 4]
            await r.forward(model, 5, wish="slow", seconds=3)
            await r.kill()
            await r.up()
            assert isinstance(await r.outcome(f"{model}:5"), Done)
            replays = [(h["model_id"], h["seqs"]) for h in r.heard() if h["op"] == "Replay"]
            assert replays == [(model, [1, 4])]
            ops = [h["op"] for h in r.heard() if h["pid"] == r.engine.pid]
            assert ops == ["Replay", "Create", "ForwardBackward", "OptimStep", "ForwardBackward"]

    asyncio.run(go())


def test_a_run_that_the_engine_loses_in_a_replay_is_given_up(tmp_path: Path) -> None:
    """The engine stops at a request that is missing or fails, and says so itself: the run's answers say nothing of it then."""

    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            await r.step(model, 1)
            await r.step(model, 2)
            await r.outcome(f"{model}:2")
            await r.kill()
            await r.up()
            (tmp_path / "loses").touch()
            await r.step(model, 3)
            assert "has not come again" in (await r.failed(f"{model}:3"))["message"]
            (tmp_path / "loses").unlink()
            await r.step(model, 4)
            assert await r.effects(model, 4) == [0, 1, 2, 4]

    asyncio.run(go())


def test_a_run_that_the_engine_can_not_restore_fails_and_is_tried_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            await r.step(model, 1)
            await r.outcome(f"{model}:1")
            r.engine.send(p.TakeSnapshot(model))
            await r.until(lambda: r.dispatcher.feeds[model].snapshot_seq == 1)
            (tmp_path / "no-restore").touch()
            await r.kill()
            await r.up()
            await r.step(model, 2)
            assert "can't be restored" in (await r.failed(f"{model}:2"))["message"]
            (tmp_path / "no-restore").unlink()
            await r.step(model, 3)
            assert await r.effects(model, 3) == [0, 1, 3]

    asyncio.run(go())


def test_a_suspect_that_is_cancelled_holds_nobody_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            sampler = await r.sampler()
            await r.up()
            await r.sample(sampler, 0, max_tokens=666)
            r.dispatcher.quarantine.blame[f"{sampler}:1"] = SUSPECT_BLAME
            await r.sample(sampler, 1)
            assert r.dispatcher.quarantine.next == f"{sampler}:1", "it waits until it can run alone"
            await r.sample(sampler, 2)
            assert isinstance(await r.outcome(f"{sampler}:2", timeout=0.3), Waiting)
            assert await r.dispatcher.samples.cancel("a", f"{sampler}:1")
            assert isinstance(await r.outcome(f"{sampler}:2"), Done)

    asyncio.run(go())


def test_a_creation_that_fails_answers_all_that_waited_for_it(tmp_path: Path) -> None:
    """Also a request that waits for its predecessor, which now never comes; and nothing of the run stays in memory."""

    async def go() -> None:
        async with rig(tmp_path) as r:
            (tmp_path / "no-create").touch()
            model = await r.create()
            await r.step(model, 2)
            assert (await r.failed(f"{model}:0"))["message"] == "as you wished"
            assert "could not be created" in (await r.failed(f"{model}:2"))["message"]
            await r.until(lambda: model not in r.dispatcher.feeds and not len(r.dispatcher.ledger))

    asyncio.run(go())


def test_a_request_that_meets_the_end_of_its_run_is_answered(tmp_path: Path) -> None:
    """It was logged, the run was unloaded, and only then did it come to the feed."""

    async def go() -> None:
        async with rig(tmp_path) as r:
            model = await r.create()
            await r.outcome(f"{model}:0")
            await r.dispatcher.forget(model)
            command = p.OptimStep(f"{model}:1", model, 1, AdamParams())
            entry = Entry(f"{model}:1", "a", "optim_step", model, 1, "f", {}, created_at=time.time())
            logged = await r.dispatcher.ledger.write(lambda conn: request_log.append(conn, entry, p.encode(command)))
            await r.dispatcher.ledger.write(lambda conn: runs.unload_run(conn, "a", model))
            r.dispatcher.ledger.track(logged)
            r.dispatcher._feed(logged).add(1, logged.request_id, "optim_step", p.encode(command))
            assert "unloaded" in (await r.failed(f"{model}:1"))["message"]
            assert model not in r.dispatcher.feeds

    asyncio.run(go())
