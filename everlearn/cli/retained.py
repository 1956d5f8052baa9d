"""`everlearn eval retained`: what a model still can after it was trained on something else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli.console import Console, Verb, pass_console

if TYPE_CHECKING:
    from everlearn.evals.asked import Suite
    from everlearn.evals.retained import Change, Results

FELL = 5  # the exit code that says so


@click.command("retained", cls=Verb)
@click.option("--before", required=True, metavar="MODEL|FILE", help="what the model was: a base model, adapter or path, or results of it")
@click.option("--after", required=True, metavar="MODEL|FILE", help="what it is now")
@click.option(
    "--data",
    "folders",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FOLDER",
    help="ask also what is in this folder: .jsonl with instructions or questions, .txt with texts; may be repeated",
)
@click.option("--only-data", is_flag=True, help="leave out what comes with everlearn")
@click.option("--limit", type=click.IntRange(min=5), metavar="N", help="so many units of each file, always the same [default: all]")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="of an answer to an instruction"
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="of the resamples that make the intervals")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="for before.json and after.json, with every answer, and changes.json"
)
@pass_console
def retained(console: Console, before: str, after: str, folders: tuple[Path, ...], out: Path | None, **options: Any) -> None:
    """Ask two models the same things, and say whether anything fell.

    Instructions whose following a rule decides (IFEval's kinds), questions with short answers, the perplexity of texts; what comes with
    everlearn is small, so bring your own too. Asks a running server through the OpenAI API. A metric fell if it got worse by more than
    half the width of its change's 95 % interval (paired bootstrap over units). Exits with 5 if one did, with 0 if none.

    \b
    everlearn eval retained --before smollm2 --after support@3
    everlearn eval retained --before first/after.json --after support@4 --data my-questions
    """
    from everlearn.evals.asked import read_suite
    from everlearn.evals.retained import compare, fallen

    suite = read_suite(folders, not options["only_data"], options["limit"], options["max_tokens"])
    for one in suite.sets:
        note = f", {one.left_out} left out (telling languages apart needs the package py3langid)" if one.left_out else ""
        console.note(f"{one.name}: {len(one.rows)} units{note}")
    then, now = (results(console, name, suite) for name in (before, after))
    changes = compare(then, now, options["seed"])
    if out is not None:
        write(out, then, now, changes)
    show(console, then, now, changes)
    if fallen(changes):
        click.get_current_context().exit(FELL)


def results(console: Console, name: str, suite: Suite) -> Results:
    """Of a model, or as a file has them that --out wrote."""
    import msgspec

    from everlearn.errors import InvalidRequest
    from everlearn.evals.asking import measure
    from everlearn.evals.retained import Results

    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            return msgspec.json.decode(path.read_bytes(), type=Results)
        except (msgspec.DecodeError, OSError) as error:
            raise InvalidRequest(f"{path} holds no results ({error}); name a file that --out wrote", param="before") from None
    client, started = console.client(), time.monotonic()
    with console.progress(name, float(suite.num_units), lines=True) as bar:
        found = measure(client.url, name, suite, client.key, lambda done: bar.update(done))
    console.note(f"{name}: {suite.num_units} units in {time.monotonic() - started:.0f} s")
    return found


def write(out: Path, before: Results, after: Results, changes: list[Change]) -> None:
    import msgspec

    out.mkdir(parents=True, exist_ok=True)
    told = {"before": before.model, "after": after.model, "suite": before.suite, "changes": [_told(change) for change in changes]}
    for name, value in (("before", before), ("after", after), ("changes", told)):
        (out / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(value)) + b"\n")


def _told(change: Change) -> dict[str, Any]:
    """All that a program may want, the figures that follow from others included."""
    import msgspec

    return {**msgspec.to_builtins(change), "change": change.change, "half_width": change.half_width, "verdict": change.verdict}


def show(console: Console, before: Results, after: Results, changes: list[Change]) -> None:
    from everlearn.evals.retained import COLUMNS, fallen, rows, said

    if console.format == "json":
        told = [_told(change) for change in changes]
        console.result({"before": before.model, "after": after.model, "fell": fallen(changes), "changes": told})
        return
    console.table(rows(changes), COLUMNS)
    click.echo(said(changes))
