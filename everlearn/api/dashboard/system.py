"""The state of the server: the engine, its queues and caches, memory, the store, and what each key may use. From the sources of /metrics
and /readyz; of keys, a caller sees its own, and an admin the tenant's."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import Request
from sqlalchemy import Connection

import everlearn
from everlearn.api import auth
from everlearn.api.auth import Caller
from everlearn.api.dashboard import frame
from everlearn.api.dashboard.live import Look
from everlearn.api.services import Services, services
from everlearn.store import keys, log

router = frame.page_router()
BEAT_SECONDS = 2  # how often the page is fetched again while nothing but time goes by


def readiness(svc: Services, conn: Connection, tenant: str) -> Any:
    return svc.dispatcher.readiness()[0], svc.engine.state, svc.engine.generation


def pulse(svc: Services, conn: Connection, tenant: str) -> Any:
    return int(time.time() / BEAT_SECONDS)


LIVE: dict[str, Look] = {"ready": readiness, "system": pulse}


@frame.twin(router, "/system", "system.html")
async def page(request: Request) -> dict[str, Any]:
    svc, caller = services(request), auth.caller(request)
    found, used = await svc.read(lambda conn: (own_keys(conn, caller), log.usage(conn)))
    ready, reason = svc.dispatcher.readiness()
    return {
        "ready": ready,
        "reason": reason,
        "server": {"version": everlearn.__version__, "started_at": svc.started_at, "store": svc.db.dialect},
        "engine": engine_of(svc),
        "queues": {**svc.dispatcher.stats(), **svc.serving.stats()},
        "log": msgspec.structs.asdict(used) if "admin" in caller.scopes else None,
        "records_waiting": len(svc.records),
        "keys": [key_of(svc, key) for key in found],
        "all_keys": "admin" in caller.scopes,
    }


def own_keys(conn: Connection, caller: Caller) -> list[keys.Key]:
    """The keys that work now, of those that the caller may see."""
    if caller.key_id is None:
        return []
    found = keys.list_keys(conn, caller.tenant)
    return [key for key in found if key.revoked_at is None and ("admin" in caller.scopes or key.key_id == caller.key_id)]


def key_of(svc: Services, key: keys.Key) -> dict[str, Any]:
    running, left = svc.limiter.use(key.key_id, key.limits)
    shown = {field: getattr(key, field) for field in ("key_id", "name", "prefix", "scopes", "content")}
    return {**shown, "limits": msgspec.structs.asdict(key.limits), "running": running, "left": left}


def engine_of(svc: Services) -> dict[str, Any]:
    """The engine process and, from its last heartbeat, what it does."""
    engine, beat, ready = svc.engine, svc.engine.heartbeat, svc.engine.ready
    told: dict[str, Any] = {
        "state": str(engine.state),
        "reason": engine.reason,
        "pid": engine.pid,
        "restarts": engine.restarts,
        "last_death": engine.last_death.text or None,
        "device": ready.device if ready else None,
        "dtype": ready.dtype if ready else None,
        "models": [model.name for model in ready.models] if ready else [],
        "last_token_at": engine.last_token_at,
        "beat": None,
    }
    if beat is not None:
        told["beat"] = {
            "at": beat.unix_time,
            "activity": beat.activity or "idle",
            "last_progress": beat.last_progress,
            "running": beat.sampling_running,
            "waiting": beat.sampling_waiting,
            "compiling": beat.sampling_compiling,
            "training_queued": beat.training_queued,
            "kv_blocks_used": beat.kv_blocks_used,
            "kv_blocks_total": beat.kv_blocks_total,
            "block_tokens": svc.settings.engine.block_size,
            "preemptions": engine.counter("preemptions"),
            "prompt_tokens": engine.counter("prompt_tokens"),
            "prefix_hit_tokens": engine.counter("prefix_hit_tokens"),
            "sampled_tokens": engine.counter("sampled_tokens"),
            "trained_tokens": engine.counter("trained_tokens"),
            "optimizer_steps": engine.counter("optimizer_steps"),
            "memory_bytes": beat.rss_bytes,
            "device_bytes": beat.device_bytes,
            "device_total_bytes": beat.device_total_bytes,
        }
    return told
