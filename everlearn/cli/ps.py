"""`everlearn ps`: what the running server is doing now."""

from __future__ import annotations

import click

from everlearn.cli.console import Console, Verb, pass_console


@click.command("ps", cls=Verb)
@pass_console
def command(console: Console) -> None:
    """Show the state of the server, of its engine and of its queues."""
    client = console.client()
    health = client.document("/health")
    engine = health.pop("engine", None)
    rows = {"url": client.url, **health, **(engine if isinstance(engine, dict) else {})}
    console.result({"url": client.url, **health, "engine": engine} if console.format == "json" else rows)
