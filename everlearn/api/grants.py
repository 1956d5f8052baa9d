"""Tokens with which a browser may say what it thinks of one answer or one episode, for a while, without a key.

`fbt_PAYLOAD.SIGNATURE`, both base64url: whose tenant, about what, said by whom, until when; signed with the secret in the home folder. A
token opens nothing but POST /v1/feedback, and there nothing but its own target.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time

import msgspec
from starlette.datastructures import QueryParams
from starlette.types import Scope

from everlearn.errors import Forbidden, Unauthenticated

PATH = "/v1/feedback"
PREFIX = "fbt_"
SCOPE = "feedback"  # no key has it
KINDS = ("boolean", "float", "comment", "demonstration")  # what somebody may say who only saw the answer
MAX_SECONDS = 30 * 86_400
MAX_TOKEN = 4096


class Grant(msgspec.Struct, frozen=True, omit_defaults=True):
    """`content` False: no text may be said. Exactly one of `record_id` and `episode_id` is set."""

    tenant: str
    expires_at: int
    record_id: str | None = None
    episode_id: str | None = None
    source_id: str = ""
    content: bool = True


def comes_with_token(scope: Scope) -> bool:
    """Whether the request is one that a token answers for; no key or cookie counts there."""
    return scope["path"] == PATH and scope["method"] == "POST" and "token" in QueryParams(scope["query_string"])


def sign(secret: bytes, grant: Grant) -> str:
    payload = _encode(msgspec.json.encode(grant))
    return f"{PREFIX}{payload}.{_encode(_mac(secret, payload))}"


def verify(secret: bytes, token: str) -> Grant:
    """What the token grants. Raises Unauthenticated where it isn't ours, was changed, or has expired."""
    payload, _, signature = token.removeprefix(PREFIX).partition(".")
    try:
        good = len(token) <= MAX_TOKEN and token.startswith(PREFIX) and hmac.compare_digest(_mac(secret, payload), _decode(signature))
    except (binascii.Error, ValueError):
        good = False
    if not good:
        raise Unauthenticated(
            "this feedback token isn't one of this server or was changed; ask POST /v1/feedback/tokens for one", param="token"
        )
    grant = msgspec.json.decode(_decode(payload), type=Grant)
    if grant.expires_at < time.time():
        raise Unauthenticated(f"this feedback token expired at {grant.expires_at} (Unix seconds); ask for a new one", param="token")
    return grant


def check_target(grant: Grant, record_id: str | None, episode_id: str | None, kind: str) -> None:
    """Raises Forbidden for anything but what the token is for."""
    if record_id not in (None, grant.record_id) or episode_id not in (None, grant.episode_id):
        about = f"record {grant.record_id}" if grant.record_id else f"episode {grant.episode_id}"
        raise Forbidden(f"this feedback token is for {about} alone; leave record_id and episode_id out", param="token")
    if kind not in KINDS:
        raise Forbidden(f"with a feedback token one may say {', '.join(KINDS)}; kind {kind[:60]!r} needs a key", param="kind")


def _mac(secret: bytes, payload: str) -> bytes:
    return hmac.new(secret, f"{PATH}\n{payload}".encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
