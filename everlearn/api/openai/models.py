"""GET /models: base models, and the tenant's adapters and deployments by name and version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection

from everlearn.api import auth
from everlearn.api.services import Services, services
from everlearn.api.target import may_use, resolve
from everlearn.store import deployments, names
from everlearn.types import BaseModelInfo

router = APIRouter(tags=["openai: models"])
OWNER = "everlearn"


@router.get("/models", dependencies=[auth.scope("train", "sample", "read")])
async def list_models(request: Request) -> dict[str, Any]:
    """Base models and their aliases; adapters as `name` and as the `name@version` that it means now, a name that is deployed on the base
    model as `name` and `name@0`. GET /v1/adapters has the rest."""
    svc, caller = services(request), auth.caller(request)
    shown = [of_base(svc, info, name) for info in svc.catalog.list() for name in (info.name, *info.aliases)]
    for name, number, base_model, path, created in await svc.read(lambda conn: means(conn, caller.tenant)):
        if svc.catalog.knows(base_model):
            base, meant = svc.catalog.resolve(base_model), f"{name}@{number}"
            shown.append(entry(name, int(created), base, root=meant, parent=base.name))
            shown.append(entry(meant, int(created), base, root=path or base.name, parent=base.name))
    return {"object": "list", "data": [model for model in shown if may_use(svc, caller, model["id"])]}


def means(conn: Connection, tenant: str) -> list[tuple[str, int, str, str, float]]:
    """By name: the name, the number that it means now, the base model, the checkpoint's path ("" for number 0), and when that was made."""
    found = {one.name: (one.name, one.number, one.base_model, one.path, one.created_at) for one in names.list_names(conn, tenant)}
    found |= {one.name: (one.name, 0, one.base_model, "", one.created_at) for one in deployments.on_base(conn, tenant)}
    return [found[name] for name in sorted(found)]


@router.get("/models/{model:path}", dependencies=[auth.scope("train", "sample", "read")])
async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
    svc, caller = services(request), auth.caller(request)
    target = await resolve(svc, caller, model)
    svc.limiter.check_model(caller, target.name)
    if not target.version and target.adapter is None:
        return of_base(svc, target.base, model)
    return entry(model, int(svc.started_at), target.base, root=target.name, parent=target.base.name)


def of_base(svc: Services, info: BaseModelInfo, name: str) -> dict[str, Any]:
    return entry(name, int(svc.started_at), info, root=info.name, parent=None)


def entry(name: str, created: int, base: BaseModelInfo, root: str, parent: str | None) -> dict[str, Any]:
    """`root`, `parent` and `max_model_len` as vLLM has them: what the name means, and which base model is below."""
    shown = {"id": name, "object": "model", "created": created, "owned_by": OWNER, "root": root, "parent": parent}
    return {**shown, "max_model_len": base.max_context}
