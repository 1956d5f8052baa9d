"""`everlearn demo`: teach the embedded model a handbook and show what changed."""

from __future__ import annotations

import sys
import time
import webbrowser
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from everlearn.cli.console import Console, Verb, pass_console

if TYPE_CHECKING:
    from pathlib import Path

    from everlearn.demo.run import Outcome

MODEL = "smollm2"
LOCAL_KEY = "tml-local"  # the SDK wants a key of this form; a server without keys takes any


@click.command("demo", cls=Verb)
@click.option("--open/--no-open", "open_report", default=True, help="open the report in a browser (only from a terminal)")
@pass_console
def command(console: Console, open_report: bool) -> None:
    """Teach the embedded model twenty facts and show before and after.

    Starts a server of its own (or uses the one named by --url), trains an adapter through the official Tinker SDK, prints the
    table and writes an HTML report under HOME/demo. About five minutes on two CPU cores.
    """
    from everlearn.demo import handbook, run, server, teach
    from everlearn.models import embedded

    home = console.settings().home
    started = time.monotonic()
    with console.progress("preparing the model", 1.0) as bar:
        folder = embedded.ensure(MODEL, home, lambda text, share: bar.update(share, text))
    prepared = time.monotonic() - started
    lesson, recipe = handbook.load(), teach.Recipe()
    with console.progress("starting the server") as waiting:
        log = home / "demo" / "server.log"
        with nullcontext(console.url) if console.url else server.serving(home, log, console.config, waiting.update) as url:
            waiting.close()
            ready = time.monotonic() - started - prepared
            outcome = run.run(lesson, recipe, url, console.key or LOCAL_KEY, MODEL, folder, console.progress)
    seconds = {"model": round(prepared, 1), "server": round(ready, 1), **outcome.seconds, "total": round(time.monotonic() - started, 1)}
    report = _write(home / "demo", lesson.company, outcome, seconds)
    _show(console, outcome, seconds, report)
    if open_report and sys.stdout.isatty():
        webbrowser.open(report.as_uri())


def _write(folder: Path, company: str, outcome: Outcome, seconds: dict[str, float]) -> Path:
    import msgspec

    from everlearn.demo import report

    tokens = sum(step.tokens for step in outcome.steps)
    facts = {
        "model": MODEL,
        "adapter": outcome.path,
        "steps": str(len(outcome.steps)),
        "training tokens": f"{tokens:,} ({tokens / max(outcome.seconds['teaching'], 0.1):.0f} a second)",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(report.render(company, facts, outcome.scores, outcome.rows, outcome.steps), encoding="utf-8")
    (folder / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode({"seconds": seconds, "outcome": outcome})))
    return page


def _show(console: Console, outcome: Outcome, seconds: dict[str, float], report: Path) -> None:
    if console.format == "json":
        import msgspec

        console.result({"scores": msgspec.to_builtins(outcome.scores), "seconds": seconds, "adapter": outcome.path, "report": str(report)})
        return
    questions = [
        {"question": row.question, "before": _short(row.before, row.right_before), "after": _short(row.after, row.right_after)}
        for row in outcome.rows
        if row.section == "taught"
    ]
    totals = [
        {"section": score.section, "asked": score.asked, "right before": score.before, "right after": score.after, "lost": score.lost}
        for score in outcome.scores
    ]
    for rows in (questions, totals):
        console.table(rows, list(rows[0]))
        click.echo()
    console.result({"report": report, "adapter": outcome.path, "seconds": seconds["total"]})


def _short(answer: str, right: bool, width: int = 44) -> str:
    text = " ".join(answer.split())
    return f"{'+' if right else '-'} {text if len(text) <= width else text[: width - 1] + '…'}"
