"""`everlearn key`: API keys. Works on the store itself, so that the first key can be made before the server listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli.console import Console, Noun, pass_console

if TYPE_CHECKING:
    from everlearn.store.db import Database
    from everlearn.store.keys import Key

command = Noun("key", help="API keys and their tenants.")
SCOPES = ("train", "sample", "admin")


@contextmanager
def _store(console: Console) -> Iterator[Database]:
    from everlearn.store.db import open_database

    database = open_database(console.settings().store_url)
    try:
        yield database
    finally:
        database.close()


def _row(key: Key) -> dict[str, Any]:
    def day(time: float | None) -> str | None:
        return None if time is None else datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")

    return {
        "key_id": key.key_id,
        "name": key.name,
        "tenant": key.tenant,
        "scopes": ",".join(key.scopes),
        "prefix": key.prefix,
        "created": day(key.created_at),
        "revoked": day(key.revoked_at),
    }


@command.command("create")
@click.argument("name")
@click.option("--tenant", default="default", show_default=True, help="whose runs, checkpoints and samples the key opens")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="what the key may do; may be repeated [default: all]")
@pass_console
def create(console: Console, name: str, tenant: str, scopes: tuple[str, ...]) -> None:
    """Create a key called NAME and print it; it can't be printed again."""
    from everlearn.store import keys

    with _store(console) as database:
        key, secret = database.write(lambda conn: keys.create(conn, tenant, name, scopes or SCOPES)).result()
    console.result({"key": secret, **_row(key)})
    console.note("keep the key: only its hash is stored. From now on every request needs a key")


@command.command("list")
@click.option("--tenant", help="only keys of one tenant")
@pass_console
def list_keys(console: Console, tenant: str | None) -> None:
    """List keys; a key itself is never shown, only its first characters."""
    from everlearn.store import keys

    with _store(console) as database:
        rows = [_row(key) for key in database.read(lambda conn: keys.list_keys(conn, tenant))]
    console.table(rows, ["key_id", "name", "tenant", "scopes", "prefix", "created", "revoked"])


@command.command("revoke")
@click.argument("key_id")
@pass_console
def revoke(console: Console, key_id: str) -> None:
    """Revoke the key with KEY_ID at once."""
    from everlearn.store import keys

    console.confirm(f"every client that uses key {key_id} will be refused from now on")
    with _store(console) as database:
        database.write(lambda conn: keys.revoke(conn, key_id)).result()
    console.note(f"revoked {key_id}")
