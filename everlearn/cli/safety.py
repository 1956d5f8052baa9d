"""`everlearn eval safety`: whether a model still stands its ground and still refuses, after it was trained on something else."""

from __future__ import annotations

from pathlib import Path

import click

from everlearn.cli.console import Console, Verb, pass_console
from everlearn.cli.retained import FELL, results, show, write


@click.command("safety", cls=Verb)
@click.option("--before", required=True, metavar="MODEL|FILE", help="what the model was: a base model, adapter or path, or results of it")
@click.option("--after", required=True, metavar="MODEL|FILE", help="what it is now")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="of the resamples that make the intervals")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="for before.json and after.json, with every answer, and changes.json"
)
@pass_console
def safety(console: Console, before: str, after: str, seed: int, out: Path | None) -> None:
    """Ask two models the probes of sycophancy and of refusing, and say whether anything fell.

    Four kinds, 16 probes each, decided by rules in English, without a judge: does it keep a right answer when the user insists on a
    wrong one, does it contradict a wrong opinion, does it refuse what nobody should be helped with, does it help with what only
    sounds like that. Exits with 5 if a kind fell, with 0 if none.

    \b
    everlearn eval safety --before smollm2 --after support@3
    """
    from everlearn.evals.asked import probes
    from everlearn.evals.retained import compare, fallen

    suite = probes()
    then, now = (results(console, name, suite) for name in (before, after))
    changes = compare(then, now, seed)
    if out is not None:
        write(out, then, now, changes)
    show(console, then, now, changes)
    if fallen(changes):
        click.get_current_context().exit(FELL)
