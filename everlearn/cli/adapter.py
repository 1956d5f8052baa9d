"""`everlearn adapter`: names for checkpoints, and which version a name means."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console

command = Noun("adapter", help="Names of adapters and the versions that they mean.")
COLUMNS = ["model", "current", "base_model", "path", "note", "created"]


def route(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='@')}"


def row(adapter: dict[str, Any]) -> dict[str, Any]:
    return {**adapter, "created": datetime.fromtimestamp(adapter["created_at"], UTC).isoformat(timespec="seconds")}


@command.command("name")
@click.argument("name")
@click.argument("path")
@click.option("--note", default="", help="why; kept with the version")
@click.option("--move", is_flag=True, help="let the name mean this version at once, if it means another one now")
@pass_console
def name_adapter(console: Console, name: str, path: str, note: str, move: bool) -> None:
    """Make the checkpoint at PATH (tinker://...) the next version of NAME.

    A new name means this version. A name that is there goes on meaning what it means until it is moved.
    """
    made = console.client().post("/v1/adapters", {"name": name, "path": path, "note": note, "move": move})
    console.result(row(made))
    if not made["current"]:
        number = made["number"]
        ways = f"everlearn adapter move {name} {number}; where it is deployed, everlearn deploy promote {name} --to {number}"
        console.note(f"{name} means what it meant before; what moves it: {ways}")


@command.command("list")
@pass_console
def list_adapters(console: Console) -> None:
    """List names and the version that each means now."""
    console.table([row(adapter) for adapter in console.client().all("/v1/adapters")], COLUMNS)


@command.command("show")
@click.argument("name")
@pass_console
def show(console: Console, name: str) -> None:
    """Show NAME with its versions and its moves, or one version (NAME@NUMBER)."""
    found = console.client().get(route(name))
    if console.format == "json" or "versions" not in found:
        console.result(row(found))
        return
    console.table([row(version) for version in found["versions"]], COLUMNS)
    click.echo()
    console.table([row(move) for move in found["history"]], ["number", "created", "note"])


@command.command("move")
@click.argument("name")
@click.argument("number", type=click.IntRange(min=1))
@click.option("--note", default="", help="why; kept in the history")
@click.option("--expected", type=click.IntRange(min=1), metavar="NUMBER", help="only if the name means this version now")
@pass_console
def move(console: Console, name: str, number: int, note: str, expected: int | None) -> None:
    """Let NAME mean version NUMBER from the next request on, newer or older than the present one."""
    console.result(row(console.client().post(route(name) + "/move", {"number": number, "note": note, "expected": expected})))


@command.command("delete")
@click.argument("name")
@pass_console
def delete(console: Console, name: str) -> None:
    """Give up NAME with all its versions, or one version (NAME@NUMBER). Checkpoints stay."""
    console.confirm(f"nobody will be answered under {name} any more")
    console.client().delete(route(name))
    console.note(f"deleted {name}; its checkpoints are there, and can be deleted from now on")
