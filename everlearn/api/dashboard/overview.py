"""The overview: the line of the whole loop with counts and ages, each station a way to its page."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from fastapi import Request
from sqlalchemy import Connection

from everlearn.api.auth import tenant
from everlearn.api.browser import PAGES
from everlearn.api.dashboard import frame
from everlearn.api.dashboard.live import Look
from everlearn.api.services import Services, services
from everlearn.store import overview, runs

router = frame.page_router()


def look(part: str, svc: Services, conn: Connection, tenant: str) -> Any:
    return overview.mark(conn, tenant, part)


LIVE: dict[str, Look] = {part: functools.partial(look, part) for part in overview.ENDS}

# What a station is, and the page that shows it.
STATIONS = {
    "answers": ("Answers", "records of what was answered", "episodes"),
    "feedback": ("Feedback", "what was said of them, last words", "episodes"),
    "episodes": ("Episodes", "conversations and tasks", "episodes"),
    "labels": ("Labels", "feedback that teaches a reward model", "reward-model"),
    "datasets": ("Datasets", "frozen, to learn from", "datasets"),
    "versions": ("Versions", "of named adapters", "deploys"),
    "gate": ("Gate", "verdicts on candidates", "deploys"),
    "canary": ("Canary", "candidates that answer a share", "deploys"),
    "live": ("Live", "deployments and their champions", "deploys"),
}


@frame.twin(router, "", "overview.html")
async def page(request: Request) -> dict[str, Any]:
    svc, owner = services(request), tenant(request)
    there = {page.path: page.address for page in request.app.state.pages} | {"datasets": f"{PAGES}/datasets"}

    def read(conn: Connection) -> dict[str, Any]:
        found = []
        for station in overview.stations(conn, owner):
            title, what, path = STATIONS[station.name]
            found.append({**msgspec.structs.asdict(station), "title": title, "what": what, "page": there.get(path)})
        training, total = runs.list_runs(conn, owner, 1)
        newest = training[0].last_request_time if training else None
        return {"stations": found, "runs": {"count": total, "newest": newest, "page": there.get("runs")}}

    ready, reason = svc.dispatcher.readiness()
    return {**await svc.read(read), "ready": ready, "reason": reason, "uptime_since": svc.started_at, "system": there.get("system")}
