"""Requests on their way through the log to the engine, and their answers on the way back.  (signatures first; the body follows)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from everlearn.engine import protocol
from everlearn.types import Result

if TYPE_CHECKING:
    from everlearn.store.log import Entry

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]
TrainingCommand = (
    protocol.Create | protocol.ForwardBackward | protocol.OptimStep | protocol.Save | protocol.Publish | protocol.Load
)
Loggable = TrainingCommand | protocol.Sample


@dataclass(frozen=True)
class Done:
    """The request succeeded; `result` is the engine's answer, `entry.meta` what the submitter gave along."""

    entry: Entry
    result: Result


@dataclass(frozen=True)
class Failed:
    """The request failed for good. `error`: {"code", "message", "param"}; code is that of a class in everlearn/errors.py or
    "cancelled"."""

    entry: Entry
    error: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """No answer yet: why not, in the client's terms. `reason` is one sentence for people, or None when it simply runs."""

    entry: Entry
    queue_state: QueueState
    reason: str | None


Outcome = Done | Failed | Waiting


class Dispatcher:
    async def submit(
        self, tenant: str, command: Loggable, *, model_id: str | None = None, seq: int | None = None, fingerprint: str, meta: dict[str, Any]
    ) -> Entry:
        """Logs `command` durably, then forwards it to the engine; returns the log's entry. Idempotent: the same (tenant,
        model_id, seq, sample or not) with the same fingerprint returns the first entry and has no second effect.

        Training commands carry model_id and seq themselves (Create, and Load with create=True, are seq 0). For a Sample pass
        `model_id` = sampling session id and `seq` = the client's seq_id. `command.request_id` is the id the client will poll.
        Raises Conflict (same seq, another payload), Overloaded (too many unfinished requests), Unavailable (store can't write,
        or the engine has given up).
        """
        raise NotImplementedError

    async def wait(self, tenant: str, request_id: str, timeout: float) -> Outcome:
        """The request's outcome, or `Waiting` after `timeout` seconds (0: at once). Raises NotFound for an id that this
        tenant has not got, Expired for one whose result was dropped after the retention time."""
        raise NotImplementedError

    async def wait_any(self, tenant: str, model_id: str, seen: set[str], timeout: float) -> list[Outcome]:
        """All finished requests of a sampling session that aren't in `seen`, as soon as there is one (retrieve_futures)."""
        raise NotImplementedError

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """Cancels an unfinished Sample: its future fails with code "cancelled". False if it had finished already."""
        raise NotImplementedError

    async def forget(self, model_id: str) -> None:
        """Drops a run's adapter from the engine (the run was closed or deleted)."""
        raise NotImplementedError
