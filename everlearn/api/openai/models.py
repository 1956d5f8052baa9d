"""GET /models: base models, and the tenant's adapters by name and version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from everlearn.api import auth
from everlearn.api.services import Services, services
from everlearn.api.target import may_use, resolve
from everlearn.store import names
from everlearn.types import BaseModelInfo

router = APIRouter(tags=["openai: models"])
OWNER = "everlearn"


@router.get("/models", dependencies=[auth.scope("train", "sample", "read")])
async def list_models(request: Request) -> dict[str, Any]:
    """Base models and their aliases; adapters as `name` and as the `name@version` that it means now. GET /v1/adapters has the rest."""
    svc, caller = services(request), auth.caller(request)
    shown = [of_base(svc, info, name) for info in svc.catalog.list() for name in (info.name, *info.aliases)]
    for version in await svc.read(lambda conn: names.list_names(conn, caller.tenant)):
        if svc.catalog.knows(version.base_model):
            base, created = svc.catalog.resolve(version.base_model), int(version.created_at)
            shown.append(entry(version.name, created, base, root=str(version), parent=base.name))
            shown.append(entry(str(version), created, base, root=version.path, parent=base.name))
    return {"object": "list", "data": [model for model in shown if may_use(svc, caller, model["id"])]}


@router.get("/models/{model:path}", dependencies=[auth.scope("train", "sample", "read")])
async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
    svc, caller = services(request), auth.caller(request)
    target = await resolve(svc, caller, model)
    svc.limiter.check_model(caller, target.name)
    if not target.version:
        return of_base(svc, target.base, model)
    return entry(model, int(svc.started_at), target.base, root=target.name, parent=target.base.name)


def of_base(svc: Services, info: BaseModelInfo, name: str) -> dict[str, Any]:
    return entry(name, int(svc.started_at), info, root=info.name, parent=None)


def entry(name: str, created: int, base: BaseModelInfo, root: str, parent: str | None) -> dict[str, Any]:
    """`root`, `parent` and `max_model_len` as vLLM has them: what the name means, and which base model is below."""
    shown = {"id": name, "object": "model", "created": created, "owned_by": OWNER, "root": root, "parent": parent}
    return {**shown, "max_model_len": base.max_context}
