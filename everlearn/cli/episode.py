"""`everlearn episode`: the conversations and tasks that answers belong to."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console

command = Noun("episode", help="Conversations and tasks that answers belong to.")
COLUMNS = ["id", "created", "split", "model", "user", "records", "feedback"]


def moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@command.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="how many, the newest")
@click.option("--model", help="answered by this model; a bare name takes all its versions in")
@click.option("--user", help="of this user")
@click.option("--split", type=click.Choice(["train", "heldout"]), help="of this split")
@pass_console
def list_episodes(console: Console, limit: int, model: str | None, user: str | None, split: str | None) -> None:
    """List episodes, the newest first."""
    found = console.client().all("/v1/episodes", limit, model=model, user=user, split=split)
    console.table([{**one, "created": moment(one["created_at"])} for one in found], COLUMNS)


@command.command("show")
@click.argument("episode")
@pass_console
def show(console: Console, episode: str) -> None:
    """Show EPISODE: turns, answers, events and feedback, oldest first."""
    found = console.client().get(f"/v1/episodes/{quote(episode, safe='')}")
    if console.format == "json":
        console.result(found)
        return
    console.result({name: value for name, value in found.items() if name not in ("timeline", "object")})
    click.echo()
    console.table([line(entry) for entry in found["timeline"]], ["when", "what", "id", "says"])


def line(entry: dict[str, Any]) -> dict[str, Any]:
    """One row for one thing that happened; long texts are cut."""
    kind, says = entry["type"], ""
    if kind == "answer":
        says = " | ".join(str(message.get("content") or message.get("tool_calls") or "") for message in entry["messages"] or [])
        kind = f"answer of {entry['model']}"
    elif kind == "feedback":
        kind = f"{entry['source']}: {entry['kind']}{' ' + entry['name'] if entry['name'] else ''}"
        says = " ".join(str(entry[name]) for name in ("value", "text", "reason") if entry[name] not in (None, ""))
        says += "" if entry["counts"] else " (replaced)"
    elif kind == "event":
        kind = f"{entry['source']}: {entry['kind']} {entry['name']}".rstrip()
        says = " ".join(str(entry[name]) for name in ("value", "text") if entry[name] is not None)
    else:
        says = str(entry["message"].get("content"))
    shown = says if len(says) <= 100 else says[:97] + "..."
    return {"when": moment(entry["created_at"]), "what": kind, "id": entry.get("id") or entry.get("record_id"), "says": shown}
