"""What a model does for a memory behind an answer: it writes anew what the rules have just cut, and says what chunks are worth.

The answer never waits for it. With the answer's end the rules mask, allot and cut, so the window keeps its budget at every moment; the
model's text takes the place of the rule's when it comes, within the same cap. A turn asks for at most MOST refills and MOST weights,
however long the history is. Each is a request of the key that sent the turn, in its limits and in its usage; one that finds no room there
waits a little, since nobody waits for it. Whatever keeps the model from it (it wrote nothing, the queue or the key's share was full, its
adapter is gone, somebody changed the chunk meanwhile) leaves the rule's text standing, and the chunk's history says so. A process that dies
meanwhile leaves it standing too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import Connection

from everlearn.api.auth import Caller
from everlearn.api.chatmodels import ChatModel
from everlearn.api.limiter import Lease
from everlearn.api.services import Services
from everlearn.api.target import Target, resolve
from everlearn.api.turns import Draw, Turn, encode_turn, open_text
from everlearn.errors import EverlearnError, InvalidRequest, NotFound, RateLimited
from everlearn.memory import orders
from everlearn.memory.importance import BY_HAND, Importance, Recency, Surface
from everlearn.memory.plan import Hole, Rewrite
from everlearn.memory.refill import Extract, Forget, Refill
from everlearn.memory.turns import Turns
from everlearn.memory.window import Chunk, Encode, Window, line
from everlearn.store import episodes, memories, usage
from everlearn.store.memories import Memory
from everlearn.types import SampleResult

log = logging.getLogger(__name__)

REFILLS = ("extract", "generate", "forget")
IMPORTANCES = ("head", "recency", "decided", "certain")
BY_MODEL = ("decided", "certain")  # of them, those that ask the policy
MOST = 8  # refills of a turn, and weights
MOST_WAITING = 4  # turns of one memory whose refills are still to be written
PATIENCE = 5.0  # seconds that an order waits for room in its key's limits
KIND = "memory"  # in the usage
SHOWN = 160  # characters of a reason in a chunk's history
BEGINS, ENDS = "<|im_start|>", "<|im_end|>"


class Cut(msgspec.Struct, frozen=True):
    """A chunk that the rules cut: as it was, as it stands, and the tokens that its line may take."""

    before: Chunk
    after: Chunk
    cap: int


class Job(msgspec.Struct, frozen=True):
    """What a turn left for a model. `new`: the numbers of its turns. `memory`: as it was stored with them."""

    caller: Caller
    chat: ChatModel
    memory: Memory
    cuts: tuple[Cut, ...]
    new: tuple[int, ...]
    record_id: str
    episode_id: str


@dataclass
class Policy:
    """Who does one job, and what that used so far. `room` lets no more orders be carried out at once than the key may have requests."""

    svc: Services
    job: Job
    target: Target
    room: asyncio.Semaphore
    used: list[usage.Line] = field(default_factory=list)


class Done(msgspec.Struct, frozen=True):
    """What became of a cut: the text with its tokens, or why there is none. `neighbours`: turns that who wrote it was shown; `beside`: the
    chunk's from now on."""

    cut: Cut
    text: str = ""
    tokens: tuple[int, ...] = ()
    failed: str = ""
    neighbours: frozenset[int] = frozenset()
    beside: tuple[int, ...] = ()


def check(refill: str | None, importance: str | None) -> None:
    """Raises InvalidRequest for what is none."""
    for name, value, known in (("refill", refill, REFILLS), ("importance", importance, IMPORTANCES)):
        if value is not None and value not in known:
            raise InvalidRequest(f"memory.{name} is {value[:60]!r}; it is one of {', '.join(known)}", param=f"memory.{name}")


def rules_of(chat: ChatModel, memory: Memory) -> Turns:
    """What happens at once, without a model. Chunks are spelled as the template spells what people say: special tokens in it are only
    letters."""
    encode = encode_of(chat)
    importance: Importance = Recency() if memory.importance == "recency" else Surface()
    refill: Refill = Forget() if memory.refill == "forget" else Extract(encode, BY_HAND.score)
    return Turns(encode, importance, refill, stays=memory.importance in BY_MODEL)


def encode_of(chat: ChatModel) -> Encode:
    return lambda text: chat.tokenizer.encode(chat.tokenizer.guard(text))


async def policy_of(svc: Services, caller: Caller, memory: Memory) -> Target:
    """Who writes and weighs. Raises NotFound, Forbidden, and InvalidRequest for an adapter of another model."""
    base = svc.catalog.resolve(memory.base_model)
    if not memory.policy:
        return Target(base.name, base)
    found = await resolve(svc, caller, memory.policy)
    svc.limiter.check_model(caller, found.name)
    if found.base.name != base.name:
        raise InvalidRequest(f"policy {found.name} is of {found.base.name}, and the memory of {base.name}", param="memory.policy")
    return found


def cuts_of(changed: Sequence[Rewrite]) -> tuple[Cut, ...]:
    """What one turn's plans cut, each chunk once: from what it was to what it is; those that were forgotten in the end left out."""
    found: dict[tuple[int, ...], Cut | None] = {}
    for change in changed:
        first = found.get(change.before.sources)
        before = change.before if first is None else first.before
        found[change.before.sources] = None if change.after is None else Cut(before, change.after, change.cap)
    return tuple(cut for cut in found.values() if cut is not None)


class Refills:
    """The work of models for memories that is under way; the event loop's alone. Of one memory, a turn's after another's."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._waiting: Counter[tuple[str, str]] = Counter()

    def offer(self, svc: Services, job: Job) -> None:
        """Begins what a turn left to do, if its memory wants a model for it."""
        writes, weighs = job.memory.refill == "generate" and job.cuts, job.memory.importance in BY_MODEL
        if not (writes or weighs) or svc.dispatcher.draining:
            return
        key = (job.memory.tenant, job.memory.memory_id)
        refused = f"{MOST_WAITING} turns before it still wait" if self._waiting[key] >= MOST_WAITING else ""
        self._waiting[key] += 1
        task = asyncio.get_running_loop().create_task(self._run(svc, job, key, refused))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _run(self, svc: Services, job: Job, key: tuple[str, str], refused: str) -> None:
        try:
            async with self._locks.setdefault(key, asyncio.Lock()):
                await _work(svc, job, refused)
        except EverlearnError as error:  # the store is away; the rules' texts stand, as after a death
            log.warning("memory %s: nothing was written behind the answer: %s", key[1], error.message)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key], self._locks[key]


async def _work(svc: Services, job: Job, refused: str) -> None:
    memory = job.memory
    cuts = job.cuts if memory.refill == "generate" else ()
    who, reason = memory.policy or memory.base_model, refused
    levels: dict[tuple[int, ...], float | str] = {}
    done: list[Done] = []
    used: list[usage.Line] = []
    window = window_of(await svc.read(lambda conn: memories.get(conn, memory.tenant, memory.memory_id)))
    try:
        target = await policy_of(svc, job.caller, memory)
        who = target.name
    except EverlearnError as error:
        reason = reason or error.message
    if reason:
        done = [Done(cut, failed=reason) for cut in cuts]
    else:
        over = [Done(cut, failed=f"a turn asks for {MOST} refills at most") for cut in cuts[MOST:]]
        at_once = (job.caller.limits.concurrency or 2 * MOST) // 2  # the other half is for whoever waits for an answer
        policy = Policy(svc, job, target, asyncio.Semaphore(max(1, min(MOST, at_once))), used)
        done = [*await asyncio.gather(*(_refilled(policy, window, cut) for cut in cuts[:MOST])), *over]
        if memory.importance in BY_MODEL:
            places = weighed(window, job.new)
            found = await asyncio.gather(*(_level(policy, window, place) for place in places))
            levels = {window.chunks[place].sources: level for place, level in zip(places, found, strict=True)}
    await svc.write(lambda conn: _settle(conn, job, who, done, levels, used))


async def _refilled(policy: Policy, window: Window, cut: Cut) -> Done:
    place = next((i for i, chunk in enumerate(window.chunks) if chunk.sources == cut.after.sources), None)
    if place is None:
        return Done(cut, failed="the chunk had left the window")
    encode = encode_of(policy.job.chat)
    cap = min(cut.cap, len(cut.after.tokens) + window.room - window.size)
    chunks = [*window.chunks[:place], cut.before, *window.chunks[place + 1 :]]
    try:
        said = await _say(policy, orders.shorter(chunks, Hole(place, cap)), orders.begun(cut.before), cap)
    except EverlearnError as error:
        return Done(cut, failed=error.message)
    text = await asyncio.to_thread(orders.refilled, said.replace("\0", ""), cut.before, cap, encode)
    if not text.strip():
        return Done(cut, failed="it wrote nothing that fits")
    tokens = tuple(encode(line(cut.before.role, text)))
    return Done(cut, text, tokens, "", frozenset(orders.neighbours(chunks, place)), orders.beside(chunks, place))


async def _level(policy: Policy, window: Window, place: int) -> float | str:
    """What the policy finds a chunk worth, or why it didn't say."""
    order = orders.keeping(window.chunks, place)
    try:
        if policy.job.memory.importance == "certain":
            level = _sure(policy, await _asked(policy, order, "", 1, orders.ALTERNATIVES))
        else:
            level = orders.level_of(await _say(policy, order, "", orders.LEVEL_TOKENS))
    except EverlearnError as error:
        return error.message
    return orders.UNDECIDED if level is None else level


def _sure(policy: Policy, result: SampleResult) -> float | None:
    likely, tokenizer = result.sequences[0].topk, policy.job.chat.tokenizer
    if likely is None or not likely.token_ids.shape[0]:
        return None
    first = 4 * likely.token_ids.shape[1]  # bytes of the first token's row
    ids, logprobs = array("i", likely.token_ids.data[:first]), array("f", likely.logprobs.data[:first])
    keep, drop = (tokenizer.encode(word)[0] for word in (orders.KEEP, orders.DROP))
    return orders.sure_of(dict(zip(ids, logprobs, strict=True)), keep, drop)


async def _say(policy: Policy, order: str, begun: str, most: int) -> str:
    """What the policy says, greedily."""
    result = await _asked(policy, order, begun, most)
    return policy.job.chat.tokenizer.decode(array("i", result.sequences[0].tokens.data).tolist(), skip_special=True)


async def _asked(policy: Policy, order: str, begun: str, most: int, alternatives: int | None = None) -> SampleResult:
    """The policy's greedy answer, with the log-probabilities of so many `alternatives` of each token. Where the model speaks ChatML the
    order is spelled as the library and its training spell it (everlearn/rl/prompts.py), else as the model's template does."""
    svc, chat, tokenizer = policy.svc, policy.job.chat, policy.job.chat.tokenizer
    ends = tokenizer.id_of(ENDS)
    if ends is not None and tokenizer.id_of(BEGINS) is not None:
        prompt = tokenizer.encode(f"{BEGINS}user\n{tokenizer.guard(order)}{ENDS}\n{BEGINS}assistant\n{begun}")
    else:
        said = [{"role": "user", "content": order}, *([{"role": "assistant", "content": begun}] if begun else [])]
        _, prompt, _ = await encode_turn(svc, chat, Turn(messages=said, continue_final=bool(begun)))
    stops = [] if ends is None else [ends]
    draw = Draw(max_tokens=most, temperature=0.0, seed=0, stop_tokens=stops, top_logprobs=alternatives)
    opened = await open_text(svc, policy.job.memory.tenant, policy.target, prompt, draw, grammar=None, stream=False)
    async with policy.room:
        with await _admitted(policy, opened.most_tokens) as lease:
            lease.spent(0)  # unless the engine takes it
            began = time.time()
            generation = await svc.serving.generate(opened.spec)
            lease.spent(len(prompt))
            result = await generation.result()
            line = _used(policy, len(prompt), result, began)
            policy.used.append(line)
            lease.spent(line.tokens_in + line.tokens_out)
    return result


async def _admitted(policy: Policy, tokens: int) -> Lease:
    """The order's share of its key's limits. One that would have to wait longer than PATIENCE raises RateLimited."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return policy.svc.limiter.admit(policy.job.caller, policy.target.name, tokens)
        except RateLimited as error:
            pause = float(error.retry_after or 1)
            if time.monotonic() + pause > until:
                raise
            await asyncio.sleep(pause)


def _used(policy: Policy, prompt: int, result: SampleResult, began: float) -> usage.Line:
    caller, drawn = policy.job.caller, sum(sequence.tokens.shape[0] for sequence in result.sequences)
    return usage.Line(
        tenant=caller.tenant, day=usage.day_of(began), key_id=caller.key_id or "", subject=policy.target.name, kind=KIND, requests=1,
        tokens_in=prompt, tokens_cached=result.prompt_cache_hit_tokens, tokens_out=drawn, seconds=time.time() - began,
    )  # fmt: skip


def weighed(window: Window, new: Sequence[int]) -> list[int]:
    """Places of the chunks that a turn asks about: its own first, then others in turn, MOST in all."""
    num = len(window.chunks)
    free = [place for place, chunk in enumerate(window.chunks) if not chunk.pinned]
    own = [place for place in free if window.chunks[place].born in new]
    rest = [(window.turn * MOST + step) % num for step in range(num)]
    return [*own, *(place for place in rest if place in free and place not in own)][:MOST]


def _settle(
    conn: Connection, job: Job, who: str, done: Sequence[Done], levels: dict[tuple[int, ...], float | str], used: Sequence[usage.Line] = ()
) -> None:
    """The texts and weights as part of the memory as it is now, and what they used. What was forgotten meanwhile leaves nothing, but that
    it was paid for."""
    usage.add(conn, used)
    try:
        memory = memories.get(conn, job.memory.tenant, job.memory.memory_id)
    except NotFound:
        return
    window = window_of(memory)
    rewrites: list[memories.Rewrite] = []
    for one in done:
        if not _all_there(conn, memory, window, one.neighbours):
            one = msgspec.structs.replace(one, failed="what stood beside it was forgotten meanwhile")
        window, said = merged(window, one, who)
        rewrites += said
    chunks = list(window.chunks)
    for place, chunk in enumerate(chunks):
        level = levels.get(chunk.sources)
        if isinstance(level, float):
            chunks[place] = msgspec.structs.replace(chunk, importance=level)
        elif level is not None:
            rewrites.append(_row(window, chunk, chunk.text, f"weighing failed ({who}): {level}"))
    window = msgspec.structs.replace(window, chunks=tuple(chunks))
    packed = msgspec.msgpack.encode(window)
    memories.commit(conn, msgspec.structs.replace(memory, window=packed, tokens=window.size), new_rewrites=rewrites)
    for rewrite in rewrites:
        episodes.note_memory(
            conn, memory.tenant, job.episode_id, job.record_id, memory.memory_id, rewrite.source, rewrite.refill.partition(":")[0]
        )


def _all_there(conn: Connection, memory: Memory, window: Window, turns: frozenset[int]) -> bool:
    """Whether none of these turns has left both the window and the archive."""
    missing = turns - {turn for chunk in window.chunks for turn in chunk.sources}
    return memories.has_turns(conn, memory.tenant, memory.memory_id, missing)


def merged(window: Window, one: Done, who: str) -> tuple[Window, list[memories.Rewrite]]:
    """The window with one cut's text, and its line of the history. No line of a chunk that is gone: it may have been forgotten."""
    place = next((i for i, chunk in enumerate(window.chunks) if chunk.sources == one.cut.after.sources), None)
    if place is None:
        return window, []
    chunk, failed = window.chunks[place], one.failed
    if not failed and (chunk.text != one.cut.after.text or chunk.pinned):
        failed = "the chunk was changed meanwhile"
    if not failed and window.size - len(chunk.tokens) + len(one.tokens) > window.room:
        failed = "the window has no room for it any more"
    if failed:
        return window, [_row(window, chunk, chunk.text, f"generate failed ({who}): {failed}")]
    after = msgspec.structs.replace(chunk, text=one.text, tokens=one.tokens, beside=one.beside)
    chunks = (*window.chunks[:place], after, *window.chunks[place + 1 :])
    return msgspec.structs.replace(window, chunks=chunks), [_row(window, chunk, one.text, f"generate ({who})")]


def _row(window: Window, chunk: Chunk, after: str, refill: str) -> memories.Rewrite:
    return memories.Rewrite(chunk.sources[0], window.turn, chunk.text, after, refill[:SHOWN])


def window_of(memory: Memory) -> Window:
    return msgspec.msgpack.decode(memory.window, type=Window)
