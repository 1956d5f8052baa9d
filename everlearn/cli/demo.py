"""`everlearn demo`: teach the embedded model a handbook and show what changed."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from everlearn.cli.console import Console, Progress, Verb, pass_console
from everlearn.cli.own_server import LOCAL_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from everlearn.demo.run import Outcome

MODEL = "smollm2"


@click.command("demo", cls=Verb)
@click.option("--open/--no-open", "open_report", default=True, help="open the report in a browser (only from a terminal)")
@click.option("--loop", is_flag=True, help="the whole loop: a user corrects, a version learns it and takes over, a bad one is stopped")
@pass_console
def command(console: Console, open_report: bool, loop: bool) -> None:
    """Teach the embedded model twenty facts and show before and after.

    Starts a server of its own (or uses the one named by --url), trains an adapter through the official Tinker SDK, prints the
    table and writes an HTML report under HOME/demo. Four to six minutes on two free CPU cores; longer on a busy machine.
    """
    from everlearn.demo import handbook, run, teach
    from everlearn.models import embedded

    logging.getLogger("tinker").setLevel(logging.ERROR)  # it warns of every answer that takes longer than one poll
    home = console.settings().home
    stage = _stages(console)
    started = time.monotonic()
    with stage("preparing the model", 1.0) as bar:
        folder = embedded.ensure(MODEL, home, lambda text, share: bar.update(share, text))
    prepared = time.monotonic() - started
    lesson, recipe = handbook.load(), teach.Recipe()
    if loop:
        with _server(console, home, stage) as url:
            _loop(console, url, home / "demo", open_report)
        return
    with _server(console, home, stage) as url:
        ready = time.monotonic() - started - prepared
        outcome = run.run(lesson, recipe, url, console.key or LOCAL_KEY, MODEL, folder, stage)
    seconds = {"model": round(prepared, 1), "server": round(ready, 1), **outcome.seconds, "total": round(time.monotonic() - started, 1)}
    report = _write(home / "demo", lesson.company, outcome, seconds)
    _show(console, outcome, seconds, report)
    next_steps(console, outcome)
    if open_report and sys.stdout.isatty():
        webbrowser.open(report.as_uri())


def _loop(console: Console, url: str, folder: Path, open_report: bool) -> None:
    """The loop's story, and what came of it."""
    import msgspec
    import tinker

    from everlearn.cli.client import Client
    from everlearn.demo import handbook, loop_report, story

    book = handbook.load()
    client = Client(url, console.key or "", timeout=600.0)
    with tinker.ServiceClient(base_url=url, api_key=console.key or LOCAL_KEY, user_metadata={"client": "everlearn demo"}) as service:
        told = story.play(book, client, service, MODEL, {}, console.note)
    client.close()
    facts = {"model": MODEL, "seconds": ", ".join(f"{name} {value:.0f}" for name, value in told.seconds.items())}
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "loop.html"
    page.write_text(loop_report.render(book.company, told, facts), encoding="utf-8")
    (folder / "loop.json").write_bytes(msgspec.json.format(msgspec.json.encode(told)))
    if console.format == "json":
        console.result({**msgspec.to_builtins(told), "report": str(page)})
        return
    totals = [msgspec.structs.asdict(score) for score in told.scores]
    console.table([{**event, "reason": _short(event["reason"], 90)} for event in told.events], ["kind", "champion", "candidate", "reason"])
    click.echo()
    console.table(totals, list(totals[0]))
    click.echo()
    stopped = _short(told.stopped, 90)
    console.result({"learned in s": told.learned, "rollback in s": told.rollback_seconds, "bad version": stopped, "report": page})
    where = f" --home {shlex.quote(str(console.home))}" if console.home else ""
    first = "" if console.url else f"everlearn serve{where}, then "
    console.note(
        f"Its history, and the pages to look at it: {first}{(console.url or 'http://127.0.0.1:8000').rstrip('/')}/dashboard/deploys"
    )
    if open_report and sys.stdout.isatty():
        webbrowser.open(page.as_uri())


def _stages(console: Console) -> Callable[[str, float], AbstractContextManager[Progress]]:
    """A bar for each stage on a terminal; elsewhere a line for each tenth of it, and one when it is over."""

    @contextmanager
    def stage(label: str, total: float) -> Iterator[Progress]:
        started = time.monotonic()
        with console.progress(label, total, lines=True) as bar:
            yield bar
        if not sys.stderr.isatty():
            console.note(f"{label}: {time.monotonic() - started:.1f} s")

    return stage


@contextmanager
def _server(console: Console, home: Path, stage: Callable[[str, float], AbstractContextManager[Progress]]) -> Iterator[str]:
    """The URL of a server: the one that was named, else one of the demo's own."""
    from everlearn.demo.server import serving

    if console.url:
        yield console.url
        return
    with ExitStack() as stack:
        with stage("starting the server", 0.0) as bar:
            log = home / "demo" / "server.log"
            url = stack.enter_context(serving(home, log, console.config, lambda seconds, state: bar.update(round(seconds), state)))
        yield url


def next_steps(console: Console, outcome: Outcome) -> None:
    """What to type now, to talk to what was taught; a server that the demo started has ended."""
    home = f" --home {shlex.quote(str(console.home))}" if console.home else ""
    config = f" --config {shlex.quote(str(console.config))}" if console.config else ""
    where = f" --url {shlex.quote(console.url)}" if console.url else home + config
    console.note("Next, ask it yourself:" if console.url else "Next, ask it yourself, with two terminals:")
    if not console.url:
        console.note(f"  everlearn serve{where}")
    console.note(f"  everlearn chat {outcome.path} -m {shlex.quote(outcome.rows[0].question)}{where}")


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
    width = shutil.get_terminal_size((120, 0)).columns // 3 - 2
    questions = [
        {
            "question": _short(row.question, width),
            "before": _short(f"{'+' if row.right_before else '-'} {row.before}", width),
            "after": _short(f"{'+' if row.right_after else '-'} {row.after}", width),
        }
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


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
