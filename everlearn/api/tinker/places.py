"""Where a training request belongs that can't be read.

Its client has counted it and goes on with the next number, so its place must pass (everlearn/api/tinker/ticket.py). The place stands
at the beginning of a message, and at either end of JSON; it can be found even where the rest is damaged, or too large to be kept.
Where it can't, the requests behind it wait until their feed passes it over (api.gap_seconds).
"""

from __future__ import annotations

import contextlib
import re

import msgspec
from fastapi import Request
from starlette.types import Scope

from everlearn.api import auth
from everlearn.api.limits import TAIL_BYTES, Ends, inflated_head
from everlearn.api.services import services
from everlearn.api.tinker import checks, codec, forms
from everlearn.api.tinker.ticket import Ticket
from everlearn.errors import EverlearnError, UserError
from everlearn.store.names import storable

Place = tuple[str, int]  # model_id, seq_id

TRAINING_PATHS = tuple(f"/api/v1/{verb}" for verb in ("forward", "optim_step", "save_weights", "load_weights"))
MODEL_ID = re.compile(rb'"model_id"\s*:\s*"([^"\\]{1,200})"')
SEQ_ID = re.compile(rb'"seq_id"\s*:\s*([0-9]{1,19})[\s,}]')


class Numbered(msgspec.Struct):
    """What every training request has, whatever else is wrong with it."""

    model_id: str
    seq_id: int


def in_message(head: bytes) -> Place | None:
    """Of a ForwardBackwardRequest: fields are written in the order of their numbers, and these are 1 and 2."""
    end = 2 + head[1] if len(head) > 2 and head[0] == 0x0A and head[1] < 0x80 else 0
    number = re.match(rb"\x10([\x80-\xff]{0,9}[\x00-\x7f])", head[end : end + 11])
    if not end or number is None:
        return None
    return head[2:end].decode("utf-8", "replace"), sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(number[1]))


def in_json(text: bytes) -> Place | None:
    """Of a whole body that reads as JSON, or of a piece of one."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        numbered = msgspec.json.decode(text, type=Numbered)
        return numbered.model_id, numbered.seq_id
    model_id, seq_id = MODEL_ID.search(text), SEQ_ID.search(text)
    return (model_id[1].decode("utf-8", "replace"), int(seq_id[1])) if model_id and seq_id else None


async def read(request: Request, form: type[forms.F]) -> forms.F:
    """`forms.read` for training requests: one whose form is wrong has used up its number too."""
    try:
        return await forms.read(request, form)
    except UserError as error:
        body = await request.body()
        await keep(request, in_json(body), body, error)
        raise


async def keep(request: Request, place: Place | None, content: bytes, error: UserError) -> None:
    """Lets `place` pass; `content` is what a repetition of the request will be known by."""
    if place is not None and storable(place[0]) and 1 <= place[1] <= checks.MAX_SEQ:
        await Ticket(services(request), auth.caller(request), *place, checks.fingerprint(content)).refuse(error)


async def keep_of_refused(scope: Scope, ends: Ends, error: EverlearnError) -> None:
    """For a request whose body was refused before its route saw it (everlearn/api/limits.py)."""
    if not (isinstance(error, UserError) and scope["path"].startswith(TRAINING_PATHS)):
        return
    request = Request(scope)
    with contextlib.suppress(UserError):  # who may not train has no place to keep
        await auth.authenticate(request)
        await auth.Scope("train")(request)
        head = inflated_head(request.headers.get("content-encoding", "").strip().lower(), ends.head, enough=TAIL_BYTES)
        if request.headers.get("content-type", "").startswith(codec.CONTENT_TYPE):
            place = in_message(head)
        else:
            place = in_json(head[:TAIL_BYTES]) or in_json(ends.tail)
        await keep(request, place, ends.head + ends.tail, error)
