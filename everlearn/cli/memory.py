"""`everlearn memory`: what memories of conversations show a model, and how to pin, correct and forget."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console
from everlearn.cli.memory_train import train
from everlearn.errors import Forbidden

command = Noun("memory", help="Memories of conversations, and what is in them.")
command.add_command(train)
FORGETTING = 3600.0  # seconds: the server answers when its whole file is written anew
COLUMNS = ["id", "base_model", "budget", "tokens", "turns", "refill", "policy", "version", "updated"]


def route(memory_id: str, *parts: str | int) -> str:
    return "/".join(["/v1/memories", quote(memory_id, safe="@"), *map(str, parts)])


def row(memory: dict[str, Any]) -> dict[str, Any]:
    return {**memory, "updated": datetime.fromtimestamp(memory["updated_at"], UTC).isoformat(timespec="seconds")}


def show_chunks(console: Console, memory: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    """The memory, and of its chunks those that are shown; in JSON all of them."""
    if console.format == "json":
        console.result(memory)
        return
    console.result({name: row(memory)[name] for name in COLUMNS})
    click.echo()
    console.table(shown, ["sources", "role", "tokens", "age", "rewrites", "importance", "pinned", "text"])


def show_turn(console: Console, memory: dict[str, Any], number: int) -> None:
    """A memory that was changed, and the chunks that come from turn `number`, if this key may read them."""
    try:
        memory = console.client().get(route(memory["id"]))
    except Forbidden:
        console.result(row(memory))
        return
    show_chunks(console, memory, [chunk for chunk in memory["chunks"] if number in chunk["sources"]])


@command.command("list")
@pass_console
def list_memories(console: Console) -> None:
    """List memories with their budgets, and how much of them is used."""
    console.table([row(memory) for memory in console.client().all("/v1/memories")], COLUMNS)


@command.command("show")
@click.argument("memory_id")
@click.option("--turn", type=click.IntRange(min=0), metavar="NUMBER", help="one turn as it was said, and what became of it")
@pass_console
def show(console: Console, memory_id: str, turn: int | None) -> None:
    """Show what MEMORY_ID holds in its window: each chunk with its tokens, the turns it came from, its age and its rewrites."""
    if turn is not None:
        told = console.client().get(route(memory_id, "turns", turn))
        if console.format == "json":
            console.result(told)
            return
        console.result({name: told[name] for name in ("number", "role", "text", "supersedes")})
        console.table(told["rewrites"], ["turn", "refill", "before", "after"])
        return
    found = console.client().get(route(memory_id))
    show_chunks(console, found, found["chunks"])


@command.command("change")
@click.argument("memory_id")
@click.option("--budget", type=click.IntRange(min=1), help="tokens; more than it has")
@click.option("--refill", type=click.Choice(["extract", "generate", "forget"]), help="who writes what is cut")
@click.option("--importance", type=click.Choice(["head", "recency", "decided", "certain"]), help="who weighs chunks")
@click.option("--policy", metavar="NAME", help='the adapter that writes and decides; "": the base model')
@pass_console
def change(console: Console, memory_id: str, budget: int | None, refill: str | None, importance: str | None, policy: str | None) -> None:
    """Raise the budget of MEMORY_ID, or choose who writes and weighs its chunks, from its next turn on."""
    wanted = {"budget": budget, "refill": refill, "importance": importance, "policy": policy}
    if all(value is None for value in wanted.values()):
        raise click.UsageError("there is nothing to change; give --budget, --refill, --importance or --policy")
    console.result(row(console.client().patch(route(memory_id), wanted)))


@command.command("pin")
@click.argument("memory_id")
@click.argument("number", type=click.IntRange(min=0))
@click.option("--off", is_flag=True, help="let it be rewritten again")
@pass_console
def pin(console: Console, memory_id: str, number: int, off: bool) -> None:
    """Keep the chunk of turn NUMBER in the window as it is."""
    show_turn(console, console.client().post(route(memory_id, "pin"), {"number": number, "pinned": not off}), number)


@command.command("correct")
@click.argument("memory_id")
@click.argument("number", type=click.IntRange(min=0))
@click.argument("text")
@pass_console
def correct(console: Console, memory_id: str, number: int, text: str) -> None:
    """Put TEXT in the place of what turn NUMBER said."""
    show_turn(console, console.client().post(route(memory_id, "correct"), {"number": number, "text": text}), number)


@command.command("forget")
@click.argument("memory_id")
@click.argument("number", type=click.IntRange(min=0), required=False)
@pass_console
def forget(console: Console, memory_id: str, number: int | None) -> None:
    """Forget turn NUMBER and all that was made of it, or without NUMBER the whole memory. No byte of it stays in the store."""
    what = f"turn {number}" if number is not None else "all"
    console.confirm(f"{what} of memory {memory_id} would be lost")
    parts = () if number is None else ("turns", number)
    console.client(timeout=FORGETTING).delete(route(memory_id, *parts))
    console.note(f"forgot {'all of it' if number is None else f'turn {number}'}")


@command.command("export")
@click.argument("memory_id")
@click.argument("file", type=click.Path(path_type=Path))
@pass_console
def export(console: Console, memory_id: str, file: Path) -> None:
    """Write the window of MEMORY_ID and every turn of its archive to FILE, as JSON."""
    import json

    client = console.client()
    told = client.get(route(memory_id)) | {"archive": client.all(route(memory_id, "turns"))}
    file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.note(f"{len(told['archive'])} turns written to {file}")
