"""`everlearn usage`: what was used, as a table, as JSON, or as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from typing import Any

import click

from everlearn.cli.console import Console, Verb, pass_console

PLACES = ("day", "key_id", "model", "kind")
AMOUNTS = ("requests", "tokens_in", "tokens_cached", "tokens_out", "seconds")


@click.command("usage", cls=Verb)
@click.option("--since", metavar="DAY", help="first day, as 2026-01-31 [default: 30 days ago]")
@click.option("--until", metavar="DAY", help="last day, included [default: today]")
@click.option("--by", type=click.Choice(PLACES), multiple=True, help="add up over everything else; may be repeated [default: all four]")
@click.option("--csv", "as_csv", is_flag=True, help="print comma-separated values")
@pass_console
def command(console: Console, since: str | None, until: str | None, by: tuple[str, ...], as_csv: bool) -> None:
    """Show requests, tokens and seconds by day (UTC), key, model and kind of request."""
    lines = console.client().get("/v1/usage", since=since, until=until)["data"]
    places = [place for place in PLACES if place in by] or list(PLACES)
    rows = summed(lines, places)
    if as_csv:
        writer = csv.DictWriter(sys.stdout, [*places, *AMOUNTS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    console.table(rows, [*places, *AMOUNTS])


def summed(lines: Sequence[dict[str, Any]], places: Sequence[str]) -> list[dict[str, Any]]:
    """The lines added up over what `places` leaves out."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        place = tuple(line[name] for name in places)
        total = sums.setdefault(place, {name: line[name] for name in places} | dict.fromkeys(AMOUNTS, 0))
        for name in AMOUNTS:
            total[name] = round(total[name] + line[name], 3)
    return [sums[place] for place in sorted(sums, key=lambda place: tuple(str(part or "") for part in place))]
