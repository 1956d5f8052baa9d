"""What the runner makes of an error that the server answered its work with: is it to be waited for, or is the work refused?

The SDK has errors of its own, and sends again what may be answered later. A server that is away or overloaded is waited for. What is
refused would be refused again, at each start and for ever, so it ends what was tried; a fault of the server may be of one item too, so it
is waited for a few times and then counts as refused.
"""

from __future__ import annotations

import tinker

from everlearn.errors import EverlearnError, Forbidden, InvalidRequest, TooLarge, Unauthenticated, Unavailable, Unsupported

TRIES = 3  # of what the server failed at, until that is as good as refused
LATER = (408, 409, 429)  # statuses of requests that may be answered later
PERHAPS = (404, 410)  # of what a server that was restarted may have lost, and what is begun anew may find again
PASSING = ("conflict", "cancelled")  # codes of errors that are a 400 to the SDK, which would send a 409 again, and that pass as well
REFUSED = (tinker.TinkerError, InvalidRequest, TooLarge, Unsupported)  # what work may raise that is to be judged here
LENGTH = 500  # of a message, in a line of the history


def reason_of(error: Exception, tries: int = TRIES) -> str:
    """Why the work is refused, in one sentence. Raises Unavailable for what may be answered later, Unauthenticated and Forbidden for a key
    that may not. `tries`: how often the same was tried, this time included."""
    if isinstance(error, EverlearnError):
        return f"the server refused it: {error.message[:LENGTH]}"
    told = str(getattr(error, "message", error))[:LENGTH]
    if isinstance(error, tinker.APIStatusError):
        told, code = _told(error)
        if error.status_code == 401:
            raise Unauthenticated(told) from error
        if error.status_code == 403:
            raise Forbidden(told) from error
        if error.status_code in LATER or error.status_code >= 500:
            raise Unavailable(told) from error
        if (error.status_code in PERHAPS or code in PASSING) and tries < TRIES:
            raise Unavailable(f"{told}; once more") from error
        return f"the server refused it: {told}"
    if isinstance(error, tinker.RequestFailedError):
        if str(getattr(error.category, "value", error.category)) == "user":
            return f"the server refused it: {told}"
        if tries < TRIES:
            raise Unavailable(f"{told}; once more") from error
        return f"the server failed at it {tries} times: {told}"
    raise Unavailable(f"no answer of the server: {told}") from error


def _told(error: tinker.APIStatusError) -> tuple[str, str]:
    """The server's own words, where it has some, and its code."""
    body = error.body if isinstance(error.body, dict) else {}
    found = body.get("error")
    inner = found if isinstance(found, dict) else {}
    return str(inner.get("message") or error.message)[:LENGTH], str(inner.get("code") or "")
