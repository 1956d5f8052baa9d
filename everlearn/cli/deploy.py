"""`everlearn deploy`: which version answers under a name, and how the next one comes there."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console
from everlearn.errors import InvalidRequest

command = Noun("deploy", help="Deployments: what answers under a name, what is tried beside it, and why.")
COLUMNS = ["name", "champion", "candidate", "state", "share", "paused", "base_model"]
REASON = click.option("--reason", default="", help="why; kept in the history")
EVENTS = ["created", "kind", "state", "champion", "candidate", "share", "actor", "reason"]


def route(name: str) -> str:
    return f"/v1/deployments/{quote(name, safe='')}"


def row(found: dict[str, Any]) -> dict[str, Any]:
    """A deployment's line: what serves, and since when."""
    shown = {name: found[name] for name in COLUMNS}
    return {**shown, "previous": found["previous"], "changed": _time(found["changed_at"]), "revision": found["revision"]}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _describe(file: Path, name: str) -> tuple[str, dict[str, Any]]:
    """The deployment's name, `name` or else the one in FILE, and its description."""
    from everlearn.loop import description

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not UTF-8 ({error}); save it as UTF-8", param="file") from None
    named, found = description.read(text)
    if not (name or named):
        raise click.UsageError('the deployment has no name; write name = "support" into FILE, or give --name')
    return name or named, description.to_json(found)


@command.command("create")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", default="", help="the deployment's name (else `name` in FILE)")
@click.option("--champion", type=click.IntRange(min=0), metavar="NUMBER", help="what serves at first; 0: the base model")
@REASON
@pass_console
def create(console: Console, file: Path, name: str, champion: int | None, reason: str) -> None:
    """Serve a name as FILE (TOML) describes it: sections triggers, update, continuous, shadow, reward, budget and gate.

    What the name means already goes on serving; a new name is the base model until a version is promoted. The same FILE again
    changes nothing.
    """
    name, described = _describe(file, name)
    body = {"name": name, "description": described, "champion": champion, "reason": reason}
    console.result(row(console.client().post("/v1/deployments", body)))


@command.command("change")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", default="", help="the deployment's name (else `name` in FILE)")
@REASON
@pass_console
def change(console: Console, file: Path, name: str, reason: str) -> None:
    """Describe a deployment anew, for what is done from now on."""
    name, described = _describe(file, name)
    console.result(row(console.client().patch(route(name), {"description": described, "reason": reason})))


@command.command("list")
@pass_console
def list_deployments(console: Console) -> None:
    """List deployments: what answers, and what is tried."""
    console.table([row(found) for found in console.client().all("/v1/deployments")], COLUMNS)


@command.command("show")
@click.argument("name")
@pass_console
def show(console: Console, name: str) -> None:
    """Show NAME: what answers, what is tried, and its latest transition."""
    client = console.client()
    found = client.get(route(name))
    if console.format == "json":
        console.result(found)
        return
    last = client.get(route(name) + "/history", limit=1)["data"]
    console.result(row(found) | {"latest": ": ".join(filter(None, (last[0]["kind"], last[0]["reason"]))) if last else ""})


@command.command("history")
@click.argument("name")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=50, help="how many, the newest")
@pass_console
def history(console: Console, name: str, limit: int) -> None:
    """List what happened to NAME, newest first; with -f json each with its evidence."""
    found = console.client().get(route(name) + "/history", limit=limit)["data"]
    console.table([{**event, "created": _time(event["created_at"])} for event in found], EVENTS)


@command.command("promote")
@click.argument("name")
@click.option("--to", "number", type=click.IntRange(min=0), metavar="NUMBER", help="this version, else the candidate; 0: the base model")
@REASON
@pass_console
def promote(console: Console, name: str, number: int | None, reason: str) -> None:
    """Let NAME's candidate answer everybody from the next request on."""
    console.result(row(console.client().post(route(name) + "/promote", {"number": number, "reason": reason})))


@command.command("rollback")
@click.argument("name")
@click.option("--to", "number", type=click.IntRange(min=0), metavar="NUMBER", help="back to this version; 0: the base model")
@REASON
@pass_console
def rollback(console: Console, name: str, number: int | None, reason: str) -> None:
    """Give up the candidate that is tried; where none is, go back to what answered before."""
    console.result(row(console.client().post(route(name) + "/rollback", {"number": number, "reason": reason})))


@command.command("pause")
@click.argument("name")
@click.option("--off", is_flag=True, help="go on")
@REASON
@pass_console
def pause(console: Console, name: str, off: bool, reason: str) -> None:
    """Let the champion alone answer, and nothing be learned, until `--off`."""
    console.result(row(console.client().patch(route(name), {"paused": not off, "reason": reason})))


@command.command("delete")
@click.argument("name")
@pass_console
def delete(console: Console, name: str) -> None:
    """Give up the deployment NAME. The name goes on meaning its champion, and its history stays."""
    console.confirm(f"nothing will be learned for {name} any more, and its candidate answers nobody")
    console.client().delete(route(name))
    console.note(f"deleted deployment {name}; the name means what it meant, and moves with everlearn adapter move again")


@command.command("run")
@click.argument("name")
@click.option("--once", is_flag=True, help="go as far as it goes now, then end (without it: begin a cycle by hand, as far as it goes)")
@click.option("--watch", is_flag=True, help="stay, and do what is due")
@click.option("--candidate", type=click.IntRange(min=1), metavar="NUMBER", help="try this version instead of training one")
@click.option("--poll", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="seconds between two looks with --watch")
@pass_console
def run(console: Console, name: str, once: bool, watch: bool, candidate: int | None, poll: float) -> None:
    """Do NAME's work: collect, dataset, update, gate, shadow, canary. A client like any other, with a key of its own.

    Whatever ends it, the next one goes on where it was. Without --once and --watch a cycle begins now, whatever the triggers say.
    """
    import logging

    import tinker

    from everlearn import faultpoints
    from everlearn.config import faults
    from everlearn.loop.runner import Runner

    if once and watch:
        raise click.UsageError("--once and --watch exclude each other")
    logging.getLogger("tinker").setLevel(logging.ERROR)  # it warns of every answer that takes longer than one poll
    faultpoints.arm(faults(), console.settings().home)
    client = console.client()
    told = {"client": "everlearn deploy"}
    with tinker.ServiceClient(base_url=client.url, api_key=client.key or "tml-local", user_metadata=told) as service:
        runner = Runner(client, service, name, console.note)
        if candidate is not None:
            runner.enter(candidate)
        elif not (once or watch):
            runner.begin("by hand")
        if watch:
            runner.watch(poll)
        else:
            runner.run()
    console.result(row(client.get(route(name))))
