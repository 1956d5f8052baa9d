"""`everlearn key`: API keys. Works on the store itself, so that the first key can be made before the server listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli.console import Console, Noun, pass_console

if TYPE_CHECKING:
    from everlearn.store.db import Database
    from everlearn.store.keys import Key, Limits

command = Noun("key", help="API keys and their tenants.")
DEFAULT_TENANT = "default"  # whose everything is as long as there is no key
SCOPES = ("train", "sample", "read", "admin")


@contextmanager
def _store(console: Console) -> Iterator[Database]:
    from everlearn import faultpoints
    from everlearn.config import faults
    from everlearn.store.db import open_database

    settings = console.settings()
    faultpoints.arm(faults(), settings.home)
    database = open_database(settings.store_url)
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
        "rpm": key.limits.rpm,
        "tpm": key.limits.tpm,
        "concurrency": key.limits.concurrency,
        "models": ",".join(key.limits.models) if key.limits.models else None,
        "content": key.content,
        "created": day(key.created_at),
        "revoked": day(key.revoked_at),
    }


def limit_options(verb: Callable[..., None]) -> Callable[..., None]:
    """What a key may use, for the two verbs that say it."""
    number = click.IntRange(min=1)
    for option in (
        click.option(
            "--content/--no-content",
            default=None,
            help="record texts and tokens of its answers, or only figures [default: as it was; of a new key: record them]",
        ),
        click.option(
            "--models",
            multiple=True,
            metavar="NAME,...",
            help="base models that it may train, base models and adapters that it may sample [default: all]; may be repeated",
        ),
        click.option("--concurrency", type=number, metavar="N", help="requests at once"),
        click.option("--tpm", type=number, metavar="N", help="tokens a minute, prompts and answers together"),
        click.option("--rpm", type=number, metavar="N", help="requests a minute"),
    ):
        verb = option(verb)
    return verb


def _limits(rpm: int | None, tpm: int | None, concurrency: int | None, models: tuple[str, ...]) -> Limits:
    from everlearn.store.keys import Limits

    names = [name.strip() for text in models for name in text.split(",") if name.strip()]
    return Limits(rpm, tpm, concurrency, names or None)


@command.command("create")
@click.argument("name")
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="whose runs, checkpoints and samples the key opens")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="what the key may do; may be repeated [default: all]")
@limit_options
@pass_console
def create(console: Console, name: str, tenant: str, scopes: tuple[str, ...], content: bool | None, **limits: Any) -> None:
    """Create a key called NAME and print it; it can't be printed again."""
    from everlearn.store import keys

    given = _limits(**limits)
    with _store(console) as database:
        key, secret = database.write(lambda conn: keys.create(conn, tenant, name, scopes or SCOPES, given, content is not False)).result()
        runs, names = (0, 0) if tenant == DEFAULT_TENANT else database.read(lambda conn: keys.belongings(conn, DEFAULT_TENANT))
    console.result({"key": secret, **_row(key)})
    console.note("keep the key: only its hash is stored. From now on every request needs a key")
    if runs or names:
        console.note(
            f"warning: this key doesn't see the training runs ({runs}) and names of adapters ({names}) of tenant {DEFAULT_TENANT}, with "
            f"all that was made without a key; `everlearn key create NAME --tenant {DEFAULT_TENANT}` makes one that does"
        )


@command.command("list")
@click.option("--tenant", help="only keys of one tenant")
@pass_console
def list_keys(console: Console, tenant: str | None) -> None:
    """List keys; a key itself is never shown, only its first characters."""
    from everlearn.store import keys

    with _store(console) as database:
        rows = [_row(key) for key in database.read(lambda conn: keys.list_keys(conn, tenant))]
    console.table(
        rows, ["key_id", "name", "tenant", "scopes", "prefix", "rpm", "tpm", "concurrency", "models", "content", "created", "revoked"]
    )


@command.command("limit")
@click.argument("key_id")
@limit_options
@pass_console
def limit(console: Console, key_id: str, content: bool | None, **limits: Any) -> None:
    """Say anew what the key with KEY_ID may use; what isn't given is no longer limited. Whether texts are
    recorded stays as it is unless it is said. A running server heeds it within a second."""
    from everlearn.store import keys

    given = _limits(**limits)
    with _store(console) as database:
        key = database.write(lambda conn: keys.set_limits(conn, key_id, given, content)).result()
    console.result(_row(key))


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
