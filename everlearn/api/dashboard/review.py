"""The page Review: answers that want a person, judged and corrected without leaving the keyboard.

What is said there is feedback like any other: the routes hand the browser's request to those of /v1/feedback.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from everlearn.api import auth
from everlearn.api import feedback as said
from everlearn.api.auth import scope, tenant
from everlearn.api.dashboard import review_views
from everlearn.api.dashboard.frame import page_router, twin
from everlearn.api.dashboard.live import Look
from everlearn.api.paging import After, refuse_unknown
from everlearn.api.services import services
from everlearn.store import review

router = page_router()
SAYS = [scope("sample")]
LIVE: dict[str, Look] = {}


@twin(router, "/review", "review.html")
async def queue_page(request: Request, model: str = "", after: str | None = After) -> dict[str, Any]:
    refuse_unknown(request, "model", "after")
    svc, owner = services(request), tenant(request)
    found = await svc.read(lambda conn: review_views.queue(conn, owner, model or None, after=after))
    choices = [{"label": label, "value": value} for label, value in svc.settings.feedback.review_choices.items()]
    # A reviewer is a source of its own: what the user said of the answer stays beside it.
    reviewer = f"reviewer {auth.caller(request).key_id or 'here'}"
    return found | {"choices": choices, "name": review.NAME, "source_id": reviewer, "model": model}


@router.post("/review/feedback", dependencies=SAYS, response_model=None)
async def say(request: Request) -> Response:
    return await said.give_feedback(request)


@router.delete("/review/feedback/{feedback_id}", dependencies=SAYS, response_model=None)
async def unsay(request: Request, feedback_id: str) -> Response:
    return await said.delete_feedback(request, feedback_id)
