"""`everlearn reward`: the reward models of deployments, and how far each may be trusted."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console
from everlearn.cli.episode import moment

command = Noun("reward", help="Reward models: what they learned from feedback, and how far they may be trusted.")
COLUMNS = ["id", "created", "deployment", "number", "labels", "effective_labels", "auc", "ece", "earned", "has_weights"]
DOUBTS = ["record_id", "created", "deployment", "chance", "chance_sd", "disagreement"]


def row(one: dict[str, Any]) -> dict[str, Any]:
    """A version's line: its figures are those of labels that it predicted before it learned from them."""
    before = one["report"]["prequential"]
    return {**one, "created": moment(one["created_at"]), **{name: _short(before[name]) for name in ("auc", "ece", "brier", "log_loss")}}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


@command.command("list")
@click.option("--deployment", metavar="NAME", help="of this deployment")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="how many, the newest")
@pass_console
def list_models(console: Console, deployment: str | None, limit: int) -> None:
    """List versions, the newest first."""
    console.table([row(one) for one in console.client().all("/v1/reward-models", limit, deployment=deployment)], COLUMNS)


@command.command("show")
@click.argument("model")
@pass_console
def show(console: Console, model: str) -> None:
    """Show MODEL (rm_..., or a deployment's name for its newest): its calibration, and whether it has earned to be a reward."""
    found = console.client().get(f"/v1/reward-models/{quote(model, safe='')}")
    if console.format == "json":
        console.result(found)
        return
    told = {name: value for name, value in row(found).items() if name not in ("report", "object", "created_at")}
    for name in ("shifted", "held_out"):
        part = found["report"][name]
        told |= {f"{name}_{figure}": _short(part[figure]) for figure in ("num", "auc", "ece")}
    console.result(told)


@command.command("doubts")
@click.option("--deployment", metavar="NAME", help="of this deployment")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="how many, the newest")
@pass_console
def doubts(console: Console, deployment: str | None, limit: int) -> None:
    """List answers that a reward model is too unsure of, the newest first: a person should look at them."""
    found = console.client().all("/v1/doubts", limit, deployment=deployment)
    figures = ("chance", "chance_sd", "disagreement")
    lines = [{**one, "created": moment(one["created_at"]), **{name: _short(one[name]) for name in figures}} for one in found]
    console.table(lines, DOUBTS)
