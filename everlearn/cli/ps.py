"""`everlearn ps`: what the running server is doing now."""

from __future__ import annotations

from typing import Any

import click

from everlearn.cli.console import Console, Verb, pass_console


@click.command("ps", cls=Verb)
@pass_console
def command(console: Console) -> int:
    """Show the state of the server, of its engine and of its queues. Exits with 1 while the server isn't ready."""
    client = console.client()
    state = {"url": client.url, **client.document("/health")}
    console.result(state if console.format == "json" else flat(state))
    return 0 if state["status"] == "ready" else 1


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; a list of names as one line."""
    lines: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            lines |= flat(value, f"{prefix}{name}.")
        else:
            lines[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return lines
