"""Records of answers: what was asked, the token ids and log-probabilities as they were sampled, and which version sampled them.

The raw material of learning from use. A row with the figures is always kept for the retention time; the content (texts, tokens,
log-probabilities, parameters, metadata) stands beside it as one compressed blob, and is left out for keys that want it so. Rows
that leave were counted in the usage when they came (everlearn/store/usage.py). Each belongs to an episode (everlearn/store/placing.py).

`write` may run twice for the same records and counts them once. Nothing here knows queues or HTTP: everlearn/api/recorder.py
collects records while answers go out, and writes them behind their backs.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
import zstandard
from sqlalchemy.engine import Connection

from everlearn.errors import NotFound
from everlearn.faultpoints import around
from everlearn.store import forgetting, tables
from everlearn.store import usage as totals
from everlearn.store.placing import MEMORY, Place, Placing, Trail, trail_of
from everlearn.types import Array

rows, bodies = tables.records, tables.record_bodies
# Built once: building a statement costs more than running it.
KNOWN = sa.select(rows.c.record_id).where(rows.c.record_id.in_(sa.bindparam("ids", expanding=True)))
INSERT_ROW, INSERT_BODY = rows.insert(), bodies.insert()
SWEEP_ROWS = 2000  # a call of `sweep` holds the writer for this many rows at most
LEVEL = 3
ID = re.compile(r"rec_[0-9a-z]{1,64}")
MAX_USER = 200
UNSEEN = "shadow"  # the route of a candidate's answers that nobody sees (everlearn/api/shadow.py)
SHADOW_OF = "shadow_of"  # in its metadata: the record of the answer that was shown
EMBEDDINGS = "embeddings"  # the route of vectors, which are no part of a conversation
HELDOUT_SHARE = 0.2


class RecordedChoice(msgspec.Struct, frozen=True):
    """One sampled sequence: `tokens` int32 [N] and `logprobs` float32 [N] as the engine drew and scored them."""

    tokens: Array
    logprobs: Array
    finish_reason: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. `model` is the name as shown to the client (`support@8`, a base model's id, a tinker:// path), `version` the
    weights' id ("" is the base model). `messages` is what was asked and `answer` what was said, `params` the other fields of the
    request, each as JSON values; `user`, `metadata` and `episode_id` are the client's own. `content` False: only the figures are kept."""

    record_id: str
    tenant: str
    key_id: str | None
    route: str  # chat.completions, completions, responses, messages, embeddings, shadow
    model: str
    base_model: str
    version: str
    prompt: Array  # int32 [P]
    choices: list[RecordedChoice]
    messages: Any = None
    answer: Any = None
    params: Any = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    cached_tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    content: bool = True
    episode_id: str | None = None
    created_at: float = msgspec.field(default_factory=time.time)

    @property
    def prompt_tokens(self) -> int:
        return self.prompt.shape[0]

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens.shape[0] for choice in self.choices)


class Row(msgspec.Struct, frozen=True):
    """A record's figures, as they are listed. `body_bytes` 0: its content is not kept. `seen_messages` of its messages are those of the
    record `parent_id` and its answer. Of an answer that nobody saw, `parent_id` is the record of the one that was shown instead: it is in
    that one's episode, and goes with it."""

    record_id: str
    tenant: str
    key_id: str | None
    route: str
    model: str
    base_model: str
    version: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reasons: list[str]
    user: str | None
    first_token_seconds: float | None
    seconds: float
    body_bytes: int
    created_at: float
    episode_id: str | None = None
    parent_id: str | None = None
    seen_messages: int = 0


class Body(msgspec.Struct, frozen=True):
    """A record's content. `texts`: messages, answer, params and metadata as one JSON object."""

    prompt: Array
    choices: list[RecordedChoice]
    texts: bytes


class Packed(NamedTuple):
    """What is stored of a record: the figures, a Body packed (nothing where the content isn't kept), where its conversation stands."""

    row: Row
    body: bytes
    trail: Trail


class Texts(msgspec.Struct, frozen=True):
    """Of a body's texts, the conversation."""

    messages: Any = None
    answer: Any = None


encode = msgspec.msgpack.Encoder().encode
decode_body = msgspec.msgpack.Decoder(Body).decode
decode_draft = msgspec.msgpack.Decoder(tuple[Row, bytes]).decode
decode_texts = msgspec.json.Decoder(Texts).decode


def new_id(now: float | None = None) -> str:
    """A record's id: later ones sort behind earlier ones, and none can be guessed."""
    return f"rec_{int(1000 * (time.time() if now is None else now)):011x}{secrets.token_hex(10)}"


def int32(tokens: Sequence[int]) -> Array:
    """Token ids as an Array."""
    return Array("int32", [len(tokens)], array("i", tokens).tobytes())


def float32(values: Sequence[float]) -> Array:
    """Log-probabilities as an Array."""
    return Array("float32", [len(values)], array("f", values).tobytes())


def draft(record: Record) -> bytes:
    """A record as it waits for the store: complete, and less than what is kept of it by nothing but the compression. A microsecond for each
    kilobyte. A later server may read it: what is added to Row or Body needs a default."""
    names = ("record_id", "tenant", "key_id", "route", "model", "base_model", "version", "prompt_tokens", "completion_tokens")
    more = ("cached_tokens", "first_token_seconds", "seconds", "created_at", "episode_id")
    reasons = [choice.finish_reason for choice in record.choices]
    user = _storable(record.user) if record.user is not None and record.content else None
    figures = {name: getattr(record, name) for name in (*names, *more)}
    if record.route == UNSEEN:
        figures["parent_id"] = (record.metadata or {}).get(SHADOW_OF)
    return encode((Row(finish_reasons=reasons, user=user, body_bytes=0, **figures), encode(_body(record)) if record.content else b""))


def pack(draft: bytes) -> Packed:
    """What is stored of a draft. Tens of microseconds for each kilobyte, and no database."""
    row, body = decode_draft(draft)
    if not body:
        return Packed(msgspec.structs.replace(row, body_bytes=0), b"", Trail())
    data = zstandard.ZstdCompressor(level=LEVEL).compress(body)
    # No conversation goes on from what nobody saw, and the same words again in a memory are no retry.
    leaves_none = row.route == UNSEEN or (row.episode_id or "").startswith(MEMORY)
    trail = Trail() if leaves_none else _trail(row, decode_body(body))
    return Packed(msgspec.structs.replace(row, body_bytes=len(data)), data, trail)


def unpack(data: bytes) -> Body:
    return decode_body(zstandard.ZstdDecompressor().decompress(data))


def write(conn: Connection, packed: Sequence[Packed], heldout_share: float = HELDOUT_SHARE) -> int:
    """Stores records, each in its episode, and counts them in the usage. Those that are there already are left alone; returns how many
    were new."""
    return len(write_new(conn, packed, heldout_share))


def write_new(conn: Connection, packed: Sequence[Packed], heldout_share: float = HELDOUT_SHARE) -> list[tuple[Packed, Place]]:
    """The same; returns those that were new, with their places. What stands beside a record that is forgotten already isn't kept."""
    there = set(conn.execute(KNOWN, {"ids": [one.row.record_id for one in packed]}).scalars())
    new = {one.row.record_id: one for one in packed if one.row.record_id not in there}
    if not new:
        return []
    placing = Placing(conn, [one.trail for one in new.values()])
    places = {key: _place(placing, one) for key, one in new.items() if one.row.route != UNSEEN}
    places |= _beside(conn, [one.row for one in new.values() if one.row.route == UNSEEN], places)
    kept = [(new[key], place) for key, place in places.items()]
    if not kept:
        return []
    placed = [_placed(one.row, place) for one, place in kept]
    contents = [{"record_id": one.row.record_id, "tenant": one.row.tenant, "body": one.body} for one, _ in kept if one.body]
    with around("record.row"):
        conn.execute(INSERT_ROW, [msgspec.structs.asdict(row) for row in placed])
        if contents:
            conn.execute(INSERT_BODY, contents)
        placing.finish(heldout_share)
        totals.add(conn, [_line(row) for row in placed])
    return kept


def get(conn: Connection, tenant: str, record_id: str) -> tuple[Row, Body | None]:
    """A record's figures, and its content where that is kept."""
    where = (rows.c.record_id == record_id) & (rows.c.tenant == tenant)
    found = conn.execute(sa.select(rows).where(where)).first() if ID.fullmatch(record_id) else None
    if found is None:
        raise missing(record_id)
    row = Row(**found._mapping)
    if not row.body_bytes:
        return row, None
    return row, unpack(conn.execute(sa.select(bodies.c.body).where(bodies.c.record_id == record_id)).scalar_one())


def missing(record_id: str) -> NotFound:
    return NotFound(f"no record {record_id[:100]!r}; GET /v1/records lists yours (they are kept for a while only)", param="record_id")


def list_rows(
    conn: Connection,
    tenant: str,
    limit: int = 20,
    after: str | None = None,
    model: str | None = None,
    key_id: str | None = None,
    user: str | None = None,
    *,
    since: float | None = None,
    until: float | None = None,
) -> list[Row]:
    """Figures of the tenant's records, newest first; with `after` those older than that one. A `model` without a number takes all
    its versions in. `since`, `until`: Unix seconds between which an answer began, the last excluded."""
    where = rows.c.tenant == tenant
    if after is not None:
        where &= rows.c.record_id < after
    if model is not None:
        where &= (rows.c.model == model) | rows.c.model.startswith(f"{model}@", autoescape=True)
    for column, value in ((rows.c.key_id, key_id), (rows.c.user, user)):
        if value is not None:
            where &= column == value
    if since is not None:
        where &= rows.c.created_at >= since
    if until is not None:
        where &= rows.c.created_at < until
    query = sa.select(rows).where(where).order_by(rows.c.record_id.desc()).limit(limit)
    return [Row(**row._mapping) for row in conn.execute(query)]


def delete(conn: Connection, tenant: str, record_id: str) -> None:
    """Forgets a record with its content and its feedback, and marks what learned from it; the usage goes on counting it. Of one
    that has expired, what datasets froze goes."""
    if not ID.fullmatch(record_id):
        raise missing(record_id)
    marked = forgetting.mark(conn, tenant, "record", [record_id, *_shadows(conn, [record_id])])
    if not _drop(conn, (rows.c.record_id == record_id) & (rows.c.tenant == tenant), 1, "deleted") and not marked:
        raise missing(record_id)


def delete_of_episode(conn: Connection, tenant: str, episode_id: str) -> None:
    """Forgets all records of an episode as `delete` does."""
    here = (rows.c.tenant == tenant) & (rows.c.episode_id == episode_id)
    ids = list(conn.execute(sa.select(rows.c.record_id).where(here)).scalars())
    forgetting.mark(conn, tenant, "record", ids)
    _drop(conn, here, len(ids), "deleted")


def size(conn: Connection) -> int:
    """Bytes of all contents."""
    return int(conn.execute(sa.select(sa.func.coalesce(sa.func.sum(rows.c.body_bytes), 0))).scalar_one())


def sweep(conn: Connection, before: float, limit: int = SWEEP_ROWS) -> int:
    """Forgets records made before that time, the oldest first and `limit` at most; how many. Call again while it returns `limit`."""
    return _drop(conn, rows.c.created_at < before, limit)


def oldest_beyond(conn: Connection, max_bytes: int) -> float | None:
    """The time before which records must go so that the rest has `max_bytes` at most; None: all may stay."""
    excess = size(conn) - max_bytes
    if excess <= 0:
        return None
    running = sa.func.sum(rows.c.body_bytes).over(order_by=(rows.c.created_at, rows.c.record_id)).label("running")
    inner = sa.select(rows.c.created_at, running).subquery()
    edge = conn.execute(sa.select(sa.func.min(inner.c.created_at)).where(inner.c.running >= excess)).scalar_one()
    return float(edge) + 1e-6  # the record at the edge goes too


def _drop(conn: Connection, where: sa.ColumnElement[bool], limit: int, way: forgetting.Way = "expired") -> int:
    ids = list(conn.execute(sa.select(rows.c.record_id).where(where).order_by(rows.c.created_at).limit(limit)).scalars())
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        some += _shadows(conn, some)
        conn.execute(bodies.delete().where(bodies.c.record_id.in_(some)))
        forgetting.forget_records(conn, some, way)
    return len(ids)


def _shadows(conn: Connection, ids: Sequence[str]) -> list[str]:
    """What stands beside these records, unseen."""
    shown = rows.alias()
    same = (rows.c.tenant == shown.c.tenant) & (rows.c.episode_id == shown.c.episode_id)  # there is an index of episodes
    where = same & shown.c.record_id.in_(ids) & (rows.c.route == UNSEEN) & (rows.c.parent_id == shown.c.record_id)
    return list(conn.execute(sa.select(rows.c.record_id).where(where)).scalars())


def _beside(conn: Connection, unseen: Sequence[Row], places: Mapping[str, Place]) -> dict[str, Place]:
    """The places of answers that nobody saw: in the episode of the record that they stand beside, which is stored or is in `places`."""
    if not unseen:
        return {}
    query = sa.select(rows.c.record_id, rows.c.episode_id).where(rows.c.record_id.in_([row.parent_id for row in unseen]))
    known = {row.record_id: row.episode_id for row in conn.execute(query)} | {key: place.episode_id for key, place in places.items()}
    return {row.record_id: Place(known[row.parent_id] or "") for row in unseen if row.parent_id in known}


def _place(placing: Placing, one: Packed) -> Place:
    row = one.row
    if row.route == EMBEDDINGS:
        return Place()
    return placing.place(row.record_id, row.tenant, row.episode_id, row.user, row.model, one.trail, row.created_at)


def _placed(row: Row, place: Place) -> Row:
    parent = row.parent_id if row.route == UNSEEN else place.parent_id
    return msgspec.structs.replace(row, episode_id=place.episode_id or None, parent_id=parent, seen_messages=place.seen)


def _trail(row: Row, body: Body) -> Trail:
    try:
        texts = decode_texts(body.texts)
    except (msgspec.DecodeError, UnicodeDecodeError):  # escapes of half a surrogate pair: read slowly, as they were written
        given = json.loads(body.texts)
        texts = Texts(given.get("messages"), given.get("answer"))
    return trail_of((row.tenant, row.key_id, row.user), texts.messages, texts.answer)


def _body(record: Record) -> Body:
    texts = {"messages": record.messages, "answer": record.answer, "params": record.params, "metadata": record.metadata}
    try:
        encoded = msgspec.json.encode(texts, enc_hook=str)
    except UnicodeEncodeError:  # half a surrogate pair in what the client sent; slower, but with ASCII escapes it can be kept
        encoded = json.dumps(texts, default=str).encode()
    return Body(record.prompt, record.choices, encoded)


def _storable(text: str) -> str:
    """Text that both databases take."""
    return text[:MAX_USER].encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _line(row: Row) -> totals.Line:
    return totals.Line(
        tenant=row.tenant,
        day=totals.day_of(row.created_at),
        key_id=row.key_id or "",
        subject=row.model,
        kind=row.route,
        requests=1,
        tokens_in=row.prompt_tokens,
        tokens_cached=row.cached_tokens,
        tokens_out=row.completion_tokens,
        seconds=row.seconds,
    )
