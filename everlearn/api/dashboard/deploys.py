"""The page Deploys: what answers under each name, what is tried beside it and why, and the ways forward and back.

What a press of a button does, the routes of /v1/deployments do: these here hand them the browser's request.
"""

from __future__ import annotations

from typing import Any

from fastapi import Query, Request
from sqlalchemy import Connection

from everlearn.api import deployments as acts
from everlearn.api.auth import scope, tenant
from everlearn.api.dashboard import deploy_views
from everlearn.api.dashboard.frame import page_router, twin
from everlearn.api.dashboard.live import Look
from everlearn.api.dashboard.looks import Looks
from everlearn.api.paging import After, refuse_unknown
from everlearn.api.services import services
from everlearn.store import deployments

router = page_router()
CHANGES = [scope("train")]
LOOKS = Looks()
LIVE: dict[str, Look] = {}


@twin(router, "/deploys", "deploys.html")
async def list_page(request: Request, after: str | None = After) -> dict[str, Any]:
    refuse_unknown(request, "after")
    owner = tenant(request)
    return await services(request).read(lambda conn: deploy_views.listed(conn, owner, after))


@twin(router, "/deploys/{name}", "deploy.html")
async def deployment_page(request: Request, name: str, after: int | None = Query(None, ge=1, le=2**62)) -> dict[str, Any]:
    refuse_unknown(request, "after")
    svc, owner = services(request), tenant(request)

    def read(conn: Connection) -> dict[str, Any]:
        return deploy_views.shown(conn, deployments.get(conn, owner, name), LOOKS, svc.settings, after)

    return await svc.read(read)


@router.post("/deploys/{name}/promote", dependencies=CHANGES)
async def promote(request: Request, name: str) -> dict[str, Any]:
    return await acts.promote(request, name)


@router.post("/deploys/{name}/rollback", dependencies=CHANGES)
async def rollback(request: Request, name: str) -> dict[str, Any]:
    return await acts.rollback(request, name)


@router.patch("/deploys/{name}", dependencies=CHANGES)
async def change(request: Request, name: str) -> dict[str, Any]:
    return await acts.change_deployment(request, name)
