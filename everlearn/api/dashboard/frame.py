"""What every page of the dashboard stands in: a router, a renderer, and the JSON twin of each page.

A page is a function that reads and returns a dict: `twin` serves it as HTML under its path, through a template, and as JSON under the path
with `.json`. A page's module has `router` (made by `page_router`) and `LIVE`: by name, what is looked at to know whether that part of
the pages has changed (everlearn/api/dashboard/live.py).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

import jinja2
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import HTMLResponse

import everlearn
from everlearn.api import auth, errors
from everlearn.api.auth import scope
from everlearn.api.browser import PAGES
from everlearn.api.dashboard import live
from everlearn.api.records import encoded
from everlearn.errors import EverlearnError, InvalidRequest, Unauthenticated

Read = Callable[..., Awaitable[dict[str, Any]]]

FOLDER = Path(__file__).parent
MAX_FIELDS = 1000
# No script but ours, nothing from elsewhere, no frame around a page. Styles are ours too; what a script sets on an element is no matter
# of this header.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
PRIVATE = {**HEADERS, "cache-control": "no-store"}


class Page(NamedTuple):
    """A place in the navigation: /dashboard/`path` (the module everlearn.api.dashboard.`module` answers there), its title, and the letter
    that opens it after `g`."""

    path: str
    title: str
    key_hint: str
    module: str

    @property
    def address(self) -> str:
        return f"{PAGES}/{self.path}" if self.path else PAGES


class PageRoute(APIRoute):
    """Tells a browser of an error by a page: where nobody has signed in, by the one that asks for a key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (EverlearnError, RequestValidationError) as error:
                if wants_html(request):
                    return error_page(request, error)
                raise

        return answer


def page_router() -> APIRouter:
    """Of one page's module. Reading needs the scope `read`; a route that changes something asks for its own besides."""
    return APIRouter(prefix=PAGES, route_class=PageRoute, dependencies=[scope("read")], include_in_schema=False)


def twin(router: APIRouter, path: str, template: str) -> Callable[[Read], Read]:
    """Serves what the function returns under `path` as a page and under `path`.json as JSON. Its first parameter is `request`."""

    def add(read: Read) -> Read:
        @functools.wraps(read)
        async def as_json(**given: Any) -> Response:
            return Response(encoded(await read(**given)), media_type="application/json", headers=PRIVATE)

        @functools.wraps(read)
        async def as_page(**given: Any) -> Response:
            request: Request = given["request"]
            seen = await live.seen(request)  # before the data: what changes in between is shown twice rather than missed
            data = {**await read(**given), "seen": seen}
            return await asyncio.to_thread(show, request, template, data)  # a large page takes a second

        # The JSON first: a last part in braces would take the suffix for a part of the id.
        router.add_api_route(path + ".json", as_json, methods=["GET"], response_model=None)
        router.add_api_route(path, as_page, methods=["GET"], response_model=None)
        return read

    return add


def show(request: Request, template: str, data: dict[str, Any], status: int = 200) -> HTMLResponse:
    """`data` in a template, which also sees the request, who asks, the navigation and the time."""
    caller = getattr(request.state, "caller", auth.ANYONE)
    frame = {
        "request": request,
        "who": caller,
        "pages": request.app.state.pages,
        "here": request.scope["path"],
        "version": everlearn.__version__,
        "now": time.time(),
        "seen": {},
        "link": functools.partial(link, request),
    }
    text = ENVIRONMENT.get_template(template).render({**frame, **data})
    return HTMLResponse(text.encode("utf-8", "replace"), status, headers=PRIVATE)


def wants_html(request: Request) -> bool:
    """Whether a browser asks for a page, or for a part of one; its scripts say when they want JSON."""
    accept = request.headers.get("accept", "")
    return "text/html" in accept or (request.headers.get("hx-request") == "true" and "application/json" not in accept)


def error_page(request: Request, error: EverlearnError | RequestValidationError) -> Response:
    if isinstance(error, RequestValidationError):
        status = 400
        message = "; ".join(f"{'.'.join(str(part) for part in found['loc'][1:])}: {found['msg']}" for found in error.errors()[:3])
    else:
        status, message = errors.STATUS.get(error.code, 500), error.message
    signing_in = isinstance(error, Unauthenticated)
    page = show(request, "sign_in.html" if signing_in else "error.html", {"status": status, "message": message, "seen": {}}, status)
    if signing_in and request.headers.get("hx-request") == "true":
        page.headers["hx-refresh"] = "true"  # a part of a page can't ask for a key; the whole page can
    return page


def link(request: Request, **changes: Any) -> str:
    """This page's address with other query parameters; None takes one away. What depends on a place in a list (`after`, `offset`) goes with
    every change of another parameter."""
    query = {name: value for name, value in request.query_params.items() if name not in ("after", "offset") or name in changes}
    query |= changes
    kept = {name: str(value) for name, value in query.items() if value is not None and value != ""}
    path = quote(request.scope["path"], safe="/:@")
    return f"{path}?{urlencode(kept)}" if kept else path


async def form(request: Request) -> dict[str, str]:
    """The fields of a form that a page sent (of a name that came twice, the last)."""
    try:
        text = (await request.body()).decode()
        return dict(parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=MAX_FIELDS))
    except ValueError as error:
        raise InvalidRequest(f"the body is not a form: {error}") from None


def age(seconds: float | None, now: float) -> str:
    """How long ago a moment (in Unix seconds) was, in the largest unit that fits."""
    if seconds is None:
        return "never"
    past = max(0.0, now - seconds)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if past >= size:
            return f"{past / size:.0f} {unit} ago"
    return f"{past:.0f} s ago"


def moment(seconds: float | None) -> str:
    """A time as ISO 8601, in UTC; empty for none."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def figure(value: Any, digits: int = 4) -> str:
    """A number for people: whole ones with commas, others with so many significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.{digits}g}" if abs(value) < 1e6 else f"{value:,.0f}"


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"age": age, "moment": moment, "figure": figure, "bytes": size, "part": lambda text: quote(str(text), safe=":@")}
