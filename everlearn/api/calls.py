"""One request of a client while it is answered: its share of the key's limits, its generations, and the records that stay of them.

The same for every dialect. A `Call` is started, then read (streamed or whole), and ended whatever happened: then the engine holds
nothing of it, and the key's share is settled. What was said is on its way into the store before the client has the last of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from fastapi import Request

from everlearn.api.auth import Caller
from everlearn.api.limiter import Lease
from everlearn.api.replies import Reply, Step
from everlearn.api.routing import EPISODE
from everlearn.api.services import Services
from everlearn.api.serving import Generation
from everlearn.api.sse import Watch
from everlearn.api.target import Target
from everlearn.api.turns import Opened
from everlearn.errors import Unavailable
from everlearn.render.reasoning import opened_by
from everlearn.store import records
from everlearn.store.placing import check_id
from everlearn.store.records import Record, RecordedChoice

BEGIN_SECONDS = 10.0  # how long the headers wait for the first token: until then an error is still a status


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of the request. `params` is only called if content is kept."""

    route: str
    messages: Any
    params: Callable[[], Any]
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool = True
    store_asked: bool = False  # the client said store: true


class Exchange:
    """One prompt of a call: its generation, a reply for each sequence, and the record's id. `keep` is awaited when all is said, and before
    the last of it can leave."""

    def __init__(self, opened: Opened, generation: Generation, keep: Callable[[Exchange], Awaitable[None]]):
        self.opened, self.generation, self._keep = opened, generation, keep
        self.replies: list[Reply] = opened.replies()
        self.record_id = records.new_id()

    @property
    def prompt_tokens(self) -> int:
        return len(self.opened.spec.prompt)

    @property
    def completion_tokens(self) -> int:
        return sum(len(reply.ids) for reply in self.replies)

    @property
    def cached_tokens(self) -> int:
        value = self.generation.value
        return self.generation.cached if value is None else value.prompt_cache_hit_tokens

    async def steps(self) -> AsyncIterator[list[tuple[int, Step]]]:
        """What is said, as it is drawn: the index of a sequence and its step, all that has come at once."""
        replies, generation = self.replies, self.generation
        async for parts in generation:
            steps = [(part.index, replies[part.index].feed(part)) for part in parts]
            if over := all(reply.finish for reply in replies):
                await self._keep(self)
            yield steps
            if over and len(generation.finished) < len(replies):  # we have heard enough, and the engine would go on
                generation.enough()
                return
        await self._keep(self)

    async def whole(self) -> list[Step]:
        """All of it. Raises Unavailable if its time was over before a token was drawn."""
        result = await self.generation.result()
        thinks = self.opened.chat.format.thinks or opened_by(self.opened.text)
        steps = [reply.take(i, result.sequences[i], thinks) for i, reply in enumerate(self.replies)]
        if self.opened.spec.params.max_tokens and not any(reply.ids for reply in self.replies) and steps[0].finish == "deadline":
            raise Unavailable(f"its {self.opened.spec.deadline:g} s were over before its turn came; try again later", param="deadline")
        await self._keep(self)
        return steps


class Call:
    """See the module. `start`, then the exchanges, then `end`."""

    def __init__(self, svc: Services, caller: Caller, target: Target, asked: Asked):
        self.svc, self.caller, self.target, self.asked = svc, caller, target, asked
        self.created_at = time.time()
        self.exchanges: list[Exchange] = []
        self.episode_id: str | None = None  # the one that the client named, or of the memory that it named
        self.remember: Callable[[Exchange], Awaitable[None]] | None = None  # awaited with each exchange once all of it is said
        self.memory: dict[str, Any] | None = None  # what the answer tells of the memory that the conversation is in
        self._started = time.perf_counter()
        self._lease: Lease | None = None
        self._watch: Watch | None = None
        self._recorded: set[str] = set()
        self._ended = False

    @property
    def keeps_content(self) -> bool:
        return self.caller.content and self.asked.store

    @property
    def record_ids(self) -> list[str]:
        return [exchange.record_id for exchange in self.exchanges]

    @property
    def headers(self) -> dict[str, str]:
        assert self._lease is not None
        return {
            "x-everlearn-version": self.target.name,
            "x-everlearn-record": ",".join(self.record_ids),
            **({EPISODE: self.episode_id} if self.episode_id else {}),
            **self._lease.headers,
        }

    async def start(self, request: Request, opened: list[Opened]) -> None:
        """Sends everything to the engine. Raises InvalidRequest (the episode's id), Forbidden, Overloaded (a queue or the key's limits),
        Unavailable."""
        if (named := request.headers.get(EPISODE)) is not None:
            self.episode_id = check_id(named)
        self._lease = self.svc.limiter.admit(self.caller, self.target.name, sum(one.most_tokens for one in opened))
        try:
            for one in opened:
                self.exchanges.append(Exchange(one, await self.svc.serving.generate(one.spec), self.keep))
        except BaseException:
            self._give_up()
            self._lease.spent(0)
            self._lease.release()
            raise
        self._watch = Watch(request, self._give_up)

    async def begun(self) -> None:
        """Returns when the answer may begin: something was drawn, or the client has waited long enough for its headers."""
        try:
            await self.exchanges[0].generation.begun(BEGIN_SECONDS)
        except BaseException:
            self.end()
            raise

    async def whole(self) -> list[list[Step]]:
        """The steps of every exchange. The call is ended, whatever happens."""
        try:
            return await asyncio.gather(*(exchange.whole() for exchange in self.exchanges))
        finally:
            self.end()

    async def unseen(self, opened: Opened) -> None:
        """Answers for the record alone: no client waits, and no share of a key is used (everlearn/api/shadow.py)."""
        exchange = Exchange(opened, await self.svc.serving.generate(opened.spec), self.keep)
        self.exchanges.append(exchange)
        await exchange.whole()

    def end(self) -> None:
        """Frees what is still held, settles the share, hands over the records of what was cut off. Only the first time counts."""
        if self._ended or self._lease is None:
            return
        self._ended = True
        if self._watch is not None:
            self._watch.stop()
        self._give_up()
        self._lease.spent(sum(exchange.prompt_tokens + exchange.completion_tokens for exchange in self.exchanges))
        self._lease.release()
        if self.exchanges and self.exchanges[0].record_id in self._recorded:
            self.svc.shadows.offer(self)
        for exchange in self.exchanges:
            if exchange.completion_tokens or exchange.generation.value is not None:
                self._hand_over(exchange)

    async def keep(self, exchange: Exchange) -> None:
        """All of it is said: from here on its record, and what a memory has of it, outlive this process."""
        if self.remember is not None:
            await self.remember(exchange)
        self._hand_over(exchange)
        await self.svc.records.safe(exchange.record_id)

    def _hand_over(self, exchange: Exchange) -> None:
        if exchange.record_id not in self._recorded:
            self._recorded.add(exchange.record_id)
            self.svc.records.add(self._record(exchange, time.perf_counter() - self._started))

    def _give_up(self) -> None:
        for exchange in self.exchanges:
            exchange.generation.cancel()

    def _record(self, exchange: Exchange, seconds: float) -> Record:
        generation, target, asked, keeps = exchange.generation, self.target, self.asked, self.keeps_content
        first = generation.first_token - generation.created if generation.first_token else None
        return Record(
            record_id=exchange.record_id,
            tenant=self.caller.tenant,
            key_id=self.caller.key_id,
            route=asked.route,
            model=target.name,
            base_model=target.base.name,
            version=target.version,
            prompt=records.int32(exchange.opened.spec.prompt),
            choices=[
                RecordedChoice(records.int32(reply.ids), records.float32(reply.logprobs), reply.finish or "cancelled")
                for reply in exchange.replies
            ],
            messages=asked.messages if keeps else None,
            answer=[reply.message() for reply in exchange.replies] if keeps else None,
            params=asked.params() if keeps else None,
            user=asked.user,
            metadata=asked.metadata,
            cached_tokens=exchange.cached_tokens,
            first_token_seconds=first,
            seconds=seconds,
            content=keeps,
            episode_id=self.episode_id,
            created_at=self.created_at,
        )
