"""`everlearn serve`: the server in the foreground."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from everlearn.cli.console import Console, Verb, pass_console

if TYPE_CHECKING:
    from everlearn.config import Settings


@click.command("serve", cls=Verb)
@click.argument("model", required=False)
@click.option("--host", metavar="ADDRESS", help="address to listen on [default: 127.0.0.1]; beyond localhost a key must exist")
@click.option("--port", type=int, metavar="PORT", help="port to listen on [default: 8000]; 0 picks a free one")
@click.option("--log", "log_format", type=click.Choice(["text", "json"]), help="how log lines are written")
@pass_console
def command(console: Console, model: str | None, host: str | None, port: int | None, log_format: str | None) -> None:
    """Serve MODEL: an alias, a Hugging Face folder or a cached hub id [default: the embedded model].

    \b
    Point the tinker SDK at it:
        TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python train.py
    """
    flags = {"models.default": model, "api.host": host, "api.port": port, "api.log_format": log_format}
    settings = console.settings(flags)
    prepare(console, settings)
    from everlearn.api.server import run

    run(settings)


def prepare(console: Console, settings: Settings) -> None:
    """Looks the default base model up, and converts an embedded one on its first use."""
    from everlearn.models.catalog import Catalog

    catalog = Catalog(settings)
    name = catalog.default.name
    if not catalog.is_ready(name):
        with console.progress(f"preparing {name}", 1.0) as progress:
            catalog.prepare(name, lambda text, share: progress.update(share, text))
