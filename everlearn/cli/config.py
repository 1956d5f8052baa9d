"""`everlearn config`: what is set, where it came from, and what could be set."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import click

from everlearn.cli.console import Console, Noun, pass_console

command = Noun("config", help="Settings and where each one came from.")


@command.command("show")
@click.option("--changed", is_flag=True, help="only settings that differ from their default's origin")
@pass_console
def show(console: Console, changed: bool) -> None:
    """Print every setting, its value and its origin; of store.url without its password."""
    from everlearn.config import masked

    settings, origins = console.load()
    rows: list[dict[str, Any]] = []
    for key, origin in origins.items():
        if changed and origin == "default":
            continue
        value = reduce(getattr, key.split("."), settings)
        shown = masked(str(value)) if key == "store.url" else _plain(value)
        rows.append({"setting": key, "value": shown, "origin": origin})
    console.table(rows, ["setting", "value", "origin"])


@command.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@pass_console
def check(console: Console, file: Path | None) -> None:
    """Check FILE (or the settings in force) and say what is wrong."""
    from everlearn.config import find_file

    if file is not None:
        console.config = file
    console.load()
    console.note(f"{find_file(console.config) or 'no file; defaults and environment'}: ok")


@command.command("schema")
@pass_console
def schema(console: Console) -> None:
    """Print the JSON schema of the settings file."""
    from everlearn.config import schema

    console.format = "json"
    console.result(schema())


def _plain(value: Any) -> Any:
    """Values as JSON knows them: a list of base models becomes a list of tables."""
    from pydantic import BaseModel

    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value
