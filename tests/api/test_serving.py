"""Live requests against a peer in the engine's place: deaths, replays, the end of waiting, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from everlearn.api import serving
from everlearn.api.meters import ServingMetrics
from everlearn.api.serving import GenerationSpec, Serving
from everlearn.api.target import Target
from everlearn.errors import EverlearnError, InternalError, Overloaded, Unavailable
from everlearn.types import BaseModelInfo, SamplingParams
from tests.api.conftest import Rig, rig

BASE = BaseModelInfo("m", "/nowhere", [], "LlamaForCausalLM", 512, 1024, [2])
NEVER, DEADLY = 666, 667  # what the peer makes of max_tokens


def spec(max_tokens: int = 8, **fields: Any) -> GenerationSpec:
    params = SamplingParams(max_tokens=max_tokens, seed=1)
    return GenerationSpec(**{"tenant": "a", "target": Target("m", BASE), "prompt": [1, 2], "params": params, **fields})


@contextlib.asynccontextmanager
async def served(home: Path, **engine: Any) -> AsyncIterator[tuple[Serving, Rig]]:
    async with rig(home, **engine) as made:
        yield Serving(made.settings, made.engine, made.dispatcher, ServingMetrics(CollectorRegistry())), made


async def tokens(generation: serving.Generation) -> list[int]:
    return [token async for parts in generation for part in parts for token in part.tokens]


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_a_whole_answer_and_a_streamed_one(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path) as (live, made):
            await made.up()
            whole = await (await live.generate(spec())).result()
            assert len(whole.sequences) == 1 and live.stats() == {"live_requests": 0, "live_sequences": 0}
            streamed = await live.generate(spec(stream=True))
            assert await tokens(streamed) == list(range(8))
            assert (await streamed.result()).sequences[0].tokens.numpy().tolist() == list(range(8))

    run(work())


def test_what_was_delivered_before_a_death_is_not_delivered_again(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "dies").touch()
        async with served(tmp_path) as (live, made):
            await made.up()
            generation = await live.generate(spec(stream=True))
            assert await tokens(generation) == list(range(8)) and made.engine.generation == 2 and generation.replayed

    run(work())


def test_two_texts_are_never_spliced(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "dies").touch()
        async with served(tmp_path) as (live, made):
            await made.up()
            generation = await live.generate(spec(stream=True))
            await made.until(lambda: made.engine.generation == 1 and not made.engine.up)
            (tmp_path / "differs").touch()
            with pytest.raises(InternalError, match="other tokens"):
                await tokens(generation)

    run(work())


def test_a_request_that_kills_engines_is_given_up_and_its_neighbour_is_answered(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path) as (live, made):
            await made.up()
            deadly = await live.generate(spec(DEADLY))
            neighbour = await live.generate(spec())
            with pytest.raises(InternalError, match="died again and again"):
                await deadly.result()
            assert len((await neighbour.result()).sequences) == 1
            assert live.stats()["live_requests"] == 0 and not made.dispatcher.quarantine.active

    run(work())


def test_who_waits_for_an_engine_is_told_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HELD_SECONDS", 0.4)

    async def work() -> None:
        async with served(tmp_path) as (live, made):
            await made.up()
            waiting = await live.generate(spec(NEVER))
            made.engine._spawn = never  # type: ignore[method-assign]
            await made.kill()
            late = await live.generate(spec())
            for generation in (waiting, late):
                with pytest.raises(Unavailable, match="the engine is away"):
                    await generation.result()

    async def never(endpoint: str) -> Any:
        raise OSError("no more processes")

    run(work())


def test_nothing_is_taken_before_there_was_an_engine_or_after_the_end(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path) as (live, made):
            with pytest.raises(Unavailable, match="isn't ready"):
                await live.generate(spec())
            await made.up()
            running = await live.generate(spec(NEVER))
            made.dispatcher.draining = True
            with pytest.raises(Unavailable, match="shutting down"):
                await live.generate(spec())
            assert await live.drain(0.05) == 1
            with pytest.raises(Unavailable, match="shutting down"):
                await running.result()

    run(work())


def test_a_full_queue_refuses_and_says_for_how_long(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path, max_batch=1) as (live, made):
            await made.up()
            limit = 1 + made.settings.api.live_queue
            big = await live.generate(spec(NEVER, n=limit + 5))
            with pytest.raises(Overloaded) as caught:
                await live.generate(spec())
            assert caught.value.retry_after is not None and 1 <= caught.value.retry_after <= 30
            await (await live.generate(spec(tenant="b"))).result()  # who didn't fill the queue isn't kept out by it
            big.cancel()
            await (await live.generate(spec())).result()

    run(work())


def test_a_cancelled_request_ends_at_once_for_whoever_waits(tmp_path: Path) -> None:
    async def work() -> None:
        async with served(tmp_path) as (live, made):
            await made.up()
            generation = await live.generate(spec(NEVER, stream=True))
            asyncio.get_running_loop().call_later(0.05, generation.cancel)
            with pytest.raises(EverlearnError) as caught:
                await tokens(generation)
            assert caught.value.code == "cancelled" and live.sequences.total == 0
            generation.cancel()  # a second time changes nothing
            await made.until(lambda: any(heard["op"] == "Cancel" for heard in made.heard()))

    run(work())


def test_an_engine_that_forgets_a_request_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "OVERDUE_SECONDS", 0.1)

    async def work() -> None:
        async with served(tmp_path) as (live, made):
            await made.up()
            generation = await live.generate(spec(NEVER, deadline=0.1))
            with pytest.raises(Unavailable, match="deadline"):
                await generation.result()

    run(work())
