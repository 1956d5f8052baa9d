"""`everlearn memory train`: teach a policy what a memory should keep, by what its windows can still answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from everlearn.cli import own_server
from everlearn.cli.console import Console, Verb, pass_console
from everlearn.errors import InvalidRequest

if TYPE_CHECKING:
    from everlearn.memory.suites import Case

HELD_OUT = 0.1  # the last cases of a file, which are looked at and not trained on
SYNTHETIC_BUDGET, DATA_BUDGET = 128, 512
EVALUATE_EVERY = 15  # steps: however many are asked for, so that a run can be made longer


@click.command("train", cls=Verb)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="of the run; the same folder continues it")
@click.option("--model", default="smollm2", show_default=True, metavar="NAME|FOLDER", help="base model of the adapter")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="histories in LongMemEval's form [default: synthetic ones]")
@click.option("--turns", type=click.IntRange(min=8), default=400, show_default=True, help="length of a synthetic history")
@click.option("--facts", type=click.IntRange(1, 35), default=35, show_default=True, help="asked about in a synthetic history")
@click.option(
    "--budget",
    type=click.IntRange(min=64),
    help=f"tokens of the windows that are trained at [default: {SYNTHETIC_BUDGET}; {DATA_BUDGET} with --data, whose turns are longer]",
)
@click.option("--steps", type=click.IntRange(min=1), default=24, show_default=True, help="in all")
@click.option(
    "--warm",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="first steps, in which what is due of each chunk is taught outright",
)
@click.option("--groups", type=click.IntRange(min=1), default=24, show_default=True, help="windows in a step")
@click.option("--members", type=click.IntRange(min=2), default=2, show_default=True, help="times that each window is played")
@click.option("--answer-weight", type=click.FloatRange(min=0), default=0.0, show_default=True, help="above 0, answers are trained as well")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="of the adapter")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-4,
    show_default=True,
    help="learning rate; the warm steps have ten times that",
)
@click.option("--max-tokens", type=click.IntRange(min=4), default=32, show_default=True, help="of a decision, a chunk or an answer")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@pass_console
def train(console: Console, out: Path, model: str, data: Path | None, **options: Any) -> None:
    """Train an adapter that decides what a memory keeps, and writes it shorter.

    Each step takes windows under pressure and lets the policy decide and write from each of them several times; what is left of the window
    is judged by how likely the right answers still are under the base model. Starts a server of its own on this home, or uses the one that
    --url or EVERLEARN_URL names (the model's folder must be on this machine too, for its tokenizer). Histories that aren't trained on are
    looked at every 15 steps: the last tenth of --data, or synthetic ones of their own.
    """
    from everlearn.memory.environment import Judge, MemoryTasks, Pay
    from everlearn.memory.train import recipe
    from everlearn.memory.train import train as run
    from everlearn.render.tokenizer import load
    from everlearn.rl.prompts import ChatMl

    logging.getLogger("tinker").setLevel(logging.ERROR)  # it warns of every answer that takes longer than one poll
    trained_on, held_out, told = _histories(data, options["turns"], options["facts"], options["seed"])
    info, weight = own_server.prepared(console, model), options["answer_weight"]
    tokenizer = load(Path(info.path))
    chat = ChatMl(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special=True))
    own = {name: options[name] for name in ("rank", "max_tokens", "seed")}
    training = recipe(info.name, options["steps"], options["warm"], options["lr"], evaluate_every=EVALUATE_EVERY, **own)
    training = msgspec.structs.replace(training, answer_weight=weight)
    with ExitStack() as stack:
        service = own_server.service(console, stack, info, "memory", "everlearn memory train")
        judge = Judge(service.create_sampling_client(base_model=info.name).result(), chat)

        def tasks(history: Callable[[int], Case], batches: int, members: int) -> MemoryTasks:
            return MemoryTasks(
                history,
                chat,
                judge,
                budgets=(options["budget"] or (SYNTHETIC_BUDGET if data is None else DATA_BUDGET),),
                pay=Pay(correct=1.0 if weight else 0.0),
                batches=batches,
                groups_per_batch=options["groups"],
                group_size=members,
                weighed=members > 1,
                seed=options["seed"],
            )

        mine, others = tasks(trained_on, options["steps"], options["members"]), tasks(held_out, 1, 1)
        done = run(service, training, mine, out, others, chat.decode, lambda row: console.note(_told(row)), told)
    console.result({"path": done.path, "steps": options["steps"]})
    console.note(f"name it with: everlearn adapter name NAME {done.path}")


def _told(row: dict[str, float]) -> str:
    names = {"reward/total": "reward", "env/kept": "kept", "held_out/env/kept": "kept of held-out windows", "warm/nll": "loss"}
    return f"step {row['step']:.0f}: " + ", ".join(f"{said} {row[name]:.3f}" for name, said in names.items() if name in row)


def _histories(data: Path | None, turns: int, facts: int, seed: int) -> tuple[Callable[[int], Case], Callable[[int], Case], dict[str, Any]]:
    """By their numbers the histories to train on and the others to look at, of which none is both, and what a run notes of them."""
    from everlearn.memory.suites import longmemeval
    from everlearn.memory.synthetic import synthetic

    if data is None:
        first = 10_000 * (seed + 1)  # those to look at count down from -first: no run, whatever its seed and length, is trained on one
        told: dict[str, Any] = {"data": None, "turns": turns, "facts": facts}
        return lambda number: synthetic(turns, first + number, facts), lambda number: synthetic(turns, -first - number, facts), told
    cases = longmemeval(data)
    if len(cases) < 2:
        raise InvalidRequest(f"{data} has {len(cases)} histories; bring at least two: one to train on and one to look at", param="data")
    kept = math.ceil(HELD_OUT * len(cases))
    mine, others = cases[:-kept], cases[-kept:]
    told = {"data": sha256(data.read_bytes()).hexdigest()}
    return lambda number: mine[number % len(mine)], lambda number: others[number % len(others)], told
