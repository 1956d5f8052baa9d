from __future__ import annotations

import pytest
import sqlalchemy as sa

from everlearn.errors import InvalidRequest, NotFound
from everlearn.store import keys, tables
from everlearn.store.db import Database
from tests.store.acts import do


def test_a_key_is_found_by_its_secret_until_it_is_revoked(db: Database) -> None:
    assert not db.read(keys.any_keys)
    key, secret = do(db, lambda conn: keys.create(conn, "a", "laptop"))
    assert secret.startswith("tml-")
    assert db.read(lambda conn: keys.find(conn, secret)) == key
    for wrong in ("", "tml-", secret[:-1], secret.upper(), "tml-\udc80", key.prefix):
        assert db.read(lambda conn, wrong=wrong: keys.find(conn, wrong)) is None
    first = do(db, lambda conn: keys.revoke(conn, key.key_id))
    assert first.revoked_at and do(db, lambda conn: keys.revoke(conn, key.key_id)) == first
    assert db.read(lambda conn: keys.find(conn, secret)) is None
    assert db.read(keys.any_keys), "revoking the last key must not open the server"


def test_the_secret_is_nowhere_in_the_store(db: Database) -> None:
    _, secret = do(db, lambda conn: keys.create(conn, "a", "laptop"))
    row = db.read(lambda conn: conn.execute(sa.select(tables.keys)).one())
    assert secret not in str(row)


def test_keys_are_listed_by_tenant(db: Database) -> None:
    for tenant in "aab":
        do(db, lambda conn, tenant=tenant: keys.create(conn, tenant, "x", ("sample",)))
    assert len(db.read(keys.list_keys)) == 3
    assert {key.tenant for key in db.read(lambda conn: keys.list_keys(conn, "b"))} == {"b"}


def test_limits_and_content_go_with_the_key(db: Database) -> None:
    limits = keys.Limits(rpm=60, models=["support"])
    key, secret = do(db, lambda conn: keys.create(conn, "a", "shop", ("sample", "read"), limits, content=False))
    found = db.read(lambda conn: keys.find(conn, secret))
    assert found == key and found is not None and (found.limits, found.content) == (limits, False)
    changed = do(db, lambda conn: keys.set_limits(conn, key.key_id, keys.Limits(tpm=9), content=True))
    assert db.read(lambda conn: keys.find(conn, secret)) == changed
    assert (changed.limits, changed.content, changed.scopes) == (keys.Limits(tpm=9), True, ["read", "sample"])
    for recorded in (True, False):
        do(db, lambda conn, recorded=recorded: keys.set_limits(conn, key.key_id, limits, content=recorded))
        assert do(db, lambda conn: keys.set_limits(conn, key.key_id, keys.Limits())).content is recorded
    for wrong in (
        keys.Limits(rpm=0),
        keys.Limits(concurrency=-1),
        keys.Limits(tpm=10**13),
        keys.Limits(models=[]),
        keys.Limits(models=[""]),
    ):
        with pytest.raises(InvalidRequest):
            do(db, lambda conn, wrong=wrong: keys.set_limits(conn, key.key_id, wrong, content=True))


def test_a_key_of_before_limits_has_none(db: Database) -> None:
    key, secret = do(db, lambda conn: keys.create(conn, "a", "old"))
    do(db, lambda conn: conn.execute(tables.keys.update().values(limits=None)))
    assert db.read(lambda conn: keys.find(conn, secret)) == key


def test_what_makes_no_sense_is_refused_by_name(db: Database) -> None:
    with pytest.raises(InvalidRequest, match="tenant 'a b'"):
        do(db, lambda conn: keys.create(conn, "a b", "x"))
    for scopes in ((), ("root",)):
        with pytest.raises(InvalidRequest, match="scopes"):
            do(db, lambda conn, scopes=scopes: keys.create(conn, "a", "x", scopes))
    with pytest.raises(NotFound, match="key-none"):
        do(db, lambda conn: keys.revoke(conn, "key-none"))
