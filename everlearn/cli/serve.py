"""`everlearn serve`: the server in the foreground."""

from __future__ import annotations

import click

from everlearn.cli.console import Console, Verb, pass_console


@click.command("serve", cls=Verb)
@click.argument("model", required=False)
@click.option("--host", metavar="ADDRESS", help="address to listen on [default: 127.0.0.1]; beyond localhost a key must exist")
@click.option("--port", type=int, metavar="PORT", help="port to listen on [default: 8000]; 0 picks a free one")
@click.option("--log", "log_format", type=click.Choice(["text", "json"]), help="how log lines are written")
@pass_console
def command(console: Console, model: str | None, host: str | None, port: int | None, log_format: str | None) -> int:
    """Serve MODEL: an alias, a Hugging Face folder or a cached hub id [default: the embedded model].

    \b
    Point the tinker SDK at it:
        TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python train.py
    """
    from everlearn.engine.matching import check_installed
    from everlearn.models.catalog import Catalog

    settings = console.settings({"models.default": model, "api.host": host, "api.port": port, "api.log_format": log_format})
    check_installed(settings.engine.grammar)
    Catalog(settings)  # a wrong model is said now, not after the server has started; the server converts an embedded one itself
    from everlearn.api.server import run

    return run(settings)
