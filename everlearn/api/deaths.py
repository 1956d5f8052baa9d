"""What ended the engine process, as far as that can be told from here: it itself, its supervisor, the kernel for want of memory, or
somebody else."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import NamedTuple

# Nothing that an engine does makes the system send it one of these; SIGKILL may be the kernel's answer to a lack of memory.
FROM_OUTSIDE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL}
VMSTAT = Path("/proc/vmstat")


class Death(NamedTuple):
    """`text` completes the sentence "the engine process ..."."""

    text: str
    from_outside: bool


def out_of_memory_kills() -> int | None:
    """How many processes this system has killed for want of memory since it started; None where it doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(VMSTAT.read_text().split("oom_kill ")[1].split()[0])
    return None


def describe(code: int | None, ordered: str, kills_before: int | None) -> Death:
    """Of exit status `code`, when the supervisor killed it because of `ordered` (empty: it didn't), and the system's count at its start
    was `kills_before`."""
    if ordered:
        return Death(f"was killed because {ordered}", from_outside=False)
    if code is None or code >= 0:
        return Death(f"ended with exit status {code}", from_outside=False)
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number != signal.SIGKILL:
        return Death(f"was killed by {name}", from_outside=number in FROM_OUTSIDE)
    kills = out_of_memory_kills()
    if kills is None or kills_before is None:
        return Death(f"was killed by {name} (out of memory?)", from_outside=False)
    if kills > kills_before:
        return Death(f"was killed by {name} (out of memory)", from_outside=False)
    return Death(f"was killed by {name} (from outside)", from_outside=True)
