"""`everlearn model`: the base models that this machine knows. Works without a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli.console import Console, Noun, pass_console

if TYPE_CHECKING:
    from everlearn.models.planner import Plan

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


class Bytes(click.ParamType):
    """80GiB, 141GB, or a plain number of bytes."""

    name = "size"
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size; write 80GiB, 141GB or a number of bytes", param, ctx)
        return int(float(found[1]) * self.units[found[2] or ""])


@command.command("plan")
@click.argument("path", type=click.Path(exists=True, path_type=Path), metavar="FOLDER_OR_CONFIG.json")
@click.option("--rank", type=click.IntRange(1, 4096), default=32, show_default=True, help="rank of the adapter")
@click.option(
    "--layout",
    type=click.Choice(["off", "per_expert", "shared_outer", "rank_split"]),
    default="off",
    show_default=True,
    help="the adapter's matrices on experts",
)
@click.option("--memory", type=Bytes(), metavar="SIZE", help="say what fits in so much memory of a device, 80GiB say")
@pass_console
def plan(console: Console, path: Path, rank: int, layout: str, memory: int | None) -> None:
    """Say what a model takes, from its config.json alone: parameters, adapters, weights in each format, cache of a token.

    Nothing is loaded. With --memory: which formats leave room for one adapter in training, and for how many tokens of cache.
    """
    import dataclasses

    from everlearn.models.planner import make_plan

    found = make_plan(path, rank, layout, memory)
    if console.format == "json":
        console.result(dataclasses.asdict(found))
        return
    _show(console, found)


def _show(console: Console, plan: Plan) -> None:
    console.result(
        {
            "model": plan.model,
            "parameters": _count(plan.parameters),
            "active for a token": _count(plan.active),
            "cache of a token": _size(plan.cache_token_bytes),
            **({"state of a sequence": _size(plan.sequence_state_bytes)} if plan.sequence_state_bytes else {}),
            "layer inputs of a token": f"{_size(plan.checkpoint_token_bytes)} while training with recomputation",
        }
    )
    click.echo()
    share = {part: f"{100 * count / plan.parameters:.1f} %" for part, count in plan.parts.items()}
    rows = [{"part": part, "parameters": _count(count), "share": share[part]} for part, count in plan.parts.items() if count]
    console.table(rows, ["part", "parameters", "share"])
    click.echo()
    trained = {name: count for name, count in plan.lora.items() if count}
    trained[f"everything, experts {plan.layout}" if len(trained) > 3 else "everything"] = plan.adapter_parameters
    columns = [f"adapter of rank {plan.rank}", "parameters", "in training", "served"]
    console.table(
        [dict(zip(columns, [name, _count(count), _size(16 * count), _size(2 * count)], strict=True)) for name, count in trained.items()],
        columns,
    )
    click.echo()
    columns = ["weights", "size"] + ([f"with the adapter in {_size(plan.memory)}", "tokens of cache beside"] if plan.memory else [])
    table = [[way.name, _size(way.bytes), "fits" if way.fits else "too large", f"{way.cache_tokens or 0:,}"] for way in plan.storage]
    console.table([dict(zip(columns, row, strict=False)) for row in table], columns)


def _count(number: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3f} {name}"
    return f"{number:,}"


def _size(number: int) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"
