"""`everlearn dataset`: feedback, frozen to be learned from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console
from everlearn.cli.episode import moment

command = Noun("dataset", help="Feedback, frozen to be learned from.")
COLUMNS = ["id", "created", "name", "form", "train", "heldout", "marks", "content_hash"]


def row(one: dict[str, Any]) -> dict[str, Any]:
    return {**one, "created": moment(one["created_at"]), **one["items"], "content_hash": one["content_hash"][:12]}


def route(dataset: str) -> str:
    return f"/v1/datasets/{quote(dataset, safe='')}"


@command.command("create")
@click.argument("name")
@click.option("--form", type=click.Choice(["sft", "preference", "kto", "prompts"]), required=True, help="what an item is")
@click.option("--model", help="answers of this model; a bare name takes all its versions in")
@click.option("--user", help="answers to this user")
@click.option("--since", type=float, metavar="SECONDS", help="said at this Unix time or later")
@click.option("--until", type=float, metavar="SECONDS", help="said before this Unix time")
@click.option("--source", "sources", type=click.Choice(["human", "program", "model"]), multiple=True, help="said by these alone")
@click.option("--threshold", type=float, help="a figure is good from here on [default: 0.5]")
@click.option("--good", is_flag=True, help="sft: answers that were called good, too")
@click.option("--implicit", is_flag=True, help="kto: weak labels, too")
@pass_console
def create(console: Console, name: str, form: str, sources: tuple[str, ...], **chosen: Any) -> None:
    """Freeze what was said by now as the dataset NAME."""
    filters = {key: value for key, value in chosen.items() if value not in (None, False)}
    if sources:
        filters["sources"] = list(sources)
    made = console.client().post("/v1/datasets", {"name": name, "form": form, "filters": filters})
    console.result(made)
    for reason, count in made["left_out"].items():
        console.note(f"left out: {count} {reason}")


@command.command("list")
@pass_console
def list_datasets(console: Console) -> None:
    """List datasets, the newest first."""
    console.table([row(one) for one in console.client().all("/v1/datasets")], COLUMNS)


@command.command("show")
@click.argument("dataset")
@pass_console
def show(console: Console, dataset: str) -> None:
    """Show DATASET, the versions that learned from it, and what was deleted of its sources."""
    console.result(console.client().get(route(dataset)))


@command.command("export")
@click.argument("dataset")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="write there [default: stdout]")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train", show_default=True, help="which split")
@click.option("--evaluate", is_flag=True, help="it is read to judge, not to train: the held-out split is given for that alone")
@click.option("--tokens", is_flag=True, help="with token ids and log-probabilities as they were sampled")
@pass_console
def export(console: Console, dataset: str, out: Path | None, split: str, evaluate: bool, tokens: bool) -> None:
    """Write the items of DATASET as JSON lines."""
    purpose = "evaluate" if evaluate else "train"
    with console.client().download(f"{route(dataset)}/export", split=split, purpose=purpose, tokens=tokens) as pieces:
        if out is None:
            for piece in pieces:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            return
        with out.open("wb") as file:
            for piece in pieces:
                file.write(piece)
    console.note(f"wrote {out}")


@command.command("rebuild")
@click.argument("dataset")
@pass_console
def rebuild(console: Console, dataset: str) -> None:
    """Make a new dataset of what is left of DATASET, of which something was deleted."""
    console.result(console.client().post(f"{route(dataset)}/rebuild"))


@command.command("delete")
@click.argument("dataset")
@pass_console
def delete(console: Console, dataset: str) -> None:
    """Forget DATASET. Versions that learned from it stay, and are marked."""
    console.confirm(f"the items of {dataset} can't be had again")
    console.client().delete(route(dataset))
    console.note(f"deleted {dataset}")
