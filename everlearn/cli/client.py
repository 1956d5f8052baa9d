"""The command line's HTTP client: JSON in, JSON out, and the server's errors as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from everlearn.errors import BY_CODE, EverlearnError, InvalidRequest, NotFound, Unavailable

BY_STATUS: dict[int, str] = {400: "invalid_request", 401: "unauthenticated", 403: "forbidden", 404: "not_found", 409: "conflict"}


class Client:
    """Talks to one server. Raises Unavailable with code `unreachable` when nobody answers there."""

    def __init__(self, url: str, key: str = "", timeout: float = 60.0):
        self.url, self.key = url.rstrip("/"), key
        headers = {"X-API-Key": key} if key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=5.0))
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidRequest(f"--url {url!r} is no URL ({error}); write it like http://127.0.0.1:8000", param="url") from None

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        return self._send("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, body: Any = None) -> Any:
        return self._send("POST", path, json=body)

    def put(self, path: str, body: Any = None) -> Any:
        return self._send("PUT", path, json=body)

    def patch(self, path: str, body: Any = None) -> Any:
        return self._send("PATCH", path, json=body)

    def delete(self, path: str) -> Any:
        return self._send("DELETE", path)

    def lines(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """The rows of an answer that has one JSON object in each line."""
        response = self._request("GET", path, params=params)
        if not response.is_success:
            raise _as_error(response)
        return [json.loads(line) for line in response.text.split("\n") if line]

    def document(self, path: str) -> dict[str, Any]:
        """A page that explains itself whatever the status: /readyz and /health answer 503 with the reason in the body."""
        response = self._request("GET", path)
        body = response.json() if response.headers.get("content-type", "").startswith("application/json") else None
        if not isinstance(body, dict) or "error" in body:
            raise _as_error(response)
        return body

    def pages(self, path: str, field: str, limit: int | None = None) -> list[dict[str, Any]]:
        """All rows of an offset-paged listing, at most `limit`."""
        rows: list[dict[str, Any]] = []
        while limit is None or len(rows) < limit:
            size = 100 if limit is None else min(100, limit - len(rows))
            page = self.get(path, limit=size, offset=len(rows))
            rows += page[field]
            total = (page.get("cursor") or {}).get("total_count", 0)
            if not page[field] or len(rows) >= total:
                break
        return rows

    def all(self, path: str, limit: int | None = None, **params: Any) -> list[dict[str, Any]]:
        """All rows of a listing that goes on behind its last id, at most `limit`."""
        rows: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            size = 1000 if limit is None else min(1000, limit - len(rows))
            page = self.get(path, limit=size, after=after, **params)
            rows += page["data"]
            if not page["has_more"] or len(rows) == limit:
                return rows
            after = page["last_id"]

    @contextmanager
    def download(self, path: str, **params: Any) -> Iterator[Iterator[bytes]]:
        """The bytes of an answer as they come."""
        try:
            with self._http.stream("GET", path, params=params) as response:
                if not response.is_success:
                    response.read()
                    raise _as_error(response)
                yield response.iter_bytes()
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from None

    @contextmanager
    def events(self, path: str, body: Any) -> Iterator[tuple[httpx.Headers, Iterator[dict[str, Any]]]]:
        """The headers of a streamed answer, and its events until it is done. Leaving the block early ends the answer on the server."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                if not response.is_success:
                    response.read()
                    raise _as_error(response)
                yield response.headers, _events(response)
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from None

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **kwargs)
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> Unavailable:
        return Unavailable(
            f"no server answers at {self.url} ({error}); start one with `everlearn serve`, or name another with --url",
            code="unreachable",
        )

    def _send(self, method: str, path: str, **kwargs: Any) -> Any:
        response = self._request(method, path, **kwargs)
        if response.is_success:
            return response.json() if response.content else None
        raise _as_error(response)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Each `data:` line as JSON; an error event is raised."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise _error(event["error"])
        yield event


def _as_error(response: httpx.Response) -> EverlearnError:
    try:
        body = response.json()
    except ValueError:
        body = {}
    details = body.get("error") if isinstance(body, dict) else None
    if not isinstance(details, dict):
        details = {"message": f"{response.request.url} answered {response.status_code}: {response.text[:200]!r}"}
    return _error(details, response.status_code)


def _error(details: dict[str, Any], status: int = 500) -> EverlearnError:
    code = str(details.get("code") or BY_STATUS.get(status, ""))
    cls = BY_CODE.get(code, NotFound if status == 404 else EverlearnError)
    return cls(str(details.get("message")), param=details.get("param"), code=code or None)
