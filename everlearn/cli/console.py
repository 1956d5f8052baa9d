"""What every sub-command shares: the global options, the two output formats, and the way to settings and to a running server.

Results go to stdout, everything else to stderr. Nothing heavy is imported at the top: this module is on the path of `--help`.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from everlearn.cli.client import Client
    from everlearn.config import Loaded, Settings


class Console:
    """One invocation: what the global options said, and how to speak to the person or program in front."""

    def __init__(self) -> None:
        self.format = "table"
        self.quiet = False
        self.yes = False
        self.debug = False
        self.url: str | None = None
        self.key: str | None = None
        self.home: Path | None = None
        self.config: Path | None = None

    def load(self, flags: Mapping[str, Any] | None = None) -> Loaded:
        """The settings with their origins; --home and --config count as flags."""
        from everlearn.config import load

        return load(self.config, flags={"home": self.home, **(flags or {})})

    def settings(self, flags: Mapping[str, Any] | None = None) -> Settings:
        return self.load(flags).settings

    def client(self, timeout: float = 60.0) -> Client:
        """A client of the running server: --url and --key, else the environment, else where the home's server says it listens."""
        from everlearn.cli.client import Client

        client = Client(self.named_url or self._own_server(), self.named_key, timeout)
        click.get_current_context().call_on_close(client.close)
        return client

    @property
    def named_url(self) -> str:
        """The server that --url names, else the environment; empty where neither does."""
        from everlearn.config import client_environ

        return self.url or client_environ().url

    @property
    def named_key(self) -> str:
        """The API key of --key, else of the environment, else none."""
        from everlearn.config import client_environ

        return self.key or client_environ().key

    def _own_server(self) -> str:
        settings = self.settings()
        try:
            return str(json.loads((settings.home / "server.json").read_text())["url"])
        except (OSError, ValueError, KeyError):  # none has started here, or it has stopped: the error then names the usual address
            return f"http://{settings.api.host}:{settings.api.port}"

    # --- results, on stdout -------------------------------------------------------------------------------------------------

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """`rows` under `columns`; with -f json the rows as they are, every field included."""
        if self.format == "json":
            _print_json(rows)
            return
        cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if not rows:
            self.note("(none)")

    def result(self, values: Mapping[str, Any]) -> None:
        """One thing: a line for each field, or one JSON object."""
        if self.format == "json":
            _print_json(values)
            return
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            click.echo(f"{name.ljust(width)}  {_cell(value)}".rstrip())

    # --- everything else, on stderr -----------------------------------------------------------------------------------------

    def note(self, message: str) -> None:
        if not self.quiet:
            click.echo(message, err=True)

    def error(self, what: str, remedy: str) -> None:
        click.echo(f"error: {what}\n       {remedy}", err=True)

    @contextmanager
    def progress(self, label: str, total: float | None = None, lines: bool = False) -> Iterator[Progress]:
        """A bar on a terminal; elsewhere silence, or with `lines` a line for each tenth: for what takes minutes."""
        terminal = sys.stderr.isatty()
        progress = Progress(label, total, shown=not self.quiet and terminal, lines=lines and not self.quiet and not terminal)
        try:
            yield progress
        finally:
            progress.close()

    def confirm(self, loss: str) -> None:
        """Names what is lost and asks, unless --yes. Where nobody can answer, it refuses."""
        if self.yes:
            return
        if not sys.stdin.isatty():
            raise click.UsageError(f"{loss}. Nobody is here to confirm it; add --yes to go on")
        click.confirm(f"{loss}. Go on?", abort=True, err=True)


class Progress:
    """One line on stderr, redrawn at whole per cents (`shown`), or a line of its own for each tenth but the last (`lines`)."""

    def __init__(self, label: str, total: float | None, shown: bool, lines: bool = False):
        self.label, self.total, self.shown, self.lines = label, total, shown, lines
        self.done, self._tenth = 0.0, 0
        self._drawn = ""

    def advance(self, amount: float = 1) -> None:
        self.update(self.done + amount)

    def update(self, done: float, note: str = "") -> None:
        """`done` in the unit of `total`; `note` stands behind the bar (a loss, a file name)."""
        self.done = done
        if self.total:
            share = min(done / self.total, 1.0)
            text = f"{self.label} [{'#' * round(30 * share):<30}] {share:4.0%} {note}"
            if self.lines and self._tenth < int(10 * share) < 10:
                self._tenth = int(10 * share)
                click.echo(f"{self.label}: {share:.0%} {note}".rstrip(), err=True)
        else:
            text = f"{self.label} {done:g} {note}"
        if self.shown and text != self._drawn:
            click.echo(f"\r\x1b[K{text.rstrip()}", nl=False, err=True)
            self._drawn = text

    def close(self) -> None:
        if self._drawn:
            click.echo(err=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str, ensure_ascii=False)
    from everlearn.telemetry import escape

    return escape(str(value))  # names come from clients: a control character must not reach the terminal as one


def global_options() -> list[click.Parameter]:
    """Accepted before the noun and after the verb alike; the last one given wins."""

    def keep(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
        def callback(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
            if value is not None and value is not False:
                setattr(ctx.ensure_object(Console), name, value)

        return callback

    def option(*names: str, keeps: str, **settings: Any) -> click.Option:
        return click.Option(names, expose_value=False, callback=keep(keeps), **settings)

    folder = click.Path(path_type=Path)
    return [
        option("-f", "--format", keeps="format", type=click.Choice(["table", "json"]), help="how results are printed"),
        option("-q", "--quiet", keeps="quiet", is_flag=True, help="no progress and no notes on stderr"),
        option("-y", "--yes", keeps="yes", is_flag=True, help="do not ask before something is lost"),
        option("--url", keeps="url", metavar="URL", help="the server (else EVERLEARN_URL, else this home's server)"),
        option("--key", keeps="key", metavar="KEY", help="the API key (else EVERLEARN_API_KEY)"),
        option("--home", keeps="home", type=folder, metavar="DIR", help="folder of all data (else EVERLEARN_HOME, else ~/.everlearn)"),
        option("--config", keeps="config", type=folder, metavar="FILE", help="settings file (else ./everlearn.toml)"),
        option("--debug", keeps="debug", is_flag=True, help="print the traceback of an error"),
    ]


class Verb(click.Command):
    """A command that takes the global options too."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.params += global_options()


class Noun(click.Group):
    """A group of verbs."""

    command_class = Verb

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a verb: the help on stderr, a usage error. (click's own way differs by its version, and newer ones raise it.)"""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown verb's error names the ones that are spelled like it, as click does for options."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx))
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {' or '.join(map(repr, near))}?", ctx) from None


pass_console = click.make_pass_decorator(Console)
