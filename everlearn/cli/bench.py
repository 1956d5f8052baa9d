"""`everlearn bench`: what a running server gives under load."""

from __future__ import annotations

import re
from typing import Any

import click

from everlearn.cli.console import Console, Noun, pass_console

command = Noun("bench", help="Measure a running server.")


class Span(click.ParamType):
    """`64`, or `16:256` for anything in between."""

    name = "N or N:M"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,7})(?::(\d{1,7}))?", str(value))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"{value!r} is no span; write it like 64 or 16:256", param, ctx)
        return least, most


@command.command("serve")
@click.argument("models", nargs=-1)
@click.option("--requests", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="how many in all")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=16, show_default=True, metavar="N", help="how many at once, at most")
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), metavar="R", help="requests a second, at random [default: as fast as they end]"
)
@click.option("--prompt-words", type=Span(), default="64", show_default=True, metavar="N[:M]", help="length of the prompts")
@click.option("--output-tokens", type=Span(), default="64", show_default=True, metavar="N[:M]", help="length of the answers")
@click.option("--shared-words", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="words that begin every prompt")
@click.option("--stream/--no-stream", default=True, show_default=True, help="stream the answers; without, there is no time to first token")
@click.option("--eos/--ignore-eos", default=False, help="let answers end where the model ends them")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True, help="of the draws")
@click.option("--seed", type=int, default=0, show_default=True, help="of prompts, lengths and draws: the same seed sends the same")
@click.option("--ttft", type=float, default=2.0, show_default=True, metavar="SECONDS", help="goodput: time to first token, at most")
@click.option("--tpot", type=float, default=0.2, show_default=True, metavar="SECONDS", help="goodput: seconds per further token, at most")
@pass_console
def serve(console: Console, models: tuple[str, ...], ttft: float, tpot: float, eos: bool, **options: Any) -> int:
    """Send chats to MODELS (in turn; default: the server's base model) and print throughput, latencies and goodput.

    Exits with 1 if any request wasn't answered.
    """
    import asyncio

    from everlearn.cli import load

    client = console.client()
    names = models or (str(client.get("/v1/capabilities")["models"][0]["id"]),)
    wanted = load.Load(models=names, ignore_eos=not eos, **options)
    with console.progress("requests", wanted.requests) as bar:
        seen, seconds = asyncio.run(load.run(client.url, client.key, wanted, lambda done: bar.update(done)))
    told = load.report(wanted, seen, seconds, ttft, tpot)
    if console.format == "json":
        console.result(told)
    else:
        show(console, told)
    return 1 if told["requests"]["errors"] else 0


def show(console: Console, told: dict[str, Any]) -> None:
    throughput, goodput, requests = told["throughput"], told["goodput"], told["requests"]
    errors = ", ".join(f"{count} {name}" for name, count in requests["errors"].items())
    lines = {
        "requests": f"{requests['ok']} of {requests['sent']} answered in {told['seconds']:.1f} s" + (f" ({errors})" if errors else ""),
        "throughput": f"{throughput['requests_per_second']:.2f} requests/s, {throughput['output_tokens_per_second']:.1f} output tokens/s, "
        f"{throughput['total_tokens_per_second']:.1f} tokens/s",
        "cached": f"{told['tokens']['cached']} of {told['tokens']['prompt']} prompt tokens",
        "goodput": f"{goodput['requests_per_second']:.2f} requests/s, {goodput['share']:.0%} of those sent "
        f"(first token within {goodput['ttft_seconds']:g} s, further ones at {goodput['tpot_seconds']:g} s)",
    }
    console.result(lines)
    click.echo()
    names = {
        "ttft_seconds": "time to first token",
        "tpot_seconds": "time per token",
        "gap_seconds": "between pieces",
        "request_seconds": "request",
    }
    rows = [
        {"milliseconds": names[key], **{name: f"{1000 * value:.1f}" for name, value in told[key].items()}} for key in names if told[key]
    ]
    if rows:
        console.table(rows, list(rows[0]))
