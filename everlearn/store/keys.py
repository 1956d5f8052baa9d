"""API keys: `tml-` and 43 random characters. Only the sha256 is kept; the key itself is shown once, when it is made.

A plain hash is enough because the key is 256 random bits: there is nothing to guess, so nothing for a slow hash to slow down.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from everlearn.errors import InvalidRequest, NotFound
from everlearn.faultpoints import around
from everlearn.store import tables

SCOPES = ("train", "sample", "read", "admin")
MAX_LIMIT = 10**12
TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a key may use; None: as much as there is. `models`: the base models that it may train, and
    the base models and names of adapters that it may sample."""

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    models: list[str] | None = None


NO_LIMITS = Limits()


class Key(msgspec.Struct, frozen=True):
    """A key without its secret; `prefix` is the part that may be shown to tell keys apart. `content` False: of its answers only the
    figures are recorded."""

    key_id: str
    tenant: str
    name: str
    scopes: list[str]
    prefix: str
    created_at: float
    revoked_at: float | None = None
    limits: Limits = NO_LIMITS
    content: bool = True


def create(
    conn: Connection, tenant: str, name: str, scopes: Sequence[str] = SCOPES, limits: Limits = NO_LIMITS, content: bool = True
) -> tuple[Key, str]:
    """A new key of `tenant` and its secret, which can't be had again."""
    if not TENANT.fullmatch(tenant):
        raise InvalidRequest(f"tenant {tenant!r} must be 1 to 64 letters, digits, '.', '_' or '-'", param="tenant")
    unknown = set(scopes) - set(SCOPES)
    if unknown or not scopes:
        raise InvalidRequest(f"scopes {sorted(scopes)} must be some of {', '.join(SCOPES)}", param="scopes")
    secret = "tml-" + secrets.token_urlsafe(32)
    key = Key(f"key-{secrets.token_hex(6)}", tenant, name[:200], sorted(scopes), secret[:10], time.time(), None, check(limits), content)
    row = msgspec.structs.asdict(key) | {"limits": msgspec.to_builtins(limits)}
    with around("key.row"):
        conn.execute(tables.keys.insert().values(digest=_digest(secret), **row))
    return key, secret


def check(limits: Limits) -> Limits:
    """The limits, if each makes sense; InvalidRequest otherwise."""
    for name in ("rpm", "tpm", "concurrency"):
        value = getattr(limits, name)
        if value is not None and not 1 <= value <= MAX_LIMIT:
            raise InvalidRequest(f"{name} is {value}; it must lie in 1..{MAX_LIMIT} (leave it out for no limit)", param=name)
    if limits.models is not None and (not limits.models or not all(0 < len(model) <= 300 for model in limits.models)):
        raise InvalidRequest(
            "models must name at least one model, each with 1 to 300 characters; leave it out to allow all", param="models"
        )
    return limits


def set_limits(conn: Connection, key_id: str, limits: Limits, content: bool | None = None) -> Key:
    """Other limits for a key, and whether it records content, unless that is None; a running server heeds them within a second."""
    values: dict[str, Any] = {"limits": msgspec.to_builtins(check(limits))}
    if content is not None:
        values["content"] = content
    with around("key.row"):
        conn.execute(tables.keys.update().where(tables.keys.c.key_id == key_id).values(**values))
    return get(conn, key_id)


def find(conn: Connection, secret: str) -> Key | None:
    """The live key with this secret; None when it is unknown or revoked (the caller must not tell the two apart)."""
    where = (tables.keys.c.digest == _digest(secret)) & tables.keys.c.revoked_at.is_(None)
    row = conn.execute(sa.select(tables.keys).where(where)).first()
    return None if row is None else _key(row)


def live(conn: Connection, key_id: str) -> Key | None:
    """The key with this id, if it isn't revoked."""
    where = (tables.keys.c.key_id == key_id) & tables.keys.c.revoked_at.is_(None)
    row = conn.execute(sa.select(tables.keys).where(where)).first()
    return None if row is None else _key(row)


def list_keys(conn: Connection, tenant: str | None = None) -> list[Key]:
    """All keys, revoked ones too, oldest first; of one tenant or, for the operator, of all."""
    query = sa.select(tables.keys).order_by(tables.keys.c.created_at)
    if tenant is not None:
        query = query.where(tables.keys.c.tenant == tenant)
    return [_key(row) for row in conn.execute(query)]


def revoke(conn: Connection, key_id: str) -> Key:
    """Ends a key for good. Revoking twice changes nothing."""
    live = (tables.keys.c.key_id == key_id) & tables.keys.c.revoked_at.is_(None)
    with around("key.row"):
        conn.execute(tables.keys.update().where(live).values(revoked_at=time.time()))
    return get(conn, key_id)


def get(conn: Connection, key_id: str) -> Key:
    """The key with this id, revoked or not."""
    row = conn.execute(sa.select(tables.keys).where(tables.keys.c.key_id == key_id)).first()
    if row is None:
        raise NotFound(f"no key {key_id!r}; `everlearn key list` shows those that exist", param="key_id")
    return _key(row)


def any_keys(conn: Connection) -> bool:
    """Whether a key was ever made. Revoked ones count: revoking the last key must not open the server."""
    return conn.execute(sa.select(tables.keys.c.key_id).limit(1)).first() is not None


def belongings(conn: Connection, tenant: str) -> tuple[int, int]:
    """How many training runs and names of adapters a tenant has."""
    runs = sa.select(sa.func.count()).select_from(tables.runs).where(tables.runs.c.tenant == tenant)
    here = (tables.adapter_names.c.tenant == tenant) & (tables.adapter_names.c.number > 0)  # 0: a name that was given up
    names = sa.select(sa.func.count()).select_from(tables.adapter_names).where(here)
    return conn.execute(runs).scalar_one(), conn.execute(names).scalar_one()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _key(row: Any) -> Key:
    limits = msgspec.convert(row.limits or {}, Limits)
    return Key(row.key_id, row.tenant, row.name, list(row.scopes), row.prefix, row.created_at, row.revoked_at, limits, row.content)
