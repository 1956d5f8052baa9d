"""The page Reward model: the calibration of each deployment's reward model, and whether it has earned to be a reward."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import Query, Request
from sqlalchemy import Connection

from everlearn.api.auth import tenant
from everlearn.api.dashboard import reward_views
from everlearn.api.dashboard.frame import page_router, twin
from everlearn.api.dashboard.live import Look
from everlearn.api.paging import refuse_unknown
from everlearn.api.services import Services, services
from everlearn.store import tables

router = page_router()


def look(svc: Services, conn: Connection, owner: str) -> Any:
    columns = (tables.reward_models.c.model_id, tables.reward_streams.c.updated_at, tables.doubts.c.record_id)
    return [conn.execute(sa.select(sa.func.max(column)).where(column.table.c.tenant == owner)).scalar() for column in columns]


LIVE: dict[str, Look] = {"rewards": look}


@twin(router, "/reward-model", "reward_models.html")
async def list_page(request: Request) -> dict[str, Any]:
    refuse_unknown(request)
    owner = tenant(request)
    return await services(request).read(lambda conn: reward_views.listed(conn, owner))


@twin(router, "/reward-model/{name}", "reward_model.html")
async def model_page(request: Request, name: str, version: int | None = Query(None, ge=1, le=2**31)) -> dict[str, Any]:
    refuse_unknown(request, "version")
    owner = tenant(request)
    return await services(request).read(lambda conn: reward_views.shown(conn, owner, name, version))
