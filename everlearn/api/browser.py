"""How a browser stays signed in to the dashboard, and how a request of our own pages is told from one that a foreign page makes.

The cookie names a key and a time, signed with the secret in the home folder; never the key itself. It opens the pages and nothing else: the
API wants the key. It ends with the key, and outlives a restart. Knows nothing of tenants.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request

from everlearn.errors import Forbidden

PAGES = "/dashboard"
SIGNED_IN_SECONDS = 12 * 3600
SAFE = ("GET", "HEAD", "OPTIONS")
MAX_COOKIE = 1024


class SignedIn(msgspec.Struct, frozen=True):
    key_id: str
    expires_at: int


def is_page(path: str) -> bool:
    return path == "/" or path.startswith(PAGES)


def cookie_name(secret: bytes) -> str:
    """Of this server: browsers keep one jar for all ports of a host."""
    return "everlearn_" + hmac.new(secret, b"cookie", hashlib.sha256).hexdigest()[:8]


def sign(secret: bytes, key_id: str) -> str:
    """The cookie's value."""
    payload = base64.urlsafe_b64encode(msgspec.json.encode(SignedIn(key_id, int(time.time()) + SIGNED_IN_SECONDS))).decode()
    return f"{payload}.{_mac(secret, payload)}"


def key_of(secret: bytes, request: Request) -> str | None:
    """The id of the key that this browser signed in with; None: it did not, or too long ago."""
    value = request.cookies.get(cookie_name(secret), "")
    payload, _, signature = value.partition(".")
    if len(value) > MAX_COOKIE or not hmac.compare_digest(_mac(secret, payload).encode(), signature.encode("utf-8", "replace")):
        return None
    try:
        signed = msgspec.json.decode(base64.urlsafe_b64decode(payload), type=SignedIn)
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None
    return signed.key_id if signed.expires_at > time.time() else None


def check_sender(request: Request) -> None:
    """What changes something must come from a page of this very server: with a header that no form of another site can send, and from
    this origin, where the browser names one."""
    if request.method in SAFE:
        return
    headers = request.headers
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
    own = origin is None or _place(origin) == headers.get("host")
    if headers.get("hx-request") != "true" or not own or site not in ("same-origin", "none"):
        raise Forbidden("changes are taken from the dashboard's own pages alone, or with a key in X-API-Key", param="origin")


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _mac(secret: bytes, payload: str) -> str:
    return hmac.new(secret, f"{PAGES}\n{payload}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
