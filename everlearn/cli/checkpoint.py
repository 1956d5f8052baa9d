"""`everlearn checkpoint`: saved weights, by their tinker:// paths."""

from __future__ import annotations

import re
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console
from everlearn.cli.export import PATH, export_command, import_command
from everlearn.errors import InvalidRequest

command = Noun("checkpoint", help="Saved weights of training runs.")
command.add_command(export_command)
command.add_command(import_command)
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def route(path: str) -> str:
    """tinker://RUN/KIND/NAME -> the REST route of that checkpoint."""
    match = PATH.fullmatch(path)
    if match is None:
        raise InvalidRequest(f"{path!r} is no checkpoint path (tinker://RUN/weights/NAME); copy one from `everlearn checkpoint list`")
    run_id, kind, name = match.groups()
    return f"/api/v1/training_runs/{quote(run_id, safe='')}/checkpoints/{kind}/{quote(name, safe='')}"


def seconds(text: str) -> int:
    """ "90", "90s", "12h", "7d" -> seconds."""
    match = re.fullmatch(r"(\d+)([smhdw]?)", text)
    if match is None:
        raise InvalidRequest(f"--ttl {text!r} is no duration; write it like 3600, 12h or 7d", param="ttl")
    return int(match[1]) * UNITS[match[2] or "s"]


@command.command("list")
@click.option("--run", "run_id", metavar="RUN_ID", help="only those of one training run")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="how many, newest first")
@pass_console
def list_checkpoints(console: Console, run_id: str | None, limit: int) -> None:
    """List checkpoints."""
    client = console.client()
    if run_id is None:
        rows = client.pages("/api/v1/checkpoints", "checkpoints", limit)
    else:
        rows = client.get(f"/api/v1/training_runs/{quote(run_id, safe='')}/checkpoints")["checkpoints"][:limit]
    console.table(rows, ["tinker_path", "checkpoint_type", "time", "size_bytes", "public", "expires_at"])


@command.command("show")
@click.argument("path")
@pass_console
def show(console: Console, path: str) -> None:
    """Show what the checkpoint at PATH holds."""
    route(path)
    console.result({"tinker_path": path, **console.client().post("/api/v1/weights_info", {"tinker_path": path})})


@command.command("delete")
@click.argument("paths", nargs=-1, required=True)
@pass_console
def delete(console: Console, paths: tuple[str, ...]) -> None:
    """Delete the checkpoints at PATHS."""
    routes = [route(path) for path in paths]
    console.confirm(f"these weights will be deleted for good: {', '.join(paths)}")
    client = console.client()
    for path, address in zip(paths, routes, strict=True):
        client.delete(address)
        console.note(f"deleted {path}")


@command.command("set-ttl")
@click.argument("path")
@click.option("--ttl", metavar="DURATION", help="time until the checkpoint may be deleted: 3600, 12h, 7d")
@click.option("--remove", is_flag=True, help="keep the checkpoint until someone deletes it")
@pass_console
def set_ttl(console: Console, path: str, ttl: str | None, remove: bool) -> None:
    """Say how long the checkpoint at PATH is kept."""
    if (ttl is None) == (not remove):
        raise click.UsageError("give either --ttl DURATION or --remove")
    lifetime = None if ttl is None else seconds(ttl)
    console.client().put(route(path) + "/ttl", {"ttl_seconds": lifetime})
    console.note(f"{path}: kept for good" if lifetime is None else f"{path}: expires in {lifetime} s")
