"""The pages Episodes and Datasets: conversations as they were said and judged, and what was learned from them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from fastapi import Query, Request

from everlearn.api.auth import tenant
from everlearn.api.dashboard import episode_views, frame
from everlearn.api.dashboard.episode_views import Chosen
from everlearn.api.dashboard.frame import page_router, twin
from everlearn.api.dashboard.live import Look
from everlearn.api.paging import After, refuse_unknown
from everlearn.api.services import services
from everlearn.errors import InvalidRequest

router = page_router()
frame.ENVIRONMENT.filters["said"] = lambda message: "\n".join(episode_views.words(message))
Records = Query(100, ge=1, le=1000)
FILTERS = ("user", "model", "split", "feedback", "since", "until", "text")
LIVE: dict[str, Look] = {}  # what they show is looked at for the overview already


@twin(router, "/episodes", "episodes.html")
async def list_page(
    request: Request,
    user: str = "",
    model: str = "",
    split: Literal["", "train", "heldout"] = "",
    feedback: Literal["", "with", "without"] = "",
    since: str = "",
    until: str = "",
    text: str = "",
    after: str | None = After,
) -> dict[str, Any]:
    refuse_unknown(request, "after", *FILTERS)
    chosen = Chosen(
        user=user or None,
        model=model or None,
        split=split or None,
        judged={"": None, "with": True, "without": False}[feedback],
        since=day(since, "since"),
        until=day(until, "until", timedelta(days=1)),
        text=text or None,
    )
    owner = tenant(request)
    found = await services(request).read(lambda conn: episode_views.listed(conn, owner, chosen, after or None))
    return found | {"chosen": {name: request.query_params.get(name, "") for name in FILTERS}}


def day(text: str, param: str, more: timedelta = timedelta()) -> float | None:
    """When a day (2026-11-26) begins in UTC, or with `more` that much later, in Unix seconds."""
    if not text:
        return None
    try:
        return (datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) + more).timestamp()
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{param} {text[:40]!r} must be a day, as in 2026-11-26", param=param) from None


@twin(router, "/episodes/{episode_id}", "episode.html")
async def episode_page(request: Request, episode_id: str, after: str | None = After, limit: int = Records) -> dict[str, Any]:
    refuse_unknown(request, "after", "limit")
    svc, owner = services(request), tenant(request)
    return await svc.read(lambda conn: episode_views.whole(conn, owner, episode_id, svc.settings.feedback, after, limit))


@twin(router, "/datasets", "datasets.html")
async def datasets_page(request: Request, after: str | None = After) -> dict[str, Any]:
    refuse_unknown(request, "after")
    owner = tenant(request)
    return await services(request).read(lambda conn: episode_views.datasets_listed(conn, owner, after))


@twin(router, "/datasets/{dataset_id}", "dataset.html")
async def dataset_page(request: Request, dataset_id: str, after: int = Query(-1, ge=-1, le=2**40)) -> dict[str, Any]:
    refuse_unknown(request, "after")
    owner = tenant(request)
    return await services(request).read(lambda conn: episode_views.dataset(conn, owner, dataset_id, after))
