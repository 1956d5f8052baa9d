"""The `everlearn` command: a table of lazily imported sub-commands and the exit codes.

A sub-command's module is imported when it is used, not when `--help` lists it, so that the help answers at once.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from contextlib import suppress
from typing import NoReturn

import click

from everlearn import __version__
from everlearn.cli.console import Console, Noun, global_options
from everlearn.errors import EverlearnError, UserError

# name -> its line in `everlearn --help`; the command lives in everlearn/cli/<name>.py as `command`.
ACTS = {
    "serve": "Start the server.",
    "chat": "Talk to a model or an adapter of the running server.",
    "demo": "The whole loop on the embedded model: users correct it, and a version that learned takes over.",
    "ps": "What the running server is doing now.",
    "usage": "Requests, tokens and seconds by day, key and model.",
    "doctor": "Check this machine; each failure comes with its fix.",
}
NOUNS = {
    "model": "Base models on this machine.",
    "run": "Training runs.",
    "checkpoint": "Saved weights of training runs.",
    "adapter": "Names of adapters and the versions that they mean.",
    "deploy": "What answers under a name, what is tried beside it, and why.",
    "episode": "Conversations and tasks that answers belong to.",
    "feedback": "What was said about answers.",
    "dataset": "Feedback, frozen to be learned from.",
    "reward": "Reward models: what they learned from feedback, and how far they may be trusted.",
    "memory": "Memories of conversations, and what is in them.",
    "key": "API keys and their tenants.",
    "bench": "Measure a running server.",
    "eval": "Study what a model learns, and what it forgets.",
    "config": "Settings and where each one came from.",
}
# By EverlearnError.code; everything else that goes wrong is 1. click itself exits 2 on a usage error.
EXIT_CODES = {"not_found": 4, "unreachable": 3, "invalid_request": 2, "unsupported": 2}
EXITS = "0 ok, 1 failed, 2 usage, 3 server unreachable, 4 not found, 5 a model fell (eval retained, eval safety), 130 interrupted."
SDK_TRANSPORT = "pyqwest"  # the module by which the tinker SDK talks


class LazyGroup(Noun):
    """Lists its commands from the tables above and imports one only to run it or to print its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*ACTS, *NOUNS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in ACTS and name not in NOUNS:
            return None
        command: click.Command = importlib.import_module(f"everlearn.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, table in (("Daily acts", ACTS), ("Nouns (each has verbs: everlearn NOUN --help)", NOUNS)):
            with formatter.section(title):
                formatter.write_dl(list(table.items()))


def build() -> LazyGroup:
    group = LazyGroup(
        "everlearn",
        help="Train LoRA adapters through the Tinker API and serve them through those of OpenAI and Anthropic, on one copy of the model.",
        epilog=f"Exit codes: {EXITS}",
        params=global_options(),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    return click.version_option(__version__, prog_name="everlearn")(group)


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs the command and turns errors into two lines on stderr and an exit code."""
    leave(run(sys.argv[1:] if argv is None else argv))


def leave(code: int) -> NoReturn:
    """Ends the process. Where a command used the tinker SDK, without taking the interpreter apart: on Python 3.11 a thread of the SDK's
    HTTP library that comes back for it meanwhile would abort the process, its work done and its output not yet all written."""
    if SDK_TRANSPORT in sys.modules:
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):  # who read it has left
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(argv: list[str]) -> int:
    console = Console()
    try:
        code = build().main(argv, prog_name="everlearn", standalone_mode=False, obj=console)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "everlearn"
        console.error(error.format_message().rstrip("."), f"`{path} --help` shows how it is used")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        console.error("interrupted", "nothing more was done")
        return 130
    except BrokenPipeError:  # `everlearn run list | head`: the reader has left
        sys.stderr.close()
        return 0
    except EverlearnError as error:
        if console.debug:
            raise
        what, _, remedy = error.message.rpartition("; ")
        console.error(what or remedy, remedy if what else _way_out(error, argv))
        return EXIT_CODES.get(error.code, 1)
    except Exception as error:
        if console.debug:
            raise
        console.error(
            f"{type(error).__name__}: {error}", "this is a fault of everlearn: run it again with --debug and report the traceback"
        )
        return 1


def _way_out(error: EverlearnError, argv: list[str]) -> str:
    """What to do about an error that doesn't say so itself: a wish that was wrong needs the help, not a traceback."""
    if not isinstance(error, UserError):
        return "run the same command with --debug for the traceback"
    words = [word for word in argv if word in ACTS or word in NOUNS][:1]
    return f"`{' '.join(['everlearn', *words])} --help` shows how it is used"


if __name__ == "__main__":
    main()
