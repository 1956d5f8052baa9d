"""What feedback may say, and about what: checked before anything is kept."""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import InvalidRequest, NotFound, Unsupported
from everlearn.store import records, tables
from everlearn.store.names import storable

if TYPE_CHECKING:
    from everlearn.store.feedback import Feedback

SOURCES = ("human", "program", "model")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/ -]{0,63}")
MAX_TEXT, MAX_ANSWER, MAX_REASON, MAX_SOURCE, MAX_KEY = 10_000, 200_000, 1_000, 200, 200
MAX_VALUE = 1e6


class Rule(NamedTuple):
    """What a kind must have, and what it may have beside that."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("record", "span", "episode")


KINDS = {
    "boolean": Rule(("value",), ("name",)),
    "float": Rule(("value",), ("name",)),
    "comment": Rule(("text",), ("name",)),
    "demonstration": Rule(("answer",), ("text", "name"), ("record", "span")),
    "preference": Rule(("over_record_id", "value"), ("over_choice", "name"), ("record",)),
    "outcome": Rule(("name", "value"), ("text",)),
    "implicit": Rule(("name", "value", "noise"), (), ("record",)),
}
OPTIONAL = ("value", "text", "answer", "over_record_id", "name", "noise")


def check(conn: Connection, given: Feedback) -> Feedback:
    """The word with its episode and its source, if it may be said. Raises InvalidRequest or Unsupported naming the field, and NotFound for
    what isn't there or isn't the tenant's."""
    _check_fields(given)
    if given.record_id is None:
        where = (tables.episodes.c.tenant == given.tenant) & (tables.episodes.c.episode_id == given.episode_id)
        episode = conn.execute(sa.select(tables.episodes).where(where)).first()
        if episode is None:
            raise no_episode(given.episode_id)
        return _discreet(_attributed(given, episode.user), keeps_content(conn, given.tenant, given.episode_id))
    row, body = records.get(conn, given.tenant, given.record_id)
    if given.episode_id and row.episode_id not in (None, given.episode_id):
        raise InvalidRequest(f"record {row.record_id} is of episode {row.episode_id}; leave episode_id out", param="episode_id")
    _check_choice(row, given.choice, "choice")
    if given.span_start is not None and given.span_end is not None:
        length = row.completion_tokens if len(row.finish_reasons) == 1 else -1
        if body is not None:
            length = body.choices[given.choice].tokens.shape[0]
        if length < 0:
            raise Unsupported("span: the content of this record isn't kept, so nobody knows which tokens these are", param="span")
        if not 0 <= given.span_start < given.span_end <= length:
            rule = f"must lie in the answer's {length} tokens: [first, end) with 0 <= first < end <= {length}"
            raise InvalidRequest(f"span [{given.span_start}, {given.span_end}] {rule}", param="span")
    if given.over_record_id is not None:
        other, _ = records.get(conn, given.tenant, given.over_record_id)
        _check_choice(other, given.over_choice or 0, "over.choice")
        if (other.record_id, given.over_choice or 0) == (row.record_id, given.choice):
            raise InvalidRequest("over names the very answer that is preferred; name the other one", param="over")
        given = msgspec.structs.replace(given, over_choice=given.over_choice or 0)
    given = msgspec.structs.replace(given, episode_id=row.episode_id or "")
    return _discreet(_attributed(given, row.user), row.body_bytes > 0)


def keeps_content(conn: Connection, tenant: str, episode_id: str) -> bool:
    """Whether the content of any of an episode's records is kept."""
    rows = tables.records
    here = (rows.c.tenant == tenant) & (rows.c.episode_id == episode_id) & (rows.c.route != records.UNSEEN)
    return conn.execute(sa.select(rows.c.record_id).where(here & (rows.c.body_bytes > 0)).limit(1)).first() is not None


def no_episode(episode_id: str) -> NotFound:
    return NotFound(f"no episode {episode_id[:100]!r}; GET /v1/episodes lists yours (they go with their last record)", param="episode_id")


def _check_fields(given: Feedback) -> None:
    rule = KINDS.get(given.kind)
    if rule is None:
        raise InvalidRequest(f"kind {given.kind[:60]!r} is unknown; it is one of {', '.join(KINDS)}", param="kind")
    for name in OPTIONAL:
        there = getattr(given, name) not in (None, "")
        if name in rule.needs and not there:
            raise InvalidRequest(f"feedback of kind {given.kind} needs {_shown(name)}", param=_shown(name))
        if there and name not in rule.needs + rule.takes:
            raise InvalidRequest(f"feedback of kind {given.kind} has no {_shown(name)}; leave it out", param=_shown(name))
    target = "episode" if given.record_id is None else "record" if given.span_start is None else "span"
    if target not in rule.targets:
        raise InvalidRequest(f"feedback of kind {given.kind} is about a {' or a '.join(rule.targets)}, not about a {target}", param="kind")
    if given.source not in SOURCES:
        raise InvalidRequest(f"source {given.source[:60]!r} is one of {', '.join(SOURCES)}", param="source")
    if given.value is not None:
        _check_value(given.kind, given.value)
    if given.noise is not None and not 0.0 <= given.noise < 0.5:
        raise InvalidRequest(f"noise {given.noise} must lie in [0, 0.5): a label that is wrong more often says the opposite", param="noise")
    if given.name and not NAME.fullmatch(given.name):
        raise InvalidRequest(f"name {given.name[:80]!r} must be 1 to 64 letters, digits, spaces or any of . _ : / -", param="name")
    limits = {"text": MAX_TEXT, "answer": MAX_ANSWER, "reason": MAX_REASON, "source_id": MAX_SOURCE, "idempotency_key": MAX_KEY}
    for name, limit in limits.items():
        text = getattr(given, name)
        if text is not None and (len(text) > limit or not storable(text)):
            rule_text = f"must be text of {limit} characters at most, without NUL and half surrogate pairs"
            raise InvalidRequest(f"{_shown(name)} {rule_text}", param=_shown(name))


def _check_value(kind: str, value: float) -> None:
    if not math.isfinite(value) or abs(value) > MAX_VALUE:
        raise InvalidRequest(f"value {value} must be a number of at most {MAX_VALUE:g}", param="value")
    if kind in ("boolean", "implicit") and value not in (0.0, 1.0):
        raise InvalidRequest(f"value {value} of kind {kind} must be true or false", param="value")


def _check_choice(row: records.Row, choice: int, param: str) -> None:
    if not 0 <= choice < max(1, len(row.finish_reasons)):
        raise InvalidRequest(f"{param} {choice}: record {row.record_id} has choices 0 to {len(row.finish_reasons) - 1}", param=param)


def _attributed(given: Feedback, user: str | None) -> Feedback:
    """Who says it: whom the client names, else the user whose answer it is, else the key."""
    return given if given.source_id else msgspec.structs.replace(given, source_id=user or given.key_id or "")


def _discreet(given: Feedback, content: bool) -> Feedback:
    """Of what is said about an answer whose content isn't kept, no text is kept either, and of who said it a digest."""
    if content:
        return given
    for name in ("text", "answer", "reason"):
        if getattr(given, name):
            why = "the content of this record isn't kept, so no text about it is either; leave it out"
            raise Unsupported(f"{_shown(name)}: {why}", param=_shown(name))
    if not given.source_id or given.source_id == given.key_id or given.source_id.startswith("sha256:"):
        return given
    digest = hashlib.sha256(f"{given.tenant}\n{given.source_id}".encode("utf-8", "surrogatepass")).hexdigest()
    return msgspec.structs.replace(given, source_id=f"sha256:{digest[:32]}")


def _shown(name: str) -> str:
    """A field as the API calls it."""
    return {"over_record_id": "over", "answer": "text"}.get(name, name)
