"""Every error that everlearn raises on purpose.

    EverlearnError
    ├── UserError            the request can't be honoured as it stands; sending it again changes nothing
    │   ├── InvalidRequest       a value breaks a rule (names the field, the value, the rule and the way out)
    │   ├── Unsupported          a wish that this server can't honour, refused by name
    │   ├── TooLarge             over a declared limit
    │   ├── NotFound             no such thing, or not yours: the two look alike on purpose
    │   │   └── Expired          it was there, and was dropped after its retention time
    │   ├── Conflict             the same id or path was used before for something else
    │   ├── Damaged              what it asks for is on the disk, and isn't what was written there
    │   ├── Unauthenticated      no key, or a key that is unknown or revoked
    │   └── Forbidden            a known key without the right
    ├── Unavailable          not now; the same request may work later (a reason says why)
    │   └── Overloaded           a queue is full
    │       └── RateLimited          this key has used up its share for now
    └── InternalError        a fault of ours

Domain code raises these and never mentions HTTP; `everlearn/api/errors.py` maps `code` to statuses and envelopes, the command
line maps it to exit codes. `code` is stable: clients may match on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = [
    "Conflict",
    "Damaged",
    "EverlearnError",
    "Expired",
    "Forbidden",
    "InternalError",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "RateLimited",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "UserError",
]

NOTHING: Mapping[str, str] = MappingProxyType({})


class EverlearnError(Exception):
    """Base of all. `message` is for people, `code` for programs, `param` names the offending field where there is one."""

    code = "error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class UserError(EverlearnError):
    code = "user_error"


class InvalidRequest(UserError):
    code = "invalid_request"


class Unsupported(UserError):
    code = "unsupported"


class TooLarge(UserError):
    code = "too_large"


class NotFound(UserError):
    code = "not_found"


class Expired(NotFound):
    code = "expired"


class Conflict(UserError):
    code = "conflict"


class Damaged(UserError):
    code = "damaged"


class Unauthenticated(UserError):
    code = "unauthenticated"


class Forbidden(UserError):
    code = "forbidden"


class Unavailable(EverlearnError):
    """`retry_after`: in how many seconds the same request has a better chance, where that is known."""

    code = "unavailable"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    code = "overloaded"


class RateLimited(Overloaded):
    """`limits` says by name what the key may use and what is left of it ("remaining-tokens": "0")."""

    code = "rate_limited"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        limits: Mapping[str, str] = NOTHING,
    ):
        super().__init__(message, param=param, code=code, retry_after=retry_after)
        self.limits = limits


class InternalError(EverlearnError):
    code = "internal"


BY_CODE: dict[str, type[EverlearnError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        Unsupported,
        TooLarge,
        NotFound,
        Expired,
        Conflict,
        Damaged,
        Unauthenticated,
        Forbidden,
        Unavailable,
        Overloaded,
        RateLimited,
        InternalError,
    )
}
