"""`everlearn chat`: a conversation in the terminal, over the same route that products use.

What is said goes to stdout, everything around it to stderr, so that `everlearn chat -m "..." > answer.txt` holds the answer alone.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from everlearn.cli.console import Console, Verb, pass_console
from everlearn.errors import EverlearnError, InvalidRequest

if TYPE_CHECKING:
    from everlearn.cli.client import Client

SHADES = ((0.9, None), (0.5, "green"), (0.1, "yellow"), (0.0, "red"))  # of a token, by its probability
# Small models talk nonsense at the API's default temperature of 1, and without a limit some never end. Those are a conversation's
# defaults alone: who asks the API and says nothing gets the API's.
DEFAULTS: dict[str, Any] = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 1024}
HELP = """/adapter NAME   talk to another model: an adapter, NAME@NUMBER, a base model, a tinker:// path
/adapters       what there is
/logprobs [N]   shade tokens by their probability and show N alternatives of each; again: off
/system TEXT    another system prompt (empty: none), in a new conversation
/set NAME VALUE temperature (0.2 here), top_p (0.9), max_tokens (1024), seed or another parameter of the API; without VALUE: as it was;
                VALUE is a number, true, false, text, or JSON: {...}, [...], and "42" for a text that looks like a number
/new            a new conversation
/quit           or Ctrl-D; Ctrl-C ends an answer"""


class Chat:
    """One conversation: what was said, with whom, and how it is shown."""

    def __init__(self, console: Console, client: Client, model: str, colour: bool):
        self.console, self.client, self.model, self.colour = console, client, model, colour
        self.system = ""
        self.messages: list[dict[str, str]] = []
        self.params: dict[str, Any] = {}
        self.logprobs: int | None = None  # None: not shown; else how many alternatives

    # -- an answer ---------------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """One turn. An answer that was broken off by Ctrl-C is kept as far as it came, one that failed is not."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            self._stream(said)
        except KeyboardInterrupt:
            click.echo()
            self.console.note("(interrupted)")
        except EverlearnError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _stream(self, said: list[str]) -> None:
        started, first = time.monotonic(), 0.0
        alternatives: list[dict[str, Any]] = []
        figures: dict[str, Any] = {}
        with self.client.events("/v1/chat/completions", self._body()) as (headers, events):
            for event in events:
                figures |= {name: event[name] for name in ("usage", "record_id") if event.get(name)}
                for choice in event.get("choices", ()):
                    delta, scored = choice.get("delta") or {}, (choice.get("logprobs") or {}).get("content") or []
                    first = first or (time.monotonic() if delta.get("content") or delta.get("reasoning_content") else 0.0)
                    self._show(delta.get("reasoning_content") or "", [], dim=True)
                    self._show(delta.get("content") or "", scored)
                    said.append(delta.get("content") or "")
                    alternatives += scored
        click.echo()
        if self.logprobs:
            self._show_alternatives(alternatives)
        self._show_figures(headers, figures, first - started if first else 0.0, time.monotonic() - started)

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": [*system, *self.messages], "stream": True, "stream_options": {"include_usage": True}}
        if self.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.logprobs}
        return body | self._settings()

    def _settings(self) -> dict[str, Any]:
        limited = "max_completion_tokens" in self.params  # the newer name of max_tokens; a request may have only one of the two
        return {name: value for name, value in DEFAULTS.items() if not (limited and name == "max_tokens")} | self.params

    # -- how it is shown ---------------------------------------------------------------------------------------------------

    def _show(self, text: str, scored: list[dict[str, Any]], dim: bool = False) -> None:
        if self.colour and scored and "".join(item["token"] for item in scored) == text:
            for item in scored:
                click.echo(click.style(printable(item["token"]), fg=shade(item["logprob"])), nl=False)
        elif text:
            click.echo(click.style(printable(text), dim=True) if dim and self.colour else printable(text), nl=False)
        sys.stdout.flush()

    def _show_alternatives(self, scored: list[dict[str, Any]]) -> None:
        for item in scored:
            others = "  ".join(f"{other['token']!r} {probability(other['logprob'])}" for other in item.get("top_logprobs", ()))
            self.console.note(f"{item['token']!r:>16} {item['logprob']:8.3f} {probability(item['logprob'])}   {printable(others)}")

    def _show_figures(self, headers: Any, figures: dict[str, Any], first: float, total: float) -> None:
        tokens = (figures.get("usage") or {}).get("completion_tokens", 0)
        pace = f", {(tokens - 1) / (total - first):.0f} tokens/s" if tokens > 1 and total > first else ""
        version, record = (
            headers.get("x-everlearn-version", self.model),
            headers.get("x-everlearn-record") or figures.get("record_id") or "",
        )
        self.console.note(printable(f"[{version}: {tokens} tokens, first after {first:.2f} s{pace}; {record}]"))

    # -- commands ----------------------------------------------------------------------------------------------------------

    def obey(self, line: str) -> bool:
        """Does what `/name argument` says; False ends the conversation."""
        name, _, argument = line[1:].partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        act = self.commands().get(name)
        if act is None:
            raise InvalidRequest(f"there is no command /{name}; /help lists them")
        act(argument.strip())
        return True

    def commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: self.console.note(HELP),
            "adapter": self._switch,
            "model": self._switch,
            "adapters": lambda _: self._list(),
            "logprobs": self._score,
            "system": self._instruct,
            "set": self._set,
            "new": lambda _: self._begin(),
        }

    def _switch(self, name: str) -> None:
        """The conversation goes on with another model; one that the server doesn't know is refused at once."""
        if not name:
            self.console.note(f"talking to {self.model}")
            return
        self.client.get(f"/v1/models/{quote(name, safe='')}")
        self.model = name
        self.console.note(f"talking to {name}")

    def _list(self) -> None:
        for item in self.client.get("/v1/models")["data"]:
            self.console.note(("* " if item["id"] == self.model else "  ") + printable(item["id"]))

    def _score(self, count: str) -> None:
        if not count and self.logprobs is not None:
            self.logprobs = None
        elif not count or (count.isdigit() and int(count) <= 20):
            self.logprobs = int(count or 0)
        else:
            raise InvalidRequest(f"/logprobs takes a number from 0 to 20, not {count!r}; /help explains it")
        self.console.note("log-probabilities are " + ("off" if self.logprobs is None else f"shown, with {self.logprobs} alternatives"))

    def _instruct(self, text: str) -> None:
        self.system = text
        self._begin()

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            self.console.note(" ".join(f"{name}={value}" for name, value in self._settings().items()))
        elif value:
            self.params[name] = parsed(name, value)
        else:
            self.params.pop(name, None)

    def _begin(self) -> None:
        self.messages.clear()
        self.console.note("a new conversation")


def parsed(name: str, value: str) -> Any:
    """The value of parameter `name`: JSON where it begins as an object, a list or a text in quotes does, a number where it is one, else
    the text."""
    try:
        if value[:1] in ("{", "[", '"'):
            found = json.loads(value)
        else:
            found = number(value)
        json.dumps(found, allow_nan=False)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f'{name} {value} begins as JSON does and is none: {error}; mend it, or write text in quotes: "[END]"'
        ) from None
    except ValueError:
        raise InvalidRequest(f'{name} {value} is no finite number; give one, or write a text in quotes: "nan"') from None
    return found


def number(value: str) -> Any:
    """A number or a truth where it is one, else the text."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value, value)


def printable(text: str) -> str:
    """Text of a model or a client, with lines and tabs but nothing else that steers a terminal."""
    from everlearn.telemetry import escape

    return "".join(char if char in "\n\t" else escape(char) for char in text)


def probability(logprob: float) -> str:
    return f"{100 * math.exp(max(logprob, -100.0)):5.1f}%"


def shade(logprob: float) -> str | None:
    chance = math.exp(max(logprob, -100.0))
    return next((colour for floor, colour in SHADES if chance >= floor), None)


def lines(console: Console, terminal: bool) -> Iterator[str]:
    """What the person types, or the lines of a pipe."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # its import gives `input` history and editing

    while True:
        try:
            click.echo("> ", nl=False, err=True)
            yield input()
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo(err=True)


@click.command("chat", cls=Verb, context_settings={"allow_extra_args": True})
@click.argument("model", required=False)
@click.option("-m", "--message", metavar="TEXT", help="say this, print the answer and end")
@click.option("--system", default="", metavar="TEXT", help="a system prompt")
@click.option("--logprobs", type=click.IntRange(0, 20), metavar="N", help="show log-probabilities, with N alternatives of each token")
@click.option(
    "--set",
    "settings",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="a parameter of the API [default here: temperature 0.2, top_p 0.9, max_tokens 1024]; "
    'VALUE may be JSON: {...}, [...], "text"; may be repeated',
)
@pass_console
def command(
    console: Console, model: str | None, message: str | None, system: str, logprobs: int | None, settings: tuple[tuple[str, str], ...]
) -> None:
    """Talk to MODEL: a base model, an adapter NAME or NAME@NUMBER, a tinker:// path [default: the server's base model].

    Lines that begin with / are commands; /help lists them. With piped input each line is one message.
    """
    from everlearn.config import client_environ

    context = click.get_current_context()
    if context.args:
        said = " ".join(context.args)
        raise click.UsageError(f"{said!r} follows the model's name; what is to be said stands behind -m: -m {shlex.quote(said)}", context)
    client = console.client()
    if model is None:
        model = str(client.get("/v1/capabilities")["models"][0]["id"])
    chat = Chat(console, client, model, colour=sys.stdout.isatty() and not client_environ().no_color)
    chat.system, chat.logprobs = system, logprobs
    chat.params = {name: parsed(name, value) for name, value in settings}
    if message is not None:
        chat.ask(message)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        console.note(f"talking to {model}; /help lists the commands, Ctrl-D ends")
    for line in lines(console, terminal):
        if not line.strip():
            continue
        try:
            if not line.startswith("/"):
                chat.ask(line)
            elif not chat.obey(line):
                return
        except EverlearnError as error:
            if not terminal:
                raise
            console.error(*told(error))


def told(error: EverlearnError) -> tuple[str, str]:
    what, _, remedy = error.message.rpartition("; ")
    return (what, remedy) if what else (remedy, "/help lists the commands")
