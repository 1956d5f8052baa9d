"""The verbs `everlearn checkpoint export` and `import`: adapters out of everlearn and into it, each proven by reloading."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Verb, global_options, pass_console
from everlearn.errors import EverlearnError, InternalError, InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from everlearn.config import Settings
    from everlearn.models.export import Adapter
    from everlearn.types import BaseModelInfo

PATH = re.compile(r"tinker://([^/]+)/(weights|sampler_weights|external_weights)/([^/]+)")


class ExportVerb(click.Command):
    """Its --format is the export's; how results are printed is said before the noun (`everlearn -f json checkpoint export ...`)."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.params += [option for option in global_options() if "--format" not in option.opts]


@click.command("export", cls=ExportVerb)
@click.argument("path")
@click.option(
    "--format",
    "form",
    type=click.Choice(["peft", "vllm", "merged"]),
    required=True,
    help="an adapter for PEFT, the same if vLLM can serve it, or full weights",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="the folder to write")
@click.option("--base", metavar="MODEL", help="base model: a known name or a folder [default: the one it was trained on]")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="type of the written weights",
)
@click.option(
    "--check/--no-check", default=True, show_default=True, help="load the result and compare its log-probabilities with everlearn's"
)
@pass_console
def export_command(console: Console, path: str, form: str, out: Path, base: str | None, dtype: str, check: bool) -> None:
    """Write the checkpoint at PATH (tinker://RUN/KIND/NAME or its folder) for other software."""
    from everlearn.models import vllm

    folder_for(out)
    if check and form != "merged" and importlib.util.find_spec("peft") is None:  # said before anything is fetched or written
        raise Unavailable("the reload check of an adapter needs peft; `pip install peft`, or skip the check with --no-check")
    settings = console.settings()
    with adapter_at(console, settings, path, base) as adapter:
        info = base_model(console, settings, base or adapter.base)
        warnings = vllm.check_adapter(adapter, info) if form == "vllm" else []
        warnings += write(console, adapter, info, form, out, dtype)
        for warning in warnings:
            console.note(f"warning: {warning}")
        report: dict[str, Any] = {"folder": str(out), "format": form, "base": info.name, "rank": adapter.rank, "layers": len(adapter.paths)}
        report["bytes"] = sum(file.stat().st_size for file in out.iterdir())
        if form == "vllm":
            report["serve"] = vllm.serve_command(str(info.path), out.absolute().name, out)
        if check:
            report |= prove(console, form, out, adapter, info)
        console.result(report if console.format == "json" else {name.replace("_", " "): value for name, value in report.items()})


def write(console: Console, adapter: Adapter, info: BaseModelInfo, form: str, out: Path, dtype: str) -> list[str]:
    from everlearn.models.export import export_peft
    from everlearn.models.merge import export_merged

    base = Path(info.path)
    if out.exists() and any(out.iterdir()) and not console.yes:
        console.confirm(f"the folder {out} isn't empty; everything in it will be replaced")
    if form != "merged":
        return export_peft(adapter, out, base, str(base), "float32" if dtype == "keep" else dtype, overwrite=True)
    with console.progress("merging", 1.0) as progress:
        return export_merged(adapter, base, out, dtype, overwrite=True, progress=lambda done, of: progress.update(done / of))


def prove(console: Console, form: str, out: Path, adapter: Adapter, info: BaseModelInfo) -> dict[str, Any]:
    """The reload check's figures; raises InternalError where the export doesn't say what the adapter says."""
    console.note("loading the result to compare it with everlearn's own model ...")
    from everlearn.models.parity import check

    parity = check("merged" if form == "merged" else "peft", out, adapter, info)
    figures = {
        "largest_logprob_difference": float(f"{parity.difference:.3g}"),
        "adapter_effect": float(f"{parity.effect:.3g}"),
        "positions": parity.positions,
    }
    if not parity.ok:
        raise InternalError(
            f"the export in {out} differs from everlearn's model by up to {parity.difference:.3g} in log-probability (the adapter itself "
            f"changes {parity.effect:.3g}); don't use it, and report this with the base model's name"
        )
    return figures


@click.command("import", cls=Verb)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--base", required=True, metavar="MODEL", help="the base model it was trained on: a known name or a folder")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="the checkpoint folder to write")
@pass_console
def import_command(console: Console, folder: Path, base: str, out: Path) -> None:
    """Turn the PEFT adapter in FOLDER into a checkpoint folder."""
    from everlearn.models.export import import_peft

    folder_for(out)
    info = base_model(console, console.settings(), base)
    if out.exists():
        console.confirm(f"{out} exists; it will be replaced")
    missing = import_peft(folder, out, info.name, Path(info.path))
    if missing:
        console.note(f"{len(missing)} layers that the adapter left out start at zero effect ({missing[0]}, ...)")
    console.result({"folder": str(out), "base": info.name, "layers added": len(missing)})


def folder_for(out: Path) -> None:
    """Refuses an --out that can't be a folder."""
    file = next((part for part in (out, *out.parents) if part.exists()), None)
    if file is not None and not file.is_dir():
        raise InvalidRequest(f"--out {out}: {file} is a file; name a folder, it is made where there is none", param="out")


# ---- finding things ----


def base_model(console: Console, settings: Settings, name: str) -> BaseModelInfo:
    """A known base model, converted if it is an embedded one, or any folder: on the command line the owner speaks."""
    from everlearn.models.catalog import Catalog, find_folder, read_info

    catalog = Catalog(settings)
    try:
        known = catalog.resolve(name).name
    except NotFound as error:
        if not Path(name).is_dir():
            raise NotFound(f"{error.message}; name its folder with --base") from None
        folder = find_folder(name)
        return read_info(folder.name, folder, [])
    if catalog.is_ready(known):
        return catalog.resolve(known)
    with console.progress(f"preparing {known}", 1.0) as progress:
        return catalog.prepare(known, lambda text, share: progress.update(share, text))


@contextlib.contextmanager
def adapter_at(console: Console, settings: Settings, path: str, base: str | None) -> Iterator[Adapter]:
    """The checkpoint at a folder or tinker:// path: from the home folder on this machine, else fetched from the server."""
    from everlearn.models.export import Adapter

    if not path.startswith("tinker://"):
        yield Adapter(Path(path))
        return
    match = PATH.fullmatch(path)
    if match is None:
        raise InvalidRequest(f"{path!r} is no checkpoint path (tinker://RUN/weights/NAME); copy one from `everlearn checkpoint list`")
    folder = None if console.named_url else local_folder(settings, *match.groups())
    if folder is not None:
        yield Adapter(folder)
        return
    with tempfile.TemporaryDirectory(prefix="everlearn-") as scratch:
        yield fetch(console, settings, match, Path(scratch), base)


def local_folder(settings: Settings, run_id: str, kind: str, name: str) -> Path | None:
    """Where this machine's home keeps that checkpoint, or None. The store is only read; a server may be running on it."""
    if not settings.store.url and not (settings.home / "everlearn.db").is_file():
        return None
    import sqlalchemy as sa

    from everlearn.store.db import open_database
    from everlearn.store.relocate import here
    from everlearn.store.tables import checkpoints as table

    where = (table.c.run_id == run_id) & (table.c.kind == kind) & (table.c.name == name) & (table.c.state == "complete")
    database = open_database(settings.store_url)
    try:
        row = database.read(lambda conn: conn.execute(sa.select(table.c.folder).where(where)).first())
    finally:
        database.close()
    return Path(here(row.folder, settings.home)) if row is not None else None


def fetch(console: Console, settings: Settings, match: re.Match[str], scratch: Path, base: str | None) -> Adapter:
    """The server hands out PEFT files behind signed links; they become a checkpoint folder again."""
    from everlearn.models.export import Adapter, import_peft

    run_id, kind, name = match.groups()
    client = console.client()
    run = f"/api/v1/training_runs/{quote(run_id, safe='')}"
    urls = client.get(f"{run}/checkpoints/{kind}/{quote(name, safe='')}/external_weights_urls")["urls"]
    peft = scratch / "peft"
    peft.mkdir()
    for file, url in urls.items():
        if re.fullmatch(r"[A-Za-z0-9._-]+", file) is None or file.startswith("."):
            raise InvalidRequest(f"the server offers a file named {file[:100]!r}; it isn't fetched")
        console.note(f"fetching {file}")
        download(url, peft / file)
    info = base_model(console, settings, base or client.get(run)["base_model"])
    import_peft(peft, scratch / "checkpoint", info.name, Path(info.path))
    return Adapter(scratch / "checkpoint")


def download(url: str, target: Path) -> None:
    import httpx

    try:
        with httpx.stream("GET", url, timeout=60) as response, target.open("wb") as file:
            if not response.is_success:
                raise EverlearnError(f"{url.split('?')[0]} answered {response.status_code}; try again, the links expire after an hour")
            for chunk in response.iter_bytes(1 << 20):
                file.write(chunk)
    except httpx.HTTPError as error:
        target.unlink(missing_ok=True)
        raise EverlearnError(f"fetching {url.split('?')[0]} failed ({error}); try again") from None
