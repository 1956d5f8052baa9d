"""`everlearn model`: the base models that this machine knows. Works without a server."""

from __future__ import annotations

from typing import Any

import click

from everlearn.cli.console import Console, Noun, pass_console

command = Noun("model", help="Base models on this machine.")


@command.command("list")
@pass_console
def list_models(console: Console) -> None:
    """List the base models that can be named, the default first."""
    from everlearn.models.catalog import Catalog

    catalog = Catalog(console.settings())
    rows = []
    for entry in catalog.entries():
        row: dict[str, Any] = {
            "name": entry.name,
            "source": entry.source,
            "state": entry.problem,
            "folder": str(entry.folder or entry.given),
        }
        if not entry.problem:
            info = catalog.resolve(entry.name)
            row |= {
                "state": "ready" if catalog.is_ready(entry.name) else "prepared at first use",
                "parameters": info.num_parameters if console.format == "json" else f"{info.num_parameters / 1e6:.1f}M",
                "context": info.max_context,
                "architecture": info.architecture,
                "aliases": info.aliases if console.format == "json" else ", ".join(info.aliases),
                "default": info.name == catalog.default.name,
            }
        rows.append(row)
    console.table(rows, ["name", "default", "parameters", "context", "source", "state", "aliases", "folder"])


@command.command("add")
@click.argument("model")
@click.option("--name", metavar="NAME", help="what clients call it [default: the hub id or the folder's name]")
@click.option("--alias", "aliases", multiple=True, metavar="ID", help="a further id that means this model; may be given again")
@pass_console
def add(console: Console, model: str, name: str | None, aliases: tuple[str, ...]) -> None:
    """Make MODEL known: a Hugging Face folder, a cached hub id, or an embedded model (which is converted now).

    A running server sees it after a restart. Weights aren't copied.
    """
    from everlearn.models import catalog

    settings = console.settings()
    known = catalog.Catalog(settings)
    embedded = next(
        (
            entry.name
            for entry in known.entries()
            if entry.source == "embedded" and model in (entry.name, *known.resolve(entry.name).aliases)
        ),
        None,
    )
    if embedded is None:
        entry = catalog.add(settings, model, name, list(aliases))
        console.result({"name": entry.name, "folder": str(entry.folder), "aliases": list(entry.aliases)})
        return
    if name or aliases:
        raise click.UsageError(f"{embedded} is embedded and keeps its name; give it an alias in the settings ([models.aliases])")
    with console.progress(f"preparing {embedded}", 1.0) as progress:
        info = known.prepare(embedded, lambda text, share: progress.update(share, text))
    console.result({"name": info.name, "folder": info.path, "aliases": info.aliases})
