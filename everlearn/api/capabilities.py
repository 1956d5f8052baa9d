"""/v1/capabilities: what this server can do and how much of it, before anybody runs into it. Every bound here is enforced."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request

import everlearn
from everlearn.api import bounds, grants
from everlearn.api.auth import caller, scope
from everlearn.api.services import services
from everlearn.loop import gather
from everlearn.store import episodes, feedback, feedback_checks
from everlearn.types import BaseModelInfo

FEEDBACK = {
    "text_chars": feedback_checks.MAX_TEXT,
    "demonstration_chars": feedback_checks.MAX_ANSWER,
    "reason_chars": feedback_checks.MAX_REASON,
    "of_one_source_about_one_answer": feedback.MAX_WORDS,
    "events_of_an_episode": episodes.MAX_EVENTS,
    "token_seconds": grants.MAX_SECONDS,
    "dataset_bytes": gather.MAX_BYTES,
}

router = APIRouter(prefix="/v1", tags=["capabilities"], dependencies=[scope("train", "sample", "read")])


@router.get("/capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """The server's models and bounds, and what the caller's key may use."""
    svc, who = services(request), caller(request)
    settings = svc.settings
    return {
        "object": "capabilities",
        "version": everlearn.__version__,
        "models": [{**model_json(info), "kv_tokens": svc.engine.kv_tokens.get(info.name)} for info in svc.catalog.list()],
        "limits": {
            "body_bytes": settings.api.max_body_bytes,
            "request": bounds.BOUNDS,
            "feedback": FEEDBACK,
            "request_seconds": settings.api.request_seconds,
            "live_sequences": settings.engine.max_batch + settings.api.live_queue,
            "pending_requests": settings.api.max_pending_requests,
            "lora_rank": settings.engine.max_rank,
            "kv_tokens": svc.engine.ready.kv_tokens if svc.engine.ready else None,
            "record_retention_seconds": settings.store.record_retention_seconds,
            "result_retention_seconds": settings.store.result_retention_seconds,
        },
        "key": {
            "key_id": who.key_id,
            "tenant": who.tenant,
            "scopes": sorted(who.scopes),
            "limits": msgspec.structs.asdict(who.limits),
            "content_recorded": who.content,
        },
    }


def model_json(info: BaseModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "aliases": info.aliases,
        "architecture": info.architecture,
        "context": info.max_context,
        "vocabulary": info.vocab_size,
    }
