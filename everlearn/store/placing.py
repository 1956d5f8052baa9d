"""Which episode a record belongs to: the one that its client named, or the one whose conversation it goes on with.

A conversation is found by digests. Each record whose content is kept leaves one of its messages ("prompt"), and for each of its
choices one of its messages and that answer ("end"). A later request whose messages begin with such an end goes on with that record's
episode. System messages don't count (they may hold the time of day), nor does white space around a text, nor the ids of tool calls. The
digests are salted with the tenant, the key and the request's `user`, so that two users who say the same thing don't meet.

The same question again, by the same user and soon, is a retry, and belongs to the first one's episode. What nothing was found for
begins an episode, and is named after its record. A record that comes twice finds the same place.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import InvalidRequest
from everlearn.store import tables

trails, episodes = tables.trails, tables.episodes
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
MAX_STARTS = 32  # of a long conversation the latest answers are looked for; what goes on with an older one begins anew
RETRY_SECONDS = 600.0
SPLITS = ("train", "heldout")
UNHEARD = ("system", "developer")  # roles whose messages don't tell one conversation from another
# Built once: building a statement costs more than running it.
COLUMNS = [trails.c[name] for name in ("kind", "digest", "record_id", "episode_id", "created_at")]
FOUND = sa.select(*COLUMNS).where(trails.c.digest.in_(sa.bindparam("digests", expanding=True)))
KNOWN = sa.select(episodes.c.tenant, episodes.c.episode_id).where(episodes.c.episode_id.in_(sa.bindparam("ids", expanding=True)))
INSERT_TRAIL, INSERT_EPISODE = trails.insert(), episodes.insert()
TOUCH = (
    episodes.update()
    .where((episodes.c.tenant == sa.bindparam("of")) & (episodes.c.episode_id == sa.bindparam("which")))
    .values(model=sa.bindparam("last_model"), updated_at=sa.bindparam("at"))
)


class Trail(msgspec.Struct, frozen=True):
    """Where a record's conversation stands. `starts`: digests of its messages up to and with each earlier answer, and how many messages
    these are, the longest first."""

    prompt: str = ""
    ends: list[str] = []
    starts: list[tuple[str, int]] = []


class Place(msgspec.Struct, frozen=True):
    """`episode_id` "": in none. `parent_id`: the record that this one goes on with; `seen`: how many of its messages were known there;
    `retry_of`: a record that was asked the very same before."""

    episode_id: str = ""
    client_given: bool = False
    parent_id: str | None = None
    seen: int = 0
    retry_of: str | None = None


NOWHERE = Trail()
MEMORY = "mem:"  # how an episode's id begins that is all chats in one memory


def of_memory(memory_id: str) -> str:
    """The episode of chats in a memory whose client names none: a request brings its last turn alone, so no digest could find it."""
    return MEMORY + hashlib.sha256(memory_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def check_id(text: str) -> str:
    """An episode's id as a client gives it, if it can be one; InvalidRequest otherwise."""
    if not ID.fullmatch(text):
        rule = "1 to 128 letters, digits, '.', '_', ':' or '-', the first a letter or digit"
        raise InvalidRequest(f"episode {text[:80]!r} must be {rule}", param="x-everlearn-episode")
    return text


def trail_of(salt: Sequence[str | None], messages: Any, answers: Any) -> Trail:
    """The digests of a conversation. Nothing of what isn't one (a plain completion)."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages) or not messages:
        return NOWHERE
    state = hashlib.sha256(json.dumps(list(salt)).encode("utf-8", "surrogatepass")).digest()
    starts: list[tuple[str, int]] = []
    for number, message in enumerate(messages, 1):
        state = _after(state, message)
        if message.get("role") == "assistant" and number < len(messages):
            starts.append((_name(state), number))
    ends = [_name(_after(state, answer)) for answer in answers or [] if isinstance(answer, dict)]
    return Trail(_name(state), ends, starts[: -MAX_STARTS - 1 : -1])


def split_of(tenant: str, episode_id: str, heldout_share: float) -> str:
    """The same for the same episode, for ever; about that share of episodes is held out."""
    digest = hashlib.sha256(f"split\n{tenant}\n{episode_id}".encode("utf-8", "surrogatepass")).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") < heldout_share * 2**64]


class Placing:
    """Places the records of one transaction, in their order; a later one may go on with an earlier one of the same."""

    def __init__(self, conn: Connection, known: Sequence[Trail]):
        self.conn = conn
        wanted = {digest for trail in known for digest in (trail.prompt, *(start for start, _ in trail.starts)) if digest}
        self._found: dict[tuple[str, str], list[tuple[str, str, float]]] = {}  # (kind, digest): (record, episode, time)
        if wanted:
            for row in conn.execute(FOUND, {"digests": sorted(wanted)}):
                self._found.setdefault((row.kind, row.digest), []).append((row.record_id, row.episode_id, row.created_at))
        self._trails: list[dict[str, Any]] = []
        self._episodes: dict[tuple[str, str], dict[str, Any]] = {}

    def place(self, record_id: str, tenant: str, named: str | None, user: str | None, model: str, trail: Trail, now: float) -> Place:
        """`named`: the episode that the client gave."""
        parent, seen = self._parent(named, trail)
        retried = self._retried(named, parent, user, trail, now)
        if named is not None:
            place = Place(named, True, parent and parent[0], seen, retried and retried[0])
        elif parent is not None:
            place = Place(parent[1], False, parent[0], seen, retried and retried[0])
        elif retried is not None:
            place = Place(retried[1], False, None, 0, retried[0])
        else:
            place = Place("ep_" + record_id.removeprefix("rec_"))
        self._remember(record_id, tenant, place, trail, now)
        row = self._episodes.setdefault(
            (tenant, place.episode_id),
            {"tenant": tenant, "episode_id": place.episode_id, "client_given": place.client_given, "user": user, "created_at": now},
        )
        row |= {"model": model, "updated_at": max(now, row.get("updated_at", now))}
        return place

    def finish(self, heldout_share: float) -> None:
        """Writes what was placed."""
        if self._trails:
            self.conn.execute(INSERT_TRAIL, self._trails)
        there = {tuple(row) for row in self.conn.execute(KNOWN, {"ids": [episode_id for _, episode_id in self._episodes]})}
        made = [row | {"split": split_of(*place, heldout_share)} for place, row in self._episodes.items() if place not in there]
        touched = [
            {"of": place[0], "which": place[1], "last_model": row["model"], "at": row["updated_at"]}
            for place, row in self._episodes.items()
            if place in there
        ]
        if made:
            self.conn.execute(INSERT_EPISODE, made)
        if touched:
            self.conn.execute(TOUCH, touched)

    def _parent(self, named: str | None, trail: Trail) -> tuple[tuple[str, str, float] | None, int]:
        for digest, count in trail.starts:
            known = [one for one in self._found.get(("end", digest), ()) if named is None or one[1] == named]
            if known:
                return max(known), count  # the latest: ids of records sort by time
        return None, 0

    def _retried(
        self, named: str | None, parent: tuple[str, str, float] | None, user: str | None, trail: Trail, now: float
    ) -> tuple[str, str, float] | None:
        """The same messages before: in this episode, or by the same known user a short while ago."""
        episode = named or (parent and parent[1])
        known = self._found.get(("prompt", trail.prompt), []) if trail.prompt else []
        if episode is not None:
            known = [one for one in known if one[1] == episode]
        else:
            known = [one for one in known if user is not None and now - one[2] < RETRY_SECONDS]
        return max(known, default=None)

    def _remember(self, record_id: str, tenant: str, place: Place, trail: Trail, now: float) -> None:
        left = [("prompt", trail.prompt)] if trail.prompt else []
        for number, (kind, digest) in enumerate([*left, *(("end", digest) for digest in trail.ends)]):
            row = {"record_id": record_id, "number": number, "tenant": tenant, "kind": kind, "digest": digest}
            self._trails.append(row | {"episode_id": place.episode_id, "created_at": now})
            self._found.setdefault((kind, digest), []).append((record_id, place.episode_id, now))


def _after(state: bytes, message: dict[str, Any]) -> bytes:
    if message.get("role") in UNHEARD:
        return state
    said = json.dumps(plain(message), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(state + said.encode()).digest()


def _name(state: bytes) -> str:
    return state.hex()[:40]


def plain(message: dict[str, Any]) -> list[Any]:
    """What a message says, whichever of its spellings it has: role, text, other parts, calls of tools."""
    content, others = message.get("content"), []
    if isinstance(content, list):
        others = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
        content = "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return [message.get("role"), str(content or "").strip(), others, [_call(call) for call in message.get("tool_calls") or []]]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            pass
    return [function.get("name"), arguments]
