"""/v1/deployments: which version answers under a name, which one is tried beside it, and why.

The runner of a deployment is a client of these routes like a person: it says which revision it has seen, and gives its evidence. What is
decided elsewhere is only kept and served here; but no rule promotes what its owner has not allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from everlearn.api import auth
from everlearn.api.auth import scope, tenant
from everlearn.api.paging import After, Limit, listing, page, refuse_unknown
from everlearn.api.services import services
from everlearn.api.tinker import forms
from everlearn.errors import InvalidRequest
from everlearn.loop import description as descriptions
from everlearn.store import deployments, names
from everlearn.store.deployments import Act, Deployment, Event

router = APIRouter(prefix="/v1/deployments", tags=["deployments"], dependencies=[scope("train", "sample", "read")])
CHANGES = [scope("train")]
TOLD = {"train", "read", "admin"}  # scopes whose keys see the cycle


class CreateForm(forms.Form):
    """`champion`: the number that serves at first, 0 for the base model; None: what the name means now."""

    name: str
    description: dict[str, Any]
    champion: int | None = None
    reason: str = ""


class ChangeForm(forms.Form):
    """`cycle` is the runner's: what the work on the next candidate has so far. With a reason that is a line of the history, with
    `evidence`."""

    description: dict[str, Any] | None = None
    paused: bool | None = None
    cycle: dict[str, Any] | None = None
    reason: str = ""
    evidence: dict[str, Any] | None = None
    expected: int | None = None


class AdvanceForm(forms.Form):
    to: str
    expected: int
    kind: str = "advanced"
    candidate: int | None = None
    share: float = 0.0
    shadow: float = 0.0
    cycle: dict[str, Any] | None = None
    reason: str = ""
    evidence: dict[str, Any] | None = None


class ChampionForm(forms.Form):
    """`number` None: the candidate (to promote), or what served before (to roll back). `rule`: the owner's rule says so, not a person."""

    number: int | None = None
    rule: bool = False
    reason: str = ""
    evidence: dict[str, Any] | None = None
    expected: int | None = None


def deployment_json(found: Deployment) -> dict[str, Any]:
    shown = {field: getattr(found, field) for field in ("name", "base_model", "state", "share", "shadow", "paused", "revision")}
    versions = {
        field: None if (number := getattr(found, field)) is None else f"{found.name}@{number}"
        for field in ("champion", "candidate", "previous")
    }
    times = {"created_at": int(found.created_at), "changed_at": int(found.changed_at)}
    return {"id": found.name, "object": "deployment", **shown, **versions, "description": found.description, "cycle": found.cycle, **times}


def seen_by(caller: auth.Caller) -> Callable[[Deployment], dict[str, Any]]:
    """A deployment as `caller` sees it: its cycle may hold words of users while an update runs, and is empty for who may only sample."""
    told = bool(caller.scopes & TOLD)
    return lambda found: deployment_json(found if told else msgspec.structs.replace(found, cycle={}))


def event_json(name: str, event: Event) -> dict[str, Any]:
    candidate = None if event.candidate is None else f"{name}@{event.candidate}"
    told = {field: getattr(event, field) for field in ("kind", "was", "state", "share", "actor", "reason", "evidence")}
    times = {"created_at": event.created_at}
    return {"id": event.id, "object": "deployment.event", **told, "champion": f"{name}@{event.champion}", "candidate": candidate, **times}


def act_of(request: Request, form: Any, actor: str = "") -> Act:
    who = actor or auth.caller(request).key_id or "local"
    return Act(who, form.reason, getattr(form, "evidence", None) or {}, getattr(form, "expected", None))


@router.post("", dependencies=CHANGES)
async def create_deployment(request: Request) -> dict[str, Any]:
    """Serves `name`: the base model, or what the name means already. The same description again changes nothing."""
    form = await forms.read(request, CreateForm)
    svc, owner, (name, number) = services(request), tenant(request), names.parse(form.name)
    described = descriptions.of(form.description)
    if number is not None:
        raise InvalidRequest(f"{form.name!r} names a version; a deployment has a bare name", param="name")
    if svc.catalog.knows(name):
        raise InvalidRequest(f"{name!r} is a base model's name; choose another for the deployment", param="name")
    base, told, act = svc.catalog.resolve(described.base).name, descriptions.to_json(described), act_of(request, form)
    return deployment_json(await svc.write(lambda conn: deployments.create(conn, owner, name, base, told, act, form.champion)))


@router.get("")
async def list_deployments(request: Request, limit: int = Limit, after: str | None = After) -> dict[str, Any]:
    return await listing(request, limit, after, deployments.list_all, seen_by(auth.caller(request)))


@router.get("/{name}")
async def get_deployment(request: Request, name: str) -> dict[str, Any]:
    owner = tenant(request)
    return seen_by(auth.caller(request))(await services(request).read(lambda conn: deployments.get(conn, owner, _bare(name))))


@router.get("/{name}/history")
async def get_history(request: Request, name: str, limit: int = Limit, after: int | None = Query(None, ge=1, le=2**62)) -> dict[str, Any]:
    """Every transition with its evidence, newest first; it outlives the deployment."""
    refuse_unknown(request, "limit", "after")
    owner = tenant(request)
    found = await services(request).read(lambda conn: deployments.history(conn, owner, _bare(name), limit + 1, after))
    return page(found, limit, lambda event: event_json(name, event))


@router.patch("/{name}", dependencies=CHANGES)
async def change_deployment(request: Request, name: str) -> dict[str, Any]:
    """Another description, a pause or its end, or a note of the runner on its cycle: one of them."""
    form = await forms.read(request, ChangeForm)
    owner, act, expected = tenant(request), act_of(request, form), form.expected
    if sum(value is not None for value in (form.description, form.paused, form.cycle)) != 1:
        raise InvalidRequest("give one of description, paused and cycle", param="description")
    if form.cycle is not None and expected is None:
        raise InvalidRequest("a note on the cycle needs `expected`: the revision that it goes on from", param="expected")
    described = None if form.description is None else descriptions.of(form.description)

    def write(conn: Connection) -> Deployment:
        if described is not None:
            _keep_base(deployments.get(conn, owner, _bare(name)), services(request).catalog.resolve(described.base).name)
            return deployments.change(conn, owner, name, descriptions.to_json(described), act)
        if form.paused is not None:
            return deployments.pause(conn, owner, _bare(name), form.paused, act)
        assert form.cycle is not None and expected is not None
        return deployments.note(conn, owner, _bare(name), form.cycle, expected, act)

    return deployment_json(await services(request).write(write))


@router.post("/{name}/advance", dependencies=CHANGES)
async def advance_deployment(request: Request, name: str) -> dict[str, Any]:
    """The next state of the cycle, on evidence. `expected` is the revision that it was decided on."""
    form = await forms.read(request, AdvanceForm)
    owner, act = tenant(request), act_of(request, form)

    def write(conn: Connection) -> Deployment:
        return deployments.advance(
            conn, owner, _bare(name), form.to, act,
            candidate=form.candidate, share=form.share, shadow=form.shadow, cycle=form.cycle, kind=form.kind,
        )  # fmt: skip

    return deployment_json(await services(request).write(write))


@router.post("/{name}/promote", dependencies=CHANGES)
async def promote(request: Request, name: str) -> dict[str, Any]:
    """The candidate, or version `number`, answers from the next request on."""
    form = await forms.read(request, ChampionForm)
    owner, act = tenant(request), act_of(request, form)
    return deployment_json(
        await services(request).write(lambda conn: deployments.promote(conn, owner, _bare(name), act, form.number, form.rule))
    )


@router.post("/{name}/rollback", dependencies=CHANGES)
async def rollback(request: Request, name: str) -> dict[str, Any]:
    """Gives up the candidate that is tried; where none is, goes back to the champion before this one, or to `number`."""
    form = await forms.read(request, ChampionForm)
    if form.rule:
        raise InvalidRequest("anybody may roll back: `rule` is for promotions", param="rule")
    owner, act = tenant(request), act_of(request, form)
    return deployment_json(await services(request).write(lambda conn: deployments.rollback(conn, owner, _bare(name), act, form.number)))


@router.delete("/{name}", status_code=204, dependencies=CHANGES)
async def delete_deployment(request: Request, name: str) -> Response:
    """Gives up the deployment; the name goes on meaning its champion, and the history stays."""
    owner = tenant(request)
    await services(request).write(lambda conn: deployments.delete(conn, owner, _bare(name)))
    return Response(status_code=204)


def _bare(name: str) -> str:
    if names.parse(name)[1] is not None:
        raise InvalidRequest(f"{name!r} names a version; a deployment has a bare name", param="name")
    return name


def _keep_base(now: Deployment, base: str) -> None:
    if now.base_model != base:
        raise InvalidRequest(
            f"{now.name} is of {now.base_model}; another base model needs a deployment of its own", param="description.base"
        )
