"""`everlearn eval memory`: what ways of remembering keep of a history within a budget, and what a model answers from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from everlearn.cli import own_server
from everlearn.cli.console import Console, pass_console
from everlearn.cli.eval import Names, Numbers, command

if TYPE_CHECKING:
    from tinker import SamplingClient

    from everlearn.memory.asking import Asking
    from everlearn.memory.study import Run
    from everlearn.memory.suites import Case
    from everlearn.memory.window import Encode
    from everlearn.types import BaseModelInfo

SUITES = ("synthetic", "longmemeval", "memorybank", "locomo", "msc")


@command.command("memory")
@click.option("--suite", type=click.Choice(SUITES), default="synthetic", show_default=True, help="what is remembered and asked")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="LongMemEval's or LoCoMo's JSON file, MSC's JSON lines, or the folder of MemoryBank's English files",
)
@click.option("--audit", type=click.Path(path_type=Path), metavar="FILE", help="questions of LoCoMo with wrong golds, as a JSON list")
@click.option("--budget", "budgets", type=Numbers(), default="512", show_default=True, help="tokens that may be shown")
@click.option("--methods", type=Names(), default="last,random,bm25,forget,extract", show_default=True, help="ways of remembering")
@click.option("--turns", type=click.IntRange(min=1), default=2000, show_default=True, help="length of a synthetic history")
@click.option("--facts", type=click.IntRange(1, 35), default=20, show_default=True, help="asked about in a synthetic history")
@click.option("--histories", type=click.IntRange(min=1), metavar="N", help="the first N [default: 3 synthetic ones, all of a file]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the first synthetic history and of chance")
@click.option("--head", type=click.Path(path_type=Path), metavar="FILE", help="weights of importance [default: those set by hand]")
@click.option("--model", default="smollm2", show_default=True, metavar="NAME|FOLDER", help="whose tokens are counted, and who answers")
@click.option("--ask", is_flag=True, help="let the model answer as well; what a model writes or decides needs it")
@click.option("--sampler", metavar="TINKER_PATH", help="weights that answer, on the server of --url [default: the base model]")
@click.option("--policy", metavar="TINKER_PATH", help="weights that decide and write, on the server of --url [default: those that answer]")
@click.option("--begin", default="", metavar="TEXT", help="how each answer begins")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="every run with its values, as JSON")
@pass_console
def memory(
    console: Console, suite: str, data: Path | None, audit: Path | None, methods: tuple[str, ...], out: Path | None, **options: Any
) -> None:
    """Let each method read every history turn by turn, then ask all questions and score what it kept.

    Evidence retention (`kept`) looks for the words of the evidence in one piece of what is shown, and needs no model; with --ask the model
    answers from it, scored by exact match, containment and token-F1. Intervals are 95 % over histories and questions.
    """
    from everlearn.memory import study
    from everlearn.memory.methods import BY_HEAD, RULES, WRITERS

    if unknown := [name for name in methods if name not in (*RULES, *WRITERS)]:
        raise click.UsageError(f"--methods: {unknown[0]!r} is none; there are {', '.join((*RULES, *WRITERS))}")
    if not options["ask"] and (writers := [name for name in methods if name in WRITERS]):
        raise click.UsageError(f"--methods: {writers[0]} is written by a model; add --ask")
    if options["head"] is not None and not set(methods) & set(BY_HEAD):
        raise click.UsageError(f"--head weighs for {', '.join(BY_HEAD)}; --methods has none of them")
    if (suite == "synthetic") == (data is not None):
        raise click.UsageError(
            f"--data belongs to the suites {', '.join(SUITES[1:])}; suite {suite} {'takes none' if data else 'needs it'}"
        )
    if audit is not None and suite != "locomo":
        raise click.UsageError(f"--audit belongs to the suite locomo; suite {suite} takes none")
    found, left_out = _cases(suite, data, audit, options)
    for reason, count in left_out.items():
        console.note(f"left out: {count} questions {reason}")
    info = own_server.prepared(console, options["model"])
    runs = []
    with _asking(console, info, options["ask"], options["sampler"], options["begin"], options["policy"]) as asking:
        encode = _encode(info)
        for budget in options["budgets"]:
            for case in found:
                for name in methods:
                    made = _method(name, encode, budget, options["seed"], options["head"], asking)
                    with console.progress(f"{name}, {budget} tokens, {case.name}"):
                        answers = None if asking is None else asking[0].answers
                        one = study.run(suite, case, made, budget, encode, options["seed"], answers, info.max_context - 128)
                    runs.append(_noted(console, one))
    facts = {"suite": suite, "left_out": left_out, "model": info.name}
    _show(console, runs, out, facts | {key: value for key, value in options.items() if key != "model"})


def _cases(suite: str, data: Path | None, audit: Path | None, options: dict[str, Any]) -> tuple[list[Case], dict[str, int]]:
    """What is read and asked, and how many questions were left out (of the whole file), by reason."""
    from everlearn.memory.dialogues import locomo, msc
    from everlearn.memory.suites import longmemeval, memorybank
    from everlearn.memory.synthetic import synthetic

    histories = options["histories"]
    if data is None:
        return [synthetic(options["turns"], options["seed"] + number, options["facts"]) for number in range(histories or 3)], {}
    if suite in ("locomo", "msc"):
        found = locomo(data, audit) if suite == "locomo" else msc(data)
        return found.cases[:histories], found.left_out
    return (longmemeval if suite == "longmemeval" else memorybank)(data)[:histories], {}


def _encode(info: BaseModelInfo) -> Encode:
    from everlearn.render.tokenizer import load

    tokenizer = load(Path(info.path))
    return lambda text: tokenizer.encode(tokenizer.guard(text))


@contextmanager
def _asking(
    console: Console, info: BaseModelInfo, ask: bool, sampler: str | None, begun: str, policy: str | None
) -> Iterator[tuple[Asking, SamplingClient] | None]:
    """The model on the server that was named, else on one of its own, and who decides and writes; None where nothing is asked."""
    if not ask:
        yield None
        return
    from contextlib import ExitStack

    from everlearn.memory.asking import Asking
    from everlearn.render.tokenizer import load
    from everlearn.rl.prompts import ChatMl

    logging.getLogger("tinker").setLevel(logging.ERROR)  # it warns of every answer that takes longer than one poll
    with ExitStack() as stack:
        service = own_server.service(console, stack, info, "eval", "everlearn eval")
        made = service.create_sampling_client(**({"model_path": sampler} if sampler else {"base_model": info.name})).result()
        tokenizer = load(Path(info.path))
        writer = service.create_sampling_client(model_path=policy).result() if policy else made
        yield Asking(made, ChatMl(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special=True)), begun), writer


def _method(name: str, encode: Encode, budget: int, seed: int, head: Path | None, asking: tuple[Asking, SamplingClient] | None) -> Any:
    from everlearn.memory import importance
    from everlearn.memory.methods import method

    weights = importance.BY_HAND if head is None else importance.load(head)
    if asking is None:
        return method(name, encode, budget, seed=seed, head=weights)
    from everlearn.memory.decide import Certain
    from everlearn.memory.generate import Generate

    model, writer = asking
    refill, decided = Generate(writer, model.chat), Certain(writer, model.chat, once=True)
    return method(name, encode, budget, seed=seed, head=weights, write=model.write, refill=refill, decided=decided)


def _noted(console: Console, run: Run) -> Run:
    kept = sum(run.kept) / max(1, len(run.kept))
    console.note(f"{run.method}, {run.budget} tokens, {run.case}: kept {kept:.0%}, {1000 * run.seconds_per_turn:.2f} ms per turn")
    return run


def _show(console: Console, runs: list[Run], out: Path | None, facts: dict[str, Any]) -> None:
    import msgspec

    from everlearn.memory.study import METRICS, summed

    rows = summed(runs)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": facts, "rows": rows, "runs": runs}
        out.write_bytes(msgspec.json.format(msgspec.json.encode(record, enc_hook=str)) + b"\n")
    if console.format == "json":
        console.result({"rows": rows})
        return
    columns = ["method", "budget", *(metric for metric in METRICS if any(metric in row for row in rows)), "tokens", "ms_per_turn"]
    console.table([_row(row) for row in rows], columns)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"method": row["method"], "budget": row["budget"], "tokens": round(row["tokens"])}
    for metric, value in row.items():
        if isinstance(value, dict):
            shown[metric] = f"{100 * value['mean']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
    return shown | {"ms_per_turn": f"{1000 * row['seconds_per_turn']:.2f}"}
