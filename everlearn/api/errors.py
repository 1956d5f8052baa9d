"""One table from error codes to HTTP statuses, and two envelopes: one that OpenAI's and Tinker's clients both read, and Anthropic's.

The Tinker SDK sends a request again on 408, 409, 429 and 5xx, for minutes and whatever the headers say; so nothing permanent is
answered with one of these, and a conflict is a 400 (its `code` says what it is). The one exception is no route of Tinker's: an idempotency
key that was used for another body is a 409, as everywhere, with the header that tells OpenAI's clients not to try again.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from everlearn import errors
from everlearn.api import grants
from everlearn.telemetry import request_id_var

log = logging.getLogger(__name__)

STATUS = {
    "error": 500,
    "user_error": 400,
    "invalid_request": 400,
    "context_length_exceeded": 400,  # OpenAI's words, which clients look for
    "previous_response_not_found": 400,
    "thread_unsupported_request": 400,  # Anthropic's
    "unsupported": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 400,
    "idempotency_conflict": 409,
    "reward_not_earned": 409,
    "damaged": 400,
    "expired": 410,
    "too_large": 413,
    "overloaded": 429,
    "rate_limited": 429,
    "internal": 500,
    "unavailable": 503,
    "cancelled": 400,
}

# OpenAI's `type` by status; everything else is invalid_request_error.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

# The same of Anthropic's API, and where that is. A full queue has a type of its own there.
ANTHROPIC_PATH = "/anthropic/"
ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
ANTHROPIC_TYPES |= {429: "rate_limit_error", 500: "api_error", 503: "api_error"}

HEADERS = {
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
    401: {"www-authenticate": "Bearer"},
    409: {"x-should-retry": "false"},
}
RATE_LIMIT = "x-ratelimit-"


def envelope(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": TYPES.get(status, "invalid_request_error"), "param": param, "code": code}
    return {"error": error, "detail": message}


def anthropic_envelope(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """`details.error_code` is where the SDK looks for a code; `param` and `code` stand where the other routes have them."""
    kind = "overloaded_error" if code == "overloaded" else ANTHROPIC_TYPES.get(status, "invalid_request_error")
    error = {"type": kind, "message": message, "param": param, "code": code, "details": {"error_code": code}}
    return {"type": "error", "error": error, "request_id": request_id_var.get() or None}


def error_response(
    status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None, *, path: str = ""
) -> Response:
    """The answer to a request that failed, in the shape of the API at `path`; the request's id is in the header (and in our log) for
    both sides to name it."""
    shape = anthropic_envelope if path.startswith(ANTHROPIC_PATH) else envelope
    # Lone surrogates may come back from a client's own text; JSON with ASCII escapes can always be sent.
    body = msgspec.json.encode(shape(status, code, message.encode("utf-8", "backslashreplace").decode(), param))
    merged = {**HEADERS.get(status, {}), **(headers or {})}
    if request_id := request_id_var.get():
        merged["x-request-id"] = request_id
    return Response(body, status, media_type="application/json", headers=merged)


def headers_of(scope: Any, request_id: bytes) -> list[tuple[bytes, bytes]]:
    """What every answer to this request has, whether it failed or not."""
    found = [(b"x-request-id", request_id)]
    if scope["path"].startswith(ANTHROPIC_PATH):
        found.append((b"request-id", request_id))  # where Anthropic's clients look for it
    if grants.comes_with_token(scope):  # the token says what may be done, not the page that holds it
        found.append((b"access-control-allow-origin", b"*"))
    return found


def category(code: str) -> str:
    """Tinker's word for whose fault a failed request is: user, server or unknown."""
    return "user" if STATUS.get(code, 500) < 500 and code not in ("overloaded", "rate_limited") else "server"


def on_everlearn_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.EverlearnError)
    status = STATUS.get(error.code, 500)
    if status >= 500:
        log.warning("%s %s -> %d: %s", request.method, route_path(request.scope), status, error.message)
    wait = error.retry_after if isinstance(error, errors.Unavailable) else None
    headers = {} if wait is None else {"retry-after": str(wait)}
    if isinstance(error, errors.RateLimited):
        headers |= {RATE_LIMIT + name: value for name, value in error.limits.items()}
    return error_response(status, error.code, error.message, error.param, headers, path=request.scope["path"])


def on_validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's finding, as a 400 that names the first offending field; the input itself is not echoed."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return error_response(400, "invalid_request", f"{param or 'body'}: {first['msg']}", param or None, path=request.scope["path"])


def on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(
        error.status_code, "invalid_request" if error.status_code < 500 else "internal"
    )
    message = str(error.detail)
    if error.status_code == 404 and message == "Not Found":
        message = f"no route {request.method} {request.scope['path'][:200]}; the routes are listed at /openapi.json"
    if error.status_code == 405:
        message = f"{request.scope['path'][:200]} doesn't answer {request.method}"
    return error_response(error.status_code, code, message, headers=dict(error.headers or {}), path=request.scope["path"])


def unexpected(scope: Any, error: Exception) -> Response:
    """A fault of ours, which the outermost middleware caught."""
    log.error("%s %s failed", scope["method"], route_path(scope), exc_info=error)
    message = f"a fault of the server ({type(error).__name__}); its log has the details under this request id"
    return error_response(500, "internal", message, path=scope["path"])


def route_path(scope: Any) -> str:
    """The route's template ("/api/v1/runs/{id}"), never the path as sent: bounded, and free of what clients put into it."""
    route = scope.get("route")
    return getattr(route, "path", "(none)")


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.EverlearnError, on_everlearn_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


__all__ = [
    "ANTHROPIC_PATH",
    "STATUS",
    "anthropic_envelope",
    "category",
    "envelope",
    "error_response",
    "headers_of",
    "install",
    "route_path",
    "unexpected",
]
