"""`everlearn demo`: users correct the embedded model's answers, and a version that learned them takes over; or only a lesson."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli.console import Console, Progress, Verb, pass_console
from everlearn.cli.own_server import LOCAL_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from everlearn.demo.grade import Row, Score
    from everlearn.demo.run import Outcome

MODEL = "smollm2"


@click.command("demo", cls=Verb)
@click.option("--lesson", is_flag=True, help="only teach twenty facts through the Tinker API, and show before and after")
@click.option("--open/--no-open", "open_report", default=True, help="open the report in a browser (only from a terminal)")
@click.option("--stay/--no-stay", default=None, help="keep the server and its dashboard until Ctrl-C [default: on a terminal]")
@pass_console
def command(console: Console, lesson: bool, open_report: bool, stay: bool | None) -> None:
    """The whole loop on the embedded model: users ask and correct, a version learns it, is tried, and takes over.

    Starts a server of its own (or uses the one that --url or EVERLEARN_URL names). A scripted user asks twenty questions over HTTP
    and corrects the answers; a version learns the corrections, passes the gate, shows itself to a share of the users and goes live; the
    same questions are asked again; a planted bad version is stopped, and a rollback is timed. Prints the table, writes an HTML report
    under HOME/demo, and ends with the address of the dashboard.
    """
    from everlearn.models import embedded

    logging.getLogger("tinker").setLevel(logging.ERROR)  # it warns of every answer that takes longer than one poll
    home = console.settings().home
    stage = _stages(console)
    started = time.monotonic()
    with stage("preparing the model", 1.0) as bar:
        folder = embedded.ensure(MODEL, home, lambda text, share: bar.update(share, text))
    prepared = time.monotonic() - started
    with _server(console, home, stage) as url:
        seconds = {"model": round(prepared, 1), "server": round(time.monotonic() - started - prepared, 1)}
        page = (_lesson if lesson else _loop)(console, url, folder, home / "demo", seconds, started)
        if open_report and sys.stdout.isatty():
            webbrowser.open(page.as_uri())
        wanted = sys.stdout.isatty() and console.format != "json" if stay is None else stay
        end(console, url, wanted and not console.named_url)


def end(console: Console, url: str, stays: bool) -> None:
    """Where all of it can be looked at; waits there for Ctrl-C where the server is the demo's own and stays."""
    page = f"{url.rstrip('/')}/dashboard/deploys"
    if stays:
        console.note(f"Its history and its pages: {page} (Ctrl-C ends the server)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    elif console.named_url:
        console.note(f"Its history and its pages: {page}")
    else:
        home = f" --home {shlex.quote(str(console.home))}" if console.home else ""
        settings = console.settings().api
        console.note(f"Its history and its pages: everlearn serve{home}, then http://{settings.host}:{settings.port}/dashboard/deploys")


def _lesson(console: Console, url: str, folder: Path, into: Path, seconds: dict[str, float], started: float) -> Path:
    """Twenty facts as a lesson; its report. `folder` is the base model's."""
    from everlearn.demo import handbook, run, teach

    book = handbook.load()
    outcome = run.run(book, teach.Recipe(), url, console.named_key or LOCAL_KEY, MODEL, folder, _stages(console))
    seconds = {**seconds, **outcome.seconds, "total": round(time.monotonic() - started, 1)}
    report = _write(into, book.company, outcome, seconds)
    _show(console, outcome, seconds, report)
    next_steps(console, outcome)
    return report


def _loop(console: Console, url: str, _folder: Path, into: Path, seconds: dict[str, float], started: float) -> Path:
    """The loop's story, and what came of it; its report."""
    import msgspec
    import tinker

    from everlearn.cli.client import Client
    from everlearn.demo import handbook, loop_report, story

    def say(line: str) -> None:
        console.note(f"{time.monotonic() - started:5.0f} s  {line}")

    book = handbook.load()
    client = Client(url, console.named_key, timeout=600.0)
    with tinker.ServiceClient(base_url=url, api_key=console.named_key or LOCAL_KEY, user_metadata={"client": "everlearn demo"}) as service:
        told = story.play(book, client, service, MODEL, {}, say)
    client.close()
    seconds = {**seconds, **told.seconds, "total": round(time.monotonic() - started, 1)}
    facts = {"model": MODEL, "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())}
    into.mkdir(parents=True, exist_ok=True)
    page = into / "report.html"
    page.write_text(loop_report.render(book.company, told, facts), encoding="utf-8")
    (into / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode({"seconds": seconds, "story": told})))
    if console.format == "json":
        console.result({**msgspec.to_builtins(told), "seconds": seconds, "report": str(page)})
        return page
    console.table([{**event, "reason": _short(event["reason"], 90)} for event in told.events], ["kind", "champion", "candidate", "reason"])
    for rows in (_answers(told.rows), _totals(told.scores)):
        click.echo()
        console.table(rows, list(rows[0]))
    click.echo()
    shown = {
        "corrections": f"{told.corrections}, of which {told.trained[1]} were trained and {told.held_out[1]} held out",
        "learned in s": told.learned,
        "reward model": loop_report.reward_told(told.reward_model),
        "bad version": _short(told.stopped, 90),
        "rollback in s": told.rollback_seconds,
        "seconds": seconds["total"],
        "report": page,
    }
    console.result(shown)
    return page


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

    if console.named_url:
        yield console.named_url
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
    where = f" --url {shlex.quote(console.named_url)}" if console.named_url else home + config
    console.note("Next, ask it yourself:" if console.named_url else "Next, ask it yourself, with two terminals:")
    if not console.named_url:
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
    for rows in (_answers(outcome.rows), _totals(outcome.scores)):
        console.table(rows, list(rows[0]))
        click.echo()
    console.result({"report": report, "adapter": outcome.path, "seconds": seconds["total"]})


def _answers(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The taught questions before and after, as wide as the terminal."""
    width = shutil.get_terminal_size((120, 0)).columns // 3 - 2
    return [
        {
            "question": _short(row.question, width),
            "before": _short(f"{'+' if row.right_before else '-'} {row.before}", width),
            "after": _short(f"{'+' if row.right_after else '-'} {row.after}", width),
        }
        for row in rows
        if row.section == "taught"
    ]


def _totals(scores: Sequence[Score]) -> list[dict[str, Any]]:
    return [
        {"section": score.section, "asked": score.asked, "right before": score.before, "right after": score.after, "lost": score.lost}
        for score in scores
    ]


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
