"""`everlearn eval`: studies of what a model learns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli import own_server
from everlearn.cli.console import Console, Noun, pass_console
from everlearn.cli.retained import retained
from everlearn.cli.safety import safety

if TYPE_CHECKING:
    from everlearn.evals.fewshot_report import Point
    from everlearn.evals.fewshot_study import Finished, Recipe, Run, Study
    from everlearn.evals.fewshot_vision import Photo
    from everlearn.types import BaseModelInfo

command = Noun("eval", help="Study what a model learns, and what it forgets.")
command.add_command(retained)
command.add_command(safety)


class Names(click.ParamType):
    """`one,two,three`"""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in str(value).split(","))
        if not all(names) or len(set(names)) != len(names):
            self.fail(f"{value!r} is no list of different names; write it like A,B", param, ctx)
        return names


class Numbers(click.ParamType):
    """`1,2,4`"""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
            self.fail(f"{value!r} is no list of numbers; write it like 1,2,4", param, ctx)
        return tuple(int(part) for part in parts)


@command.command("fewshot-vision")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FOLDER",
    help="a folder for each class, or train/ and test/ with those",
)
@click.option("--model", required=True, metavar="NAME|FOLDER", help="a base model that sees")
@click.option("--shots", type=Numbers(), default="1,2,4,8,16", show_default=True, help="photos of each class, one adapter for each number")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="KIND:FOLDER",
    help="linear-probe or nearest-centroid on the tower in a folder; may be repeated",
)
@click.option("--classes", type=Names(), help="study these classes [default: all]")
@click.option("--hold-out", type=Names(), default=(), help="leave these classes out")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="how often all of it is done, with other photos"
)
@click.option(
    "--tests", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="photos that are asked about, at most"
)
@click.option("--rank", type=click.IntRange(min=1), default=32, show_default=True, help="of the adapters")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True, help="learning rate, constant")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="photos of a step")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="how often each photo of the largest number of shots is shown; fewer shots are repeated more often",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("fewshot-vision"),
    show_default=True,
    metavar="FOLDER",
    help="for results.json, curves.svg and report.html",
)
@pass_console
def fewshot_vision(console: Console, data: Path, model: str, out: Path, **options: Any) -> None:
    """Teach classes of photos from a few examples each, and count how many new photos are named rightly.

    Trains an adapter for every seed and number of shots through the Tinker API, with as many steps for each number, and asks it about
    the same test photos. Baselines are fitted to the same photos. Starts a server of its own, or uses the one that --url or EVERLEARN_URL
    names (the model's folder must be on this machine too, for its tokenizer). Interrupted, it goes on where it stopped if nothing else is
    changed.
    """
    from everlearn.evals import fewshot_vision as photos
    from everlearn.evals.fewshot_study import Finished, Gallery, Recipe
    from everlearn.evals.prompts import VisionPrompt

    shots, seeds = options["shots"], options["seeds"]
    split = photos.read_split(data, options["classes"], options["hold_out"])
    photos.check(split, shots)
    info = own_server.resolved(console, model)
    prompt = VisionPrompt.load(info)
    tests = photos.tests_of(split, options["tests"])
    gallery = Gallery(split, shots, range(seeds), tests)
    probes = _probes(options["baselines"])
    recipe = Recipe(options["rank"], options["lr"], options["batch"], options["repeats"] * max(shots))
    console.note(f"{len(split.train)} classes ({', '.join(split.train)}), {len(tests)} photos to ask about")
    facts = {**options, "data": data.name, "model": info.name, "recipe": recipe, "labels": list(split.train), "photos": gallery.digest()}
    finished = Finished(out / "runs.jsonl", facts)
    runs = [_noted(console, probe.run(split.train, tests, gallery, k, seed)) for probe in probes for seed in range(seeds) for k in shots]
    with _study(console, info, (prompt, split, tests, gallery)) as study:
        runs = [*_taught(console, study, shots, seeds, recipe, finished), *runs]
    _write(console, out, facts, runs, tests)


def _probes(baselines: tuple[str, ...]) -> list[Any]:
    if not baselines:
        return []
    from everlearn.evals.probes import probes_of

    return [*probes_of(baselines)]


@contextmanager
def _study(console: Console, info: BaseModelInfo, parts: tuple[Any, ...]) -> Iterator[Study]:
    """The study on the server that was named, else on one of its own."""
    from contextlib import ExitStack

    from everlearn.evals.fewshot_study import Study

    logging.getLogger("tinker").setLevel(logging.ERROR)  # it warns of every answer that takes longer than one poll
    with ExitStack() as stack:
        service = own_server.service(console, stack, info, "eval", "everlearn eval")
        yield Study(service, info.name, *parts)


def _taught(console: Console, study: Study, shots: tuple[int, ...], seeds: int, recipe: Recipe, finished: Finished) -> list[Run]:
    runs = [finished.find(study.model, 0, 0) or _noted(console, finished.add(study.untaught()))]
    for seed in range(seeds):
        for k in shots:
            run = finished.find(study.model, k, seed)
            if run is None:
                with console.progress(f"seed {seed}, {k} shots", 1.0) as bar:
                    run = finished.add(study.run(k, seed, recipe, lambda done, of, bar=bar: bar.update(done / of)))  # type: ignore[misc]
                _noted(console, run)
            runs.append(run)
    return runs


def _noted(console: Console, run: Run) -> Run:
    loss = "" if run.loss is None else f", loss {run.loss:.3f}"
    console.note(f"{run.method}, {run.shots} shots, seed {run.seed}: {run.correct} of {run.asked} right{loss}, {run.seconds:.1f} s")
    return run


def _write(console: Console, out: Path, facts: dict[str, Any], runs: list[Run], tests: list[Photo]) -> None:
    import msgspec

    from everlearn.evals import fewshot_report as report

    found = report.points(runs)
    labels = facts["labels"]
    out.mkdir(parents=True, exist_ok=True)
    title = f"{facts['model']} names {len(labels)} classes of {facts['data']} after a few photos"
    (out / "curves.svg").write_text(report.curves(found, len(labels)) + "\n", encoding="utf-8")
    page = report.page(title, _told(facts, runs), found, runs, tests, labels)
    (out / "report.html").write_text(page, encoding="utf-8")
    asked = [f"{photo.label}/{photo.path.name}" for photo in tests]
    record = {"settings": facts, "points": [point._asdict() for point in found], "asked": asked, "runs": runs}
    (out / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(record, enc_hook=str)) + b"\n")
    _show(console, found, out)


def _told(facts: dict[str, Any], runs: list[Run]) -> dict[str, str]:
    taught = [run for run in runs if run.steps]
    recipe = facts["recipe"]
    return {
        "model": facts["model"],
        "classes": ", ".join(facts["labels"]),
        "photos asked about": str(runs[0].asked),
        "seeds": str(facts["seeds"]),
        "adapters": f"rank {recipe.rank}, learning rate {recipe.learning_rate:g}, {taught[0].steps} steps of {recipe.batch} photos each",
        "training tokens": f"{sum(run.tokens for run in taught):,}",
        "seconds": f"{sum(run.seconds for run in runs):.0f}",
    }


def _show(console: Console, found: list[Point], out: Path) -> None:
    from everlearn.evals.fewshot_report import told

    if console.format == "json":
        console.result({"points": [point._asdict() for point in found], "report": str(out / "report.html")})
        return
    shots = sorted({point.shots for point in found})
    rows: dict[str, dict[str, str]] = {}
    for point in found:
        rows.setdefault(point.method, {"accuracy in %": point.method})[f"{point.shots} shots"] = told(point)
    console.table(list(rows.values()), ["accuracy in %", *(f"{n} shots" for n in shots)])
    click.echo()
    console.result({"report": out / "report.html", "results": out / "results.json", "plot": out / "curves.svg"})


from everlearn.cli import eval_memory  # noqa: E402, F401  # adds its verb; it takes the types above
