"""/v1/adapters: names for checkpoints. `support` is what a product asks for, `support@3` what it gets until somebody moves the name."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from everlearn.api.auth import scope, tenant
from everlearn.api.paging import After, Limit, listing
from everlearn.api.services import services
from everlearn.api.tinker import forms
from everlearn.errors import InvalidRequest
from everlearn.store import checkpoints, deployments, names
from everlearn.store.names import NamedVersion

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[scope("train", "sample", "read")])
CHANGES = [scope("train")]


class NameForm(forms.Form):
    """`move`: the name means this version at once, also where it means another one now."""

    name: str
    path: str
    note: str = ""
    move: bool = False


class MoveForm(forms.Form):
    number: int
    expected: int | None = None
    note: str = ""


def adapter_json(version: NamedVersion) -> dict[str, Any]:
    return {
        "id": version.name,
        "object": "adapter",
        "name": version.name,
        "number": version.number,
        "model": str(version),
        "current": version.current,
        "base_model": version.base_model,
        "path": version.path,
        "version": version.version,
        "note": version.note,
        "created_at": int(version.created_at),
    }


def meant(conn: Connection, owner: str, found: list[NamedVersion]) -> list[NamedVersion]:
    """The versions as their names are answered: `current` is none of a name whose deployment answers with the base model."""
    on_base = {one.name for one in deployments.on_base(conn, owner)}
    return [msgspec.structs.replace(version, current=version.current and version.name not in on_base) for version in found]


def list_meant(conn: Connection, owner: str, limit: int, after: str | None) -> list[NamedVersion]:
    return meant(conn, owner, names.list_names(conn, owner, limit, after))


@router.post("", dependencies=CHANGES)
async def name_adapter(request: Request) -> dict[str, Any]:
    """Gives a checkpoint a name, or the next number of a name that is there. The same checkpoint again changes nothing."""
    form = await forms.read(request, NameForm)
    svc, owner, path = services(request), tenant(request), checkpoints.parse_path(form.path)
    names.parse(form.name)
    if svc.catalog.knows(form.name):
        raise InvalidRequest(f"{form.name!r} is a base model's name; choose another for the adapter", param="name")

    def give(conn: Connection) -> NamedVersion:
        given = meant(conn, owner, [names.give(conn, owner, form.name, path, form.note)])[0]
        if not form.move or given.current:
            return given
        deployments.guard_move(conn, owner, form.name)
        return names.move(conn, owner, form.name, given.number, form.note)

    return adapter_json(await svc.write(give))


@router.get("")
async def list_adapters(request: Request, limit: int = Limit, after: str | None = After) -> dict[str, Any]:
    """What each name means now, by name; where its deployment answers with the base model, what it meant before, which isn't `current`."""
    return await listing(request, limit, after, list_meant, adapter_json)


@router.get("/{name}")
async def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """A name (`support`) with all its versions and what it meant when, or one version of it (`support@3`)."""
    owner, (bare, number) = tenant(request), names.parse(name)

    def read(conn: Connection) -> dict[str, Any]:
        asked = names.get(conn, owner, bare, number)
        every = names.versions(conn, owner, bare) if number is None else []
        found, *versions = map(adapter_json, meant(conn, owner, [asked, *every]))
        if number is not None:
            return found
        moves = [
            {"number": move.number, "note": move.note, "created_at": int(move.created_at)} for move in names.history(conn, owner, bare)
        ]
        return found | {"versions": versions, "history": moves}

    return await services(request).read(read)


@router.post("/{name}/move", dependencies=CHANGES)
async def move_adapter(request: Request, name: str) -> dict[str, Any]:
    """From the next request on, the bare name means version `number`; answers under way end with the weights that they began with."""
    form = await forms.read(request, MoveForm)
    owner, (bare, number) = tenant(request), names.parse(name)
    if number is not None:
        raise InvalidRequest(f"{name!r} never moves; move {bare!r} to number {number} instead", param="name")

    def move(conn: Connection) -> NamedVersion:
        deployments.guard_move(conn, owner, bare)
        return names.move(conn, owner, bare, form.number, form.note, form.expected)

    return adapter_json(await services(request).write(move))


@router.delete("/{name}", status_code=204, dependencies=CHANGES)
async def delete_adapter(request: Request, name: str) -> Response:
    """Gives up a name with all its versions, or one version. The checkpoints stay, and can be deleted from now on."""
    owner, (bare, number) = tenant(request), names.parse(name)

    def delete(conn: Connection) -> None:
        deployments.guard_delete(conn, owner, bare, number)
        names.delete(conn, owner, bare, number)

    await services(request).write(delete)
    return Response(status_code=204)
