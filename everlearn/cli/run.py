"""`everlearn run`: training runs of the running server."""

from __future__ import annotations

from urllib.parse import quote

import click

from everlearn.cli.console import Console, Noun, pass_console

command = Noun("run", help="Training runs.")


@command.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="how many, newest first")
@pass_console
def list_runs(console: Console, limit: int) -> None:
    """List training runs, newest first."""
    runs = console.client().pages("/api/v1/training_runs", "training_runs", limit)
    columns = ["training_run_id", "base_model", "lora_rank", "last_request_time", "last_checkpoint"]
    shown = [{**run, "last_checkpoint": (run.get("last_checkpoint") or {}).get("tinker_path")} for run in runs]
    console.table(runs if console.format == "json" else shown, columns)


@command.command("show")
@click.argument("run_id")
@pass_console
def show(console: Console, run_id: str) -> None:
    """Show one training run with its checkpoints."""
    client = console.client()
    run = client.get(f"/api/v1/training_runs/{quote(run_id, safe='')}")
    checkpoints = client.get(f"/api/v1/training_runs/{quote(run_id, safe='')}/checkpoints")["checkpoints"]
    if console.format == "json":
        console.result({**run, "checkpoints": checkpoints})
        return
    console.result({name: value for name, value in run.items() if not name.startswith("last_") or name == "last_request_time"})
    click.echo()
    console.table(checkpoints, ["tinker_path", "checkpoint_type", "time", "size_bytes", "expires_at"])
