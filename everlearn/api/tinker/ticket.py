"""The place of a training request in its run's order.

A client numbers its requests before it sends them, and goes on with the next number when one is refused. So a refusal takes its
place in the log like a result does; otherwise everything after it would wait for it forever.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
from fastapi import Request

from everlearn.api.auth import tenant
from everlearn.api.dispatch import Loggable
from everlearn.api.services import Services, services
from everlearn.api.tinker import checks, forms
from everlearn.errors import UserError
from everlearn.store import runs
from everlearn.store.log import Entry


@dataclass
class Ticket:
    """`async with Ticket(...) as ticket`: a UserError raised inside is logged under the request's number, and then answered."""

    svc: Services
    tenant: str
    kind: str
    model_id: str
    seq_id: int | None
    fingerprint: str

    async def __aenter__(self) -> Ticket:
        self.seq = checks.seq(self.seq_id)
        self.request_id = f"{self.model_id}:{self.seq}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            await self.svc.dispatcher.refuse(
                self.tenant,
                request_id=self.request_id,
                kind=self.kind,
                model_id=self.model_id,
                seq=self.seq,
                fingerprint=self.fingerprint,
                error=error,
            )

    async def run(self) -> runs.Run:
        """The training run, which must be the tenant's."""
        return await self.svc.read(lambda conn: runs.get_run(conn, self.tenant, self.model_id))

    async def submit(self, command: Loggable, meta: dict[str, Any]) -> dict[str, Any]:
        """Logs the command durably and answers with a future."""
        return future(await self.svc.dispatcher.submit(self.tenant, command, fingerprint=self.fingerprint, meta=meta))


class Numbered(msgspec.Struct):
    """What every training request has, whatever else is wrong with it."""

    model_id: str
    seq_id: int


async def read(request: Request, form: type[forms.F], kind: str) -> forms.F:
    """`forms.read` for training requests: one whose form is wrong has used up its number too."""
    try:
        return await forms.read(request, form)
    except UserError as error:
        body = await request.body()
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, UserError):
            numbered = msgspec.json.decode(body, type=Numbered)
            ticket = Ticket(services(request), tenant(request), kind, numbered.model_id, numbered.seq_id, checks.fingerprint(body))
            async with ticket:
                raise error
        raise


def future(entry: Entry) -> dict[str, Any]:
    return {"request_id": entry.request_id, "model_id": entry.model_id}
