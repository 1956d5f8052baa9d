"""The reward models of this server's deployments, kept up by one task beside serving.

    feedback_changes --cursor--> tokens --engine--> features --one transaction--> labels --a process--> version

It costs what is left over: a few prompts of the base model at a time, none while half of the queue is taken, and a fit in a process that
yields to all others. Whatever ends the server, the next one goes on behind the cursor. Between two versions the newest one learns each
label as it comes, in memory (`live`); what is published is always fitted from the labels that are in the store, so what was deleted was
never there.

Of some answers that nobody labelled the newest version says how sure it is; those of which it is too unsure become doubts, which go before
a person.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection

from everlearn.api import rendering
from everlearn.api.serving import GenerationSpec
from everlearn.api.target import Target
from everlearn.api.turns import room_of
from everlearn.config import engine_environ
from everlearn.errors import Conflict, InternalError, InvalidRequest, NotFound, Unavailable
from everlearn.loop import description, rewarded
from everlearn.loop.rewarded import Answered, Wanted
from everlearn.loop.weights import factors
from everlearn.rewards.refit import ENVIRON, Fitted, job
from everlearn.rewards.stream import RewardModel, Scores, StreamSettings
from everlearn.rewards.stream_files import unpack
from everlearn.store import deployments, feedback, records, reward_models, tables
from everlearn.store.deployments import Deployment
from everlearn.store.reward_models import Doubt, RewardVersion, StoredLabel, Stream
from everlearn.types import SamplingParams

if TYPE_CHECKING:
    from everlearn.api.services import Services
    from everlearn.types import BaseModelInfo

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
RETRY_SECONDS = 5.0
PIECE = 16  # changes of feedback that are taken at once
AT_ONCE = 2  # prompts in the engine
FIRST_LABELS = 8  # of the first version
ASKED_AT_ONCE, ASKED_BEHIND = 8, 64  # answers without labels: in one look, and of a longer backlog the newest
FEATURE_SECONDS = 60.0
FIT_SECONDS = 1800.0
FITS_AT_ONCE = 2  # processes

Key = tuple[str, str]  # tenant and deployment


class Live(msgspec.Struct):
    """The newest version of a deployment, and in `model` the same with all labels up to the change `cursor`. `changed`: the stream's when
    it was made; a deletion makes that grow."""

    model_id: str
    model: RewardModel
    cursor: int
    counts: Counter[Key]
    changed: int


class Rewarding:
    """Owns the tasks and the living models; the event loop's alone."""

    def __init__(self, svc: Services):
        self.svc = svc
        self.live: dict[Key, Live] = {}
        self.lock = asyncio.Lock()  # held while a living model learns or scores
        self._task: asyncio.Task[None] | None = None
        self._fits: dict[Key, asyncio.Task[None]] = {}
        self._pauses: dict[Key, float] = {}  # of those that failed: until when, by the monotonic clock
        self._seen: tuple[int, ...] = ()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        fits = list(self._fits.values())
        for one in fits:
            one.cancel()
        await asyncio.gather(*fits, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self.svc.settings.feedback.reward_models and self._room():
                try:
                    await self._look()
                except Exception as error:  # what fails once is tried again; the server goes on
                    log.warning("the reward models wait: %s", error)
                    await asyncio.sleep(RETRY_SECONDS)

    def _room(self) -> bool:
        """Whether serving leaves some."""
        room = self.svc.serving.sequences
        return self.svc.engine.up and not self.svc.dispatcher.draining and 2 * room.total <= room.limit

    async def _look(self) -> None:
        found, seen = await self.svc.read(_news)
        if seen == self._seen:
            return
        more = False
        for one in found:
            key = (one.tenant, one.name)
            if key in self._fits or time.monotonic() < self._pauses.get(key, 0.0):
                more = True
                continue
            self._pauses.pop(key, None)
            try:
                more |= await self._look_at(one)
            except Exception as error:  # the others go on
                self._pause(key, error)
                more = True
            if not self._room():
                more = True
                break
        self._seen = () if more else seen

    async def _look_at(self, one: Deployment) -> bool:
        """What is to be done for one deployment; whether there may be more. While a version is fitted its stream rests."""
        asked = description.of(one.description).reward
        if not asked.learn:
            return False
        stream, done = await self._advance(one)
        if not done:
            return True
        if await self._is_due(stream, asked):
            if len(self._fits) < FITS_AT_ONCE:
                self._fits[one.tenant, one.name] = asyncio.create_task(self._fitting(stream, asked))
            return True
        return await self._ask(stream, asked)

    async def _fitting(self, stream: Stream, asked: description.Reward) -> None:
        """The task of one fit."""
        key = (stream.tenant, stream.deployment)
        try:
            await self._refit(stream, asked)
        except Exception as error:
            self._pause(key, error)
        finally:
            del self._fits[key]

    def _pause(self, key: Key, error: Exception) -> None:
        """What fails once is tried again."""
        log.warning("the reward model of %s waits: %s", key[1], error)
        self._pauses[key] = time.monotonic() + RETRY_SECONDS

    # -- labels ------------------------------------------------------------------------------------------------------------

    async def _advance(self, one: Deployment) -> tuple[Stream, bool]:
        """Takes the feedback that came since the last look, while serving leaves room; the stream then, and whether that was all."""
        svc = self.svc
        stream = await svc.read(lambda conn: reward_models.stream(conn, one.tenant, one.name))
        if stream is None:
            stream = await svc.write(lambda conn: reward_models.open_stream(conn, one.tenant, one.name, one.base_model))
        while self._room():
            further = await self._piece(stream)
            if further is None:
                return stream, True
            stream = further
            await self._learn(stream)
        return stream, False

    async def _piece(self, stream: Stream) -> Stream | None:
        """The stream behind the next changes; None where there are none."""
        svc, implicit = self.svc, self.svc.settings.feedback.implicit

        def read(conn: Connection) -> tuple[int, list[Wanted], list[str]]:
            changes = feedback.changes_after(conn, stream.tenant, stream.cursor, PIECE)
            return (changes[-1].id if changes else 0, *rewarded.wanted(conn, stream, changes, implicit))

        upto, came, went = await svc.read(read)
        if not upto:
            return None
        base = svc.catalog.resolve(stream.base_model)
        stored = [label for wanted in came if (label := await self._stored(base, stream.tenant, wanted)) is not None]
        return await svc.write(lambda conn: reward_models.take(conn, stream, upto, stored, went))

    async def _stored(self, base: BaseModelInfo, tenant: str, wanted: Wanted) -> StoredLabel | None:
        """None, and said, where a text is too long for the model by now."""
        other = wanted.other
        if wanted.corrected is not None:
            chat = await self.svc.chat_models.get(base)
            end = chat.eos_id if chat.eos_id is not None else next(iter(base.eos_token_ids), None)
            said = await rendering.encode(chat, wanted.corrected)
            other = [*wanted.prompt, *said, *([] if end is None else [end])]
        try:
            rows_ND = await self.features(base, tenant, [wanted.ids, *([] if other is None else [other])])
        except InvalidRequest as error:
            log.info("feedback %s is no label: %s", wanted.said.feedback_id, error.message)
            return None
        first, *rest = [row_D.astype("<f4").tobytes() for row_D in rows_ND]
        return wanted.stored(first, rest[0] if rest else None)

    async def features(self, base: BaseModelInfo, tenant: str, inputs: Sequence[list[int]]) -> np.ndarray:
        """float32 [N, D] of N lists of token ids: mean-pooled hidden states of the base model, as /v1/embeddings gives them. Raises
        InvalidRequest for what the model can't read, Unavailable where the engine is away."""
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(ids: list[int]) -> np.ndarray:
            params = SamplingParams(max_tokens=0, seed=0, temperature=0.0)
            spec = GenerationSpec(tenant, Target(base.name, base), ids, params, pooling="mean", deadline=FEATURE_SECONDS)
            async with limit:
                result = await (await self.svc.serving.generate(spec)).result()
            if result.pooled is None:
                raise Unavailable("the engine had no time for features; they are asked for again")
            return np.asarray(result.pooled.numpy())

        room = room_of(self.svc, base)
        for ids in inputs:
            if not 1 <= len(ids) <= room or not 0 <= min(ids) <= max(ids) < base.vocab_size:
                raise InvalidRequest(f"an input has {len(ids)} tokens; {base.name} reads 1 to {room} of its own vocabulary", param="input")
        return np.array(await asyncio.gather(*map(one, inputs)))

    # -- models ------------------------------------------------------------------------------------------------------------

    async def _learn(self, stream: Stream) -> None:
        """The living model learns what arrived, one label at a time. What it knows in other words already is for the next version: a
        label can't be taken out of it."""
        key, settings = (stream.tenant, stream.deployment), self.svc.settings.feedback
        live = self.live.get(key)
        if live is None:
            return
        async with self.lock:
            behind = live.cursor
            if behind >= stream.cursor:
                return

            def read(conn: Connection) -> list[StoredLabel]:
                return reward_models.unheard(conn, *key, reward_models.labels(conn, *key, behind), behind)

            fresh = await self.svc.read(read)

            def learn() -> None:
                for label in rewarded.later(fresh, live.counts, settings.source_cap, factors(settings)):
                    live.model.add(label)

            await asyncio.to_thread(learn)
            live.cursor = max([stream.cursor, *(one.arrived for one in fresh)])

    async def _is_due(self, stream: Stream, asked: description.Reward) -> bool:
        """Whether it is time for a new version: after so many labels, while there are few whenever they doubled, and after each
        deletion."""
        total = await self.svc.read(lambda conn: reward_models.num_labels(conn, stream.tenant, stream.deployment))
        often = stream.changed >= min(asked.refit_every, max(FIRST_LABELS, total // 2))
        return stream.forgets or (often and total >= FIRST_LABELS)

    async def _refit(self, stream: Stream, asked: description.Reward) -> None:
        """A new version of all labels."""
        key = (stream.tenant, stream.deployment)
        self.live.pop(key, None)  # it may know what was deleted
        stored = await self.svc.read(lambda conn: reward_models.labels(conn, *key))
        newest = await self.svc.read(lambda conn: reward_models.latest(conn, *key))
        if not stored:
            await self.svc.write(lambda conn: reward_models.emptied(conn, stream))
            return
        settings, number = self.svc.settings.feedback, newest.number + 1 if newest else 1
        size = len(stored[0].features) // 4
        wished = StreamSettings(size=size, refit_every=asked.refit_every, review_sd=asked.review_sd)

        def packed() -> tuple[bytes, str]:  # seconds of 10,000 labels
            labels = rewarded.labels_of(stored, settings.source_cap, factors(settings))
            return job(stream.tenant, number, wished, labels), reward_models.hash_of(stored)

        began = time.monotonic()
        sent, labels_hash = await asyncio.to_thread(packed)
        made = await fitted(sent)
        seconds = round(time.monotonic() - began, 3)
        report = msgspec.json.decode(made.manifest)["report"]
        published = await self.svc.write(
            lambda conn: reward_models.publish(conn, stream, stored, labels_hash, report, made.manifest, made.tensors, seconds)
        )
        if published is not None:
            log.info("reward model %s of %s: version %d, %s", published.model_id, stream.deployment, published.number, published.why)

    async def model(self, tenant: str, deployment: str) -> Live:
        """The newest version with all labels that came since: one that learned what was deleted since is made again. Raises NotFound
        where there is none."""
        key = (tenant, deployment)
        known = self.live.get(key)

        def read(conn: Connection) -> tuple[RewardVersion, Stream, tuple[bytes, bytes] | None]:
            newest, stream = reward_models.latest(conn, *key), reward_models.stream(conn, *key)
            if newest is None or stream is None or not newest.has_weights:
                told = f"it has {reward_models.num_labels(conn, *key)} labels, and the first version comes with {FIRST_LABELS}"
                raise NotFound(f"deployment {deployment[:100]!r} has no reward model now: {told}", param="model_id")
            if known is not None and known.model_id == newest.model_id and (not stream.forgets or known.changed == stream.changed):
                return newest, stream, None
            return newest, stream, reward_models.weights(conn, tenant, newest.model_id)

        newest, stream, packed = await self.svc.read(read)
        if packed is None:
            assert known is not None
            return known
        model = await asyncio.to_thread(unpack, *packed, tenant, newest.model_id)
        before = await self.svc.read(lambda conn: reward_models.labels(conn, *key))
        counts = Counter((one.source, one.source_id) for one in before if one.arrived <= newest.cursor)
        made = self.live[key] = Live(newest.model_id, model, newest.cursor, counts, stream.changed)
        await self._learn(stream)
        return made

    # -- answers without labels --------------------------------------------------------------------------------------------

    async def _ask(self, stream: Stream, asked: description.Reward) -> bool:
        """Looks at some of the answers that nobody has labelled; whether there may be more."""
        if not asked.asked:
            return False
        key = (stream.tenant, stream.deployment)
        try:
            live = await self.model(*key)
        except NotFound:
            return False
        found, last = await self.svc.read(lambda conn: _unlabelled(conn, stream, asked.asked))
        if not last:
            return False
        base = self.svc.catalog.resolve(stream.base_model)
        doubts = []
        if found:
            features_ND = await self.features(base, stream.tenant, [one.ids for one in found])
            async with self.lock:
                scores: Scores = await asyncio.to_thread(live.model.score, features_ND)
            now, rows = time.time(), zip(scores.chance_N.tolist(), scores.chance_sd_N.tolist(), scores.disagreement_N.tolist(), strict=True)
            doubts = [
                Doubt(one.record_id, one.choice, *key, live.model_id, chance, chance_sd, disagreement, now)
                for one, (chance, chance_sd, disagreement), unsure in zip(found, rows, scores.review_N, strict=True)
                if unsure
            ]
        await self.svc.write(lambda conn: reward_models.doubt(conn, stream.tenant, stream.deployment, last, doubts))
        return True


def _news(conn: Connection) -> tuple[list[Deployment], tuple[int, ...]]:
    """All deployments, and what is different when there is something to do: changes of feedback, records, deployments."""
    rows = tables.deployments
    found = [Deployment(**row._mapping) for row in conn.execute(sa.select(rows).order_by(rows.c.tenant, rows.c.name))]
    if not found:
        return [], (0,)
    last = int(conn.execute(sa.select(sa.func.max(tables.feedback_changes.c.id))).scalar() or 0)
    newest = conn.execute(sa.select(sa.func.max(tables.records.c.record_id))).scalar() or ""
    waiting = conn.execute(sa.select(sa.func.sum(tables.reward_streams.c.changed))).scalar() or 0
    return found, (last, hash(newest), int(waiting), *(one.revision for one in found))


def _unlabelled(conn: Connection, stream: Stream, share: float) -> tuple[list[Answered], str]:
    """Answers of the deployment behind the last that was looked at: of a share of the records, chosen by their ids; and the last of them
    all, "" where there is none."""
    rows, said = tables.records, tables.feedback
    of = (rows.c.tenant == stream.tenant) & rows.c.model.startswith(f"{stream.deployment}@", autoescape=True)
    of &= (rows.c.record_id > stream.asked) & rows.c.route.not_in((records.UNSEEN, records.EMBEDDINGS)) & (rows.c.body_bytes > 0)
    newest = list(conn.execute(sa.select(rows.c.record_id).where(of).order_by(rows.c.record_id.desc()).limit(ASKED_BEHIND)).scalars())
    ids = newest[::-1][:ASKED_AT_ONCE]
    if not ids:
        return [], ""
    labelled = set(conn.execute(sa.select(said.c.record_id).where(said.c.record_id.in_(ids))).scalars())
    chosen = [one for one in ids if one not in labelled and deployments.bucket("doubts", one) < share]
    answers = [found for one in chosen if (found := rewarded.answer(conn, stream.tenant, one, 0)) is not None]
    return answers, ids[-1]


async def fitted(packed: bytes) -> Fitted:
    """What a process makes of a job. Raises InternalError with what it said, Conflict where it takes too long."""
    command = [sys.executable, "-m", "everlearn.rewards.refit"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env={**engine_environ(), **ENVIRON})
    try:
        async with asyncio.timeout(FIT_SECONDS):
            out, said = await process.communicate(packed)
    except TimeoutError:
        raise Conflict(f"a fit took longer than {FIT_SECONDS:g} s; give the deployment's reward.refit_every more labels") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise InternalError(f"a fit ended with {process.returncode}: {said.decode(errors='replace')[-500:]}")
    return msgspec.msgpack.decode(out, type=Fitted)
