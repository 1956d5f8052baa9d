"""`everlearn feedback`: say something about an answer, and see what was said."""

from __future__ import annotations

from typing import Any

import click

from everlearn.cli.console import Console, Noun, pass_console
from everlearn.cli.episode import moment
from everlearn.errors import InvalidRequest

command = Noun("feedback", help="What was said about answers.")
COLUMNS = ["id", "created", "kind", "value", "text", "about", "source", "source_id", "counts"]


def row(one: dict[str, Any]) -> dict[str, Any]:
    target = one["target"]
    about = target["record_id"] or target["episode_id"]
    if target["span"]:
        about += f"[{target['span'][0]}:{target['span'][1]}]"
    return {**one, "created": moment(one["created_at"]), "about": about}


@command.command("add")
@click.argument("about")
@click.option("--up", "thumb", flag_value="up", help="the answer is good")
@click.option("--down", "thumb", flag_value="down", help="the answer is bad")
@click.option("--stars", type=float, metavar="NUMBER", help="a figure, named stars unless --name says")
@click.option("--comment", metavar="TEXT", help="a remark")
@click.option("--correct", metavar="TEXT", help="what the answer should have been")
@click.option("--over", metavar="RECORD", help="this answer is better than that one")
@click.option("--outcome", type=click.Choice(["pass", "fail"]), help="how a tool or test ended; --name says which")
@click.option("--name", default="", help="what is rated: a metric, a tool")
@click.option("--choice", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="which of the record's answers")
@click.option("--span", type=(int, int), metavar="FIRST END", help="only these tokens of it")
@click.option("--reason", default="", help="why")
@click.option("--source", type=click.Choice(["human", "program", "model"]), default="human", show_default=True, help="who says it")
@click.option("--source-id", default="", help="who exactly: of each, the last word counts")
@click.option("--dry-run", is_flag=True, help="check it and keep nothing")
@pass_console
def add(console: Console, about: str, choice: int, span: tuple[int, int] | None, over: str | None, dry_run: bool, **said: Any) -> None:
    """Say something about ABOUT, a record (rec_...) or an episode.

    \b
    everlearn feedback add rec_018f... --down --reason "wrong address"
    everlearn feedback add rec_018f... --correct "We open at seven."
    """
    body: dict[str, Any] = kind_of(said, over) | {name: said[name] for name in ("reason", "source", "source_id")}
    body |= {"name": said["name"] or body.get("name", ""), "dry_run": dry_run}
    if about.startswith("rec_"):
        body |= {"record_id": about, "choice": choice}
    else:
        body["episode_id"] = about
    if span:
        body["span"] = list(span)
    console.result(row(console.client().post("/v1/feedback", body)))
    if dry_run:
        console.note("nothing was kept: this was a dry run")


def kind_of(said: dict[str, Any], over: str | None) -> dict[str, Any]:
    """The kind and what it says, of the one option that was given."""
    found: list[dict[str, Any]] = []
    if said["thumb"]:
        found.append({"kind": "boolean", "value": said["thumb"] == "up"})
    if said["stars"] is not None:
        found.append({"kind": "float", "value": said["stars"], "name": "stars"})
    if said["comment"] is not None:
        found.append({"kind": "comment", "text": said["comment"]})
    if said["correct"] is not None:
        found.append({"kind": "demonstration", "text": said["correct"]})
    if over is not None:
        found.append({"kind": "preference", "over": {"record_id": over}})
    if said["outcome"]:
        found.append({"kind": "outcome", "value": said["outcome"] == "pass"})
    if len(found) != 1:
        what = f"{len(found)} things are said at once" if found else "nothing is said"
        raise InvalidRequest(f"{what}; give one of --up, --down, --stars, --comment, --correct, --over, --outcome")
    return found[0]


@command.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="how many, the newest")
@click.option("--record", "record_id", metavar="RECORD", help="about this record")
@click.option("--episode", "episode_id", metavar="EPISODE", help="in this episode")
@click.option("--kind", help="of this kind")
@click.option("--source", type=click.Choice(["human", "program", "model"]), help="of people, programs or models")
@click.option("--source-id", help="of this one")
@pass_console
def list_feedback(console: Console, limit: int, **filters: str | None) -> None:
    """List feedback, the newest first."""
    console.table([row(one) for one in console.client().all("/v1/feedback", limit, **filters)], COLUMNS)
