"""The dashboard: its pages in the order of the navigation, their files, and the way in.

A page is one line in PAGES, a module beside this one (everlearn/api/dashboard/frame.py says what it holds), and a template. Everything lies
under /dashboard, behind the same keys, scopes and tenants as the API.
"""

from __future__ import annotations

import importlib
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

from everlearn.api import auth, browser
from everlearn.api.dashboard import frame, live
from everlearn.api.dashboard.frame import HEADERS, PRIVATE, Page
from everlearn.api.services import services
from everlearn.errors import NotFound, Unsupported

PAGES = (
    Page("", "Overview", "o", "overview"),
    Page("runs", "Runs", "r", "runs"),
    Page("rollouts", "Rollouts", "l", "rollouts"),
    Page("episodes", "Episodes", "e", "episodes"),
    Page("review", "Review", "v", "review"),
    Page("reward-model", "Reward model", "w", "reward_model"),
    Page("deploys", "Deploys", "d", "deploys"),
    Page("memory", "Memory", "m", "memory"),
    Page("system", "System", "s", "system"),
)


def install(app: FastAPI) -> None:
    """Adds the pages to the app."""
    modules = [importlib.import_module(f"everlearn.api.dashboard.{page.module}") for page in PAGES]
    app.state.pages = PAGES
    app.state.parts = live.Parts({name: look for module in modules for name, look in module.LIVE.items()})
    app.mount(f"{browser.PAGES}/static", Files(directory=frame.FOLDER / "static"))
    for module in modules:
        app.include_router(module.router)
    router = frame.page_router()
    router.add_api_route("/session", sign_in, methods=["POST"], response_model=None)
    router.add_api_route("/session", sign_out, methods=["DELETE"], response_model=None)
    router.add_api_route("/events", live.events, methods=["GET"], response_model=None)
    router.add_api_route("/{rest:path}", missing, methods=["GET"], response_model=None)
    app.include_router(router)
    root = APIRouter(route_class=frame.PageRoute, dependencies=[auth.scope("train", "sample", "read")], include_in_schema=False)
    root.add_api_route("/", to_pages, methods=["GET"], response_model=None)
    app.include_router(root)


class Files(StaticFiles):
    """Scripts and styles; open without a key, like the page that asks for one. They are checked for changes at each use."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update({**HEADERS, "cache-control": "no-cache"})
        return response


async def sign_in(request: Request) -> Response:
    """Sets the cookie for the key that this request came with."""
    caller, secret = auth.caller(request), auth.signing_secret(services(request).settings.home)
    if caller.key_id is None:
        raise Unsupported("this server has no keys, and needs no signing in")
    response = Response(status_code=204, headers=PRIVATE)
    response.set_cookie(
        browser.cookie_name(secret), browser.sign(secret, caller.key_id), max_age=browser.SIGNED_IN_SECONDS, path="/",
        secure=request.scope["scheme"] == "https", httponly=True, samesite="strict",
    )  # fmt: skip
    return response


async def sign_out(request: Request) -> Response:
    response = Response(status_code=204, headers=PRIVATE)
    response.delete_cookie(browser.cookie_name(auth.signing_secret(services(request).settings.home)), path="/")
    return response


async def missing(request: Request, rest: str) -> Response:
    """An address with a slash at its end leads to the one without; every other has no page."""
    if not rest or rest.endswith("/"):
        path = quote(f"{browser.PAGES}/{rest}".rstrip("/"), safe="/:@")
        query = request.url.query
        return RedirectResponse(f"{path}?{query}" if query else path, 303, headers=PRIVATE)
    raise NotFound(f"no page /dashboard/{rest[:200]}; the navigation lists those that exist")


async def to_pages(request: Request) -> Response:
    """A browser that is given the server's bare address wants the dashboard."""
    if not frame.wants_html(request):
        raise NotFound("no route GET /; the routes are listed at /openapi.json, the pages start at /dashboard")
    return RedirectResponse(browser.PAGES, 303)
