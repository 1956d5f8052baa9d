"""The application: every router, one dependency for keys, one body limit, one error envelope, one request id.

A request's road: `Observe` gives it an id and a place in the metrics, `authenticate` says whose it is, `BodyLimit` reads and inflates
its body, its route validates it and hands a command to the dispatcher (everlearn/api/dispatch.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import everlearn
from everlearn.api import (
    adapters,
    capabilities,
    datasets,
    deployments,
    episodes,
    errors,
    feedback,
    memories,
    ops,
    records,
    reward_models,
    runs,
    signals,
    tokens,
    usage,
)
from everlearn.api.anthropic import messages as anthropic
from everlearn.api.auth import KeyCache, admit, authenticate, scope
from everlearn.api.chatmodels import ChatModels
from everlearn.api.dashboard import pages
from everlearn.api.dispatch import Dispatcher
from everlearn.api.housekeeping import Housekeeping
from everlearn.api.limiter import Limiter
from everlearn.api.limits import BodyLimit
from everlearn.api.openai import routes as openai
from everlearn.api.ops import Metrics
from everlearn.api.recorder import Recorder
from everlearn.api.refilling import Refills
from everlearn.api.rewarding import Rewarding
from everlearn.api.services import Services
from everlearn.api.serving import Serving
from everlearn.api.shadow import Shadows
from everlearn.api.supervise import EngineProcess
from everlearn.api.tinker import places
from everlearn.api.tinker.forms import CHECK_ADDRESS
from everlearn.api.tinker.routes import ROUTERS
from everlearn.config import Settings
from everlearn.errors import EverlearnError
from everlearn.models.catalog import Catalog
from everlearn.store import garbage
from everlearn.store.db import Database, open_database
from everlearn.store.spool import Spool
from everlearn.telemetry import request_id_var

log = logging.getLogger(__name__)
STORE_THREADS = 24


def create_app(settings: Settings) -> FastAPI:
    """The app of one server. The store is opened, and the engine started, when the app starts."""
    app = FastAPI(
        title="everlearn",
        version=everlearn.__version__,
        openapi_url=None,  # FastAPI's own would be outside of the key check; ours is a route like all others
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(authenticate)],
    )
    app.state.settings = settings
    app.state.key_cache = KeyCache()
    errors.install(app)
    for router, scopes in ROUTERS:
        app.include_router(router, dependencies=[scope(*scopes), CHECK_ADDRESS])
    for prefix in openai.PREFIXES:
        for router in openai.ROUTERS:
            app.include_router(router, prefix=prefix)
    app.include_router(anthropic.router, prefix=anthropic.PREFIX)
    loop = (episodes, feedback, datasets, deployments, reward_models)
    for own in (ops, adapters, capabilities, memories, records, usage, runs, *loop, tokens):
        app.include_router(own.router)

    pages.install(app)

    @app.get("/openapi.json", include_in_schema=False, dependencies=[scope("train", "sample", "read")])
    async def openapi() -> dict[str, object]:
        return app.openapi()

    app.add_middleware(BodyLimit, max_bytes=settings.api.max_body_bytes, admit=admit, on_refusal=places.keep_of_refused)
    app.add_middleware(Observe, app_state=app.state)
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Reads of the store share these threads with the checks of large folders; the default of six could all be busy with those.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="blocking"))
    try:
        svc = await asyncio.to_thread(open_services, app.state.settings)
    except EverlearnError as error:
        app.state.failure = error
        raise
    app.state.services = svc
    housekeeping, rewarding = Housekeeping(svc), svc.rewarding
    try:
        svc.records.start()
        await svc.dispatcher.start()
        svc.engine.start()
        housekeeping.start()
        rewarding.start()
        yield
    finally:
        svc.dispatcher.draining = True
        await svc.serving.drain(grace=0.0)
        await rewarding.stop()
        await housekeeping.stop()
        await svc.engine.stop(grace=10.0)
        await svc.dispatcher.stop()
        await asyncio.to_thread(svc.records.close)
        await asyncio.to_thread(svc.db.close)


def open_services(settings: Settings) -> Services:
    """Everything that blocks at start: migrations, the claim on the store, the sweep of unfinished folders, the catalog, the spool."""
    settings.home.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(settings)
    db = open_database(settings.store_url)
    try:
        db.claim_server()
        garbage.boot_sweep(db, settings.home, time.time())
        return make_services(settings, db, catalog)
    except BaseException:
        db.close()
        raise


def make_services(settings: Settings, db: Database, catalog: Catalog) -> Services:
    metrics = Metrics()
    engine = EngineProcess(settings)
    name = catalog.default.name
    if not catalog.is_ready(name):

        async def prepare(process: EngineProcess) -> None:
            def progress(text: str, share: float) -> None:
                process.reason = f"preparing {name}: {text} ({100 * share:.0f} %)"

            await asyncio.to_thread(catalog.prepare, name, progress)

        engine.prepare = prepare
    dispatcher = Dispatcher(settings, db, engine, metrics)
    serving = Serving(settings, engine, dispatcher, metrics.serving)
    metrics.watch(engine, dispatcher, serving)
    keep = partial(signals.keep, settings=settings.feedback)
    recorder = Recorder(db, Spool(settings.home / "spool"), metrics.records_total.inc, metrics.records_lost.inc, keep)
    metrics.records_waiting.set_function(lambda: len(recorder))
    metrics.records_spooled.set_function(lambda: recorder.spool.size)
    limiter = Limiter(catalog, recorder.backlog)
    chats, behind = ChatModels(catalog), (Shadows(), Refills())  # what is made when nobody waits for it any more
    made = Services(settings, db, catalog, engine, dispatcher, metrics, serving, chats, limiter, recorder, *behind)
    object.__setattr__(made, "rewarding", Rewarding(made))  # it uses all the others, and they are frozen with it
    return made


class Observe:
    """Gives every request an id (ours: one that the client chose could forge log lines), counts it, and logs it if it failed."""

    def __init__(self, app: ASGIApp, app_state: object):
        self.app, self.state = app, app_state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = f"req_{int(time.time() * 1000):011x}{secrets.token_hex(5)}"
        token = request_id_var.set(request_id)
        started, status = time.perf_counter(), 0
        metrics: Metrics = self.state.services.metrics  # type: ignore[attr-defined]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(k, v) for k, v in message.get("headers", []) if k.lower() != b"x-request-id"]
                message["headers"] = [*headers, *errors.headers_of(scope, request_id.encode())]
            await send(message)

        metrics.http_running.inc()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:
                raise  # the answer has begun; the connection is cut, so that it can't be taken for a whole one
            await errors.unexpected(scope, error)(scope, receive, send_with_id)
        finally:
            seconds, route, method = time.perf_counter() - started, errors.route_path(scope), method_of(scope)
            metrics.http_running.dec()
            metrics.http_seconds.labels(method, route).observe(seconds)
            metrics.http_total.labels(method, route, str(status)).inc()
            level = logging.INFO if status >= 400 and route not in ("/readyz", "/health") else logging.DEBUG
            log.log(level, "%s %s %d", method, route, status, extra={"ms": round(1000 * seconds, 1)})
            request_id_var.reset(token)
        return None


def method_of(scope: Scope) -> str:
    """One of the known methods: what a client makes up must not become a label."""
    method: str = scope["method"]
    return method if method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH") else "OTHER"
