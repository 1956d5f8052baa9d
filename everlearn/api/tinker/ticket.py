"""The place of a training request in its run's order.

A client numbers its requests before it sends them, and goes on with the next number when one is refused. So a refusal takes its
place in the log like a result does; otherwise everything after it would wait for it forever. And a place is taken once: a request
that is sent again gets what its first arrival got, even if the checks would say something else by now.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from everlearn.api.auth import Caller
from everlearn.api.dispatch import Loggable
from everlearn.api.services import Services
from everlearn.errors import BY_CODE, EverlearnError, UserError
from everlearn.store import runs
from everlearn.store.log import Entry

Prepared = tuple[Loggable, dict[str, Any]]  # the command, and what its log entry keeps beside it


@dataclass(frozen=True)
class Ticket:
    """`seq` 0 creates the run: what is refused then has no run whose order it could hold up, and leaves nothing behind."""

    svc: Services
    caller: Caller
    model_id: str
    seq: int
    fingerprint: str

    @property
    def tenant(self) -> str:
        return self.caller.tenant

    @property
    def request_id(self) -> str:
        return f"{self.model_id}:{self.seq}"

    async def run(self) -> runs.Run:
        """The training run, which must be the tenant's, on a base model that the caller's key may use."""
        run = await self.svc.read(lambda conn: runs.get_run(conn, self.tenant, self.model_id))
        self.svc.limiter.check_model(self.caller, run.base_model)
        return run

    async def answer(self, prepare: Callable[[], Awaitable[Prepared]]) -> dict[str, Any]:
        """Logs durably what `prepare` makes, and answers with a future. A UserError of `prepare` takes the request's place instead,
        unless this request has it already: then the first entry is the answer, be it a future or a refusal."""
        try:
            command, meta = await prepare()
            entry = await self.svc.dispatcher.submit(self.tenant, command, fingerprint=self.fingerprint, meta=meta)
        except UserError as error:
            first = await self.refuse(error)
            if first is None:
                raise
            entry = first
        if refused := entry.meta.get("refused"):
            raise BY_CODE.get(refused["code"], EverlearnError)(refused["message"], param=refused["param"])
        return future(entry)

    async def refuse(self, error: UserError) -> Entry | None:
        """Lets the request's place pass without effect; the entry that this same request made there before, if it did."""
        dispatcher = self.svc.dispatcher
        if self.seq == 0:
            return await dispatcher.first_entry(self.tenant, self.model_id, self.seq, self.fingerprint)
        return await dispatcher.refuse(
            self.tenant, model_id=self.model_id, seq=self.seq, request_id=self.request_id, fingerprint=self.fingerprint, error=error
        )


def future(entry: Entry) -> dict[str, Any]:
    return {"request_id": entry.request_id, "model_id": entry.model_id}
