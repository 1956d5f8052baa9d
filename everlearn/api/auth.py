"""Who is calling. One dependency on every route; only the four health routes are open.

Without any key in the store, callers on this machine are the tenant "default" (and may send any key or none), and callers from
elsewhere are refused. With the first key, everybody needs one. A key arrives as `X-API-Key` or `Authorization: Bearer`; the pages of the
dashboard take a cookie as well (everlearn/api/browser.py).
Nothing here looks at `request.url`, which a Host header can forge.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from fastapi import Depends, Request, params
from sqlalchemy import Connection
from starlette.types import Scope as Scoped

from everlearn.api import browser, grants
from everlearn.api.grants import Grant
from everlearn.api.services import Services, services
from everlearn.errors import Forbidden, Unauthenticated
from everlearn.store import keys
from everlearn.telemetry import key_id_var

DEFAULT_TENANT = "default"
OPEN_ROUTES = frozenset({"/livez", "/readyz", "/health", "/metrics", "/api/v1/healthz"})
SIGNED_PREFIX = "/api/v1/files/"
ALL_SCOPES = frozenset(keys.SCOPES)
CACHE_SECONDS = 1.0  # a revoked key works for this long at most
CACHE_SIZE = 4096
SECRET_BYTES = 32


@dataclass(frozen=True)
class Caller:
    """`content` False: of this caller's answers only the figures are recorded. `grant`: it came with a token for feedback."""

    tenant: str
    key_id: str | None
    scopes: frozenset[str]
    limits: keys.Limits = keys.NO_LIMITS
    content: bool = True
    grant: Grant | None = None


LOCAL = Caller(DEFAULT_TENANT, None, ALL_SCOPES)
ANYONE = Caller("", None, frozenset())


class KeyCache:
    """Answers of the key table, kept for a second. Holds digests, not keys."""

    def __init__(self) -> None:
        self._callers: OrderedDict[bytes, tuple[float, Caller | None]] = OrderedDict()
        self._any: tuple[float, bool] = (0.0, False)

    async def required(self, svc: Services) -> bool:
        expires, value = self._any
        if time.monotonic() > expires:
            value = await svc.read(keys.any_keys)
            self._any = (time.monotonic() + CACHE_SECONDS, value)
        return value

    async def find(self, svc: Services, secret: str) -> Caller | None:
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        return await self._look(svc, digest, lambda conn: keys.find(conn, secret))

    async def find_id(self, svc: Services, key_id: str) -> Caller | None:
        return await self._look(svc, key_id.encode(), lambda conn: keys.live(conn, key_id))

    async def _look(self, svc: Services, digest: bytes, find: Callable[[Connection], keys.Key | None]) -> Caller | None:
        expires, caller = self._callers.get(digest, (0.0, None))
        if time.monotonic() > expires:
            key = await svc.read(find)
            caller = Caller(key.tenant, key.key_id, frozenset(key.scopes), key.limits, key.content) if key else None
            self._callers[digest] = (time.monotonic() + CACHE_SECONDS, caller)
            if len(self._callers) > CACHE_SIZE:
                self._callers.popitem(last=False)
        return caller


async def authenticate(request: Request) -> None:
    """The dependency of the whole app; sets `request.state.caller` or raises Unauthenticated. Where a body is to come, `admit` has
    asked already."""
    if "caller" in request.scope.get("state", {}):
        return
    route = getattr(request.scope.get("route"), "path", "")
    svc = services(request)
    cache: KeyCache = request.app.state.key_cache
    required = await cache.required(svc)
    local = is_loopback(request.client.host if request.client else None)
    if route in OPEN_ROUTES and (route != "/metrics" or local or not required):
        request.state.caller = ANYONE
        return
    if request.scope["path"].startswith(SIGNED_PREFIX) and "signature" in request.query_params:
        request.state.caller = verify_signed(svc, request)
        return
    if grants.comes_with_token(request.scope):
        grant = grants.verify(signing_secret(svc.settings.home), request.query_params["token"])
        request.state.caller = Caller(grant.tenant, None, frozenset({grants.SCOPE}), content=grant.content, grant=grant)
        return
    page = browser.is_page(request.scope["path"]) and not secret_of(request)
    if required:
        request.state.caller = await (by_cookie if page else by_key)(svc, cache, request)
        key_id_var.set(request.state.caller.key_id)
        if page:
            browser.check_sender(request)
        return
    if not local:
        raise Unauthenticated("this server has no keys yet and answers its own machine only; make one with: everlearn key create NAME")
    check_origin(request)
    if page:
        browser.check_sender(request)
    request.state.caller = LOCAL


async def admit(scope: Scoped) -> str:
    """Authenticates a request before its body is read; its tenant."""
    request = Request(scope)
    await authenticate(request)
    return tenant(request)


async def by_key(svc: Services, cache: KeyCache, request: Request) -> Caller:
    secret = secret_of(request)
    if not secret:
        raise Unauthenticated("no key; send it as X-API-Key or as Authorization: Bearer (everlearn key create NAME makes one)")
    caller = await cache.find(svc, secret)
    if caller is None:
        raise Unauthenticated("this key is unknown or revoked; everlearn key list shows the keys of this server")
    return caller


async def by_cookie(svc: Services, cache: KeyCache, request: Request) -> Caller:
    key_id = browser.key_of(signing_secret(svc.settings.home), request)
    caller = await cache.find_id(svc, key_id) if key_id else None
    if caller is None:
        raise Unauthenticated("not signed in; open /dashboard in a browser and give a key, or send one as X-API-Key")
    return caller


def secret_of(request: Request) -> str:
    if secret := request.headers.get("x-api-key", ""):
        return secret
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def check_origin(request: Request) -> None:
    """Without keys, a page in the user's browser could talk to this server in their name (or by a name that resolves to
    127.0.0.1); so Origin and Host must name this machine."""
    origin = request.headers.get("origin")
    if origin and not is_loopback(host_of(origin)):
        raise Forbidden(
            "a page from another origin may not use a server without keys; make a key with: everlearn key create NAME", param="origin"
        )
    host = host_of("//" + request.headers.get("host", "localhost"))
    if not is_loopback(host) and host != "testserver":
        raise Forbidden("without keys this server answers to localhost only; make a key with: everlearn key create NAME", param="host")


def host_of(url: str) -> str:
    """The host in `url`; what has none, or can't be read, is nobody's."""
    try:
        return urlsplit(url).hostname or "(none)"
    except ValueError:
        return "(none)"


def is_loopback(host: str | None) -> bool:
    """No host at all is a unix socket or a test client: this machine."""
    if host is None or host in ("localhost", "testclient", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.endswith(".localhost")


def caller(request: Request) -> Caller:
    return request.state.caller


def tenant(request: Request) -> str:
    """The tenant that every row this request reads or writes belongs to."""
    return request.state.caller.tenant


class Scope:
    """A dependency for routers and routes: the key must have one of these scopes, or admin. Every route has one (a test looks)."""

    def __init__(self, *names: str):
        self.allowed = frozenset({*names, "admin"})
        self.wanted = " or ".join(map(repr, names))

    async def __call__(self, request: Request) -> None:
        if request.state.caller is ANYONE:  # an open route
            return
        scopes = request.state.caller.scopes
        if scopes.isdisjoint(self.allowed):
            raise Forbidden(f"this key has no scope {self.wanted} (it has: {', '.join(sorted(scopes)) or 'none'}); use another key")


def scope(*names: str) -> params.Depends:
    """In a router's or route's `dependencies`."""
    return Depends(Scope(*names))


# -- links that work without a key, for a while ---------------------------------------------------------------------------


def signed_url(svc: Services, path: str, tenant: str, ttl: float) -> str:
    """`path` (under /api/v1/files/) with a signature that stands for `tenant` until it expires."""
    expires = int(time.time() + ttl)
    signature = sign(svc, path, tenant, expires)
    return f"{quote(path)}?tenant={quote(tenant, safe='')}&expires={expires}&signature={signature}"


def verify_signed(svc: Services, request: Request) -> Caller:
    query = request.query_params
    expires = int(query["expires"]) if re.fullmatch("[0-9]{1,12}", query.get("expires", "")) else 0
    expected = sign(svc, request.scope["path"], query.get("tenant", ""), expires)
    same = hmac.compare_digest(expected.encode(), query["signature"].encode("utf-8", "surrogatepass"))
    if request.method not in ("GET", "HEAD") or expires < time.time() or not same:
        raise Unauthenticated("this link has expired or was changed; ask for a new one")
    return Caller(query.get("tenant", ""), None, frozenset({"read"}))


def sign(svc: Services, path: str, tenant: str, expires: int) -> str:
    message = f"{path}\n{tenant}\n{expires}".encode("utf-8", "surrogatepass")
    return hmac.new(signing_secret(svc.settings.home), message, hashlib.sha256).hexdigest()


def signing_secret(home: Path) -> bytes:
    """Made at first use. One that is too short was left by a full disk: it would sign for anybody, so it is made anew, and the
    links that it signed are void."""
    path = home / "signing.secret"
    with contextlib.suppress(FileNotFoundError):
        if len(secret := path.read_bytes()) >= SECRET_BYTES:
            return secret
    home.mkdir(parents=True, exist_ok=True)
    aside = home / f"signing.secret.tmp-{secrets.token_hex(8)}"
    try:
        aside.touch(mode=0o600, exist_ok=False)
        with aside.open("wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path.read_bytes()
