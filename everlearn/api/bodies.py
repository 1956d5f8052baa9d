"""How the routes of episodes, feedback and datasets read their bodies: unknown fields are refused by name, and so are texts that not every
database takes."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from fastapi import Request

from everlearn.api.openai import types
from everlearn.errors import InvalidRequest
from everlearn.store.names import storable

F = TypeVar("F", bound=msgspec.Struct)


async def read(request: Request, form: type[F]) -> F:
    """The request's JSON body as `form`. Raises InvalidRequest naming the field that doesn't fit."""
    made = await types.read(request, form)
    refuse_unstorable(msgspec.to_builtins(made), "")
    return made


def refuse_unstorable(value: Any, path: str) -> None:
    if isinstance(value, str) and not storable(value):
        raise InvalidRequest(f"{path} holds NUL or half a surrogate pair, which can't be stored; leave it out", param=path)
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        refuse_unstorable(item, f"{path}.{key}".removeprefix("."))
