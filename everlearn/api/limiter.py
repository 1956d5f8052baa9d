"""What a key may use: requests and tokens a minute, answers at once, and which models.

    with svc.limiter.admit(caller, target.name, prompt_tokens + max_tokens) as lease:   # raises RateLimited or Forbidden
        headers = lease.headers
        ...
        lease.spent(prompt_tokens + completion_tokens)

Two buckets for each key refill continuously and hold one minute's worth. Tokens are taken at admission as if the request used all
that it asks for (never more than the bucket holds, so that no request is too large for ever), and settled when it ends: when its connection
has its answer, or, for Tinker's samples, which are fetched later, when the log has it. All of it
is in memory, on the event loop: a restart forgives what was used. Callers without a key have no limits. It knows nothing of HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from everlearn.errors import Forbidden, NotFound, Overloaded, RateLimited

if TYPE_CHECKING:
    from everlearn.api.auth import Caller
    from everlearn.models.catalog import Catalog
    from everlearn.store.keys import Limits

MINUTE = 60.0
IDLE_KEYS = 4096  # beyond this, keys that use nothing are forgotten


@dataclass
class Bucket:
    """Holds up to `size`, refilled within a minute. What is taken may exceed what is there: the debt is paid before the next."""

    size: float
    level: float
    at: float

    def fill(self, now: float, size: float) -> None:
        """Brings the level up to date. The size may have changed since: another limit was set."""
        self.level = min(size, self.level + (now - self.at) * size / MINUTE + max(0.0, size - self.size))
        self.size, self.at = size, now

    def seconds_until(self, amount: float) -> float:
        return max(0.0, (amount - self.level) * MINUTE / self.size)


@dataclass
class Share:
    """What one key uses now."""

    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None


@dataclass
class Lease:
    """One admitted request. Leaving the block, or `release`, ends it; only the first time counts."""

    limits: Limits
    share: Share
    taken: float
    clock: Callable[[], float]
    used: float | None = None
    released: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    def spent(self, tokens: int) -> None:
        """How many tokens it really used, prompt included; without this all that was taken counts."""
        self.used = tokens

    def release(self) -> None:
        if self.released:
            return
        self.released = True
        self.share.running -= 1
        bucket = self.share.tokens
        if bucket is not None and self.used is not None:
            bucket.fill(self.clock(), bucket.size)
            bucket.level = min(bucket.size, bucket.level + self.taken - self.used)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


class Limiter:
    """`backlog` says why no answer can be recorded now, or nothing; then none is begun."""

    def __init__(self, catalog: Catalog, backlog: Callable[[], str] = str, clock: Callable[[], float] = time.monotonic):
        self.catalog, self.backlog, self.clock = catalog, backlog, clock
        self._shares: dict[str, Share] = {}

    def admit(self, caller: Caller, model: str, tokens: int) -> Lease:
        """Takes a request's share, or raises: Forbidden for a model that the key may not use, RateLimited when it has used up what
        it has, Overloaded while answers can't be recorded. `model` is the name as shown (`support@8`, a base id, a tinker path),
        `tokens` what the request may use at most: its prompt, and max_tokens for each of its choices."""
        if reason := self.backlog():
            raise Overloaded(f"{reason}; try again in a moment", retry_after=2)
        limits = caller.limits
        self.check_model(caller, model)
        if caller.key_id is None:
            return Lease(limits, Share(running=1), 0.0, self.clock)
        share = self._share(caller.key_id)
        now = self.clock()
        share.requests = _bucket(share.requests, limits.rpm, now)
        share.tokens = _bucket(share.tokens, limits.tpm, now)
        wanted = min(float(tokens), float(limits.tpm or 0))
        self._refuse(limits, share, wanted)
        if share.requests is not None:
            share.requests.level -= 1
        if share.tokens is not None:
            share.tokens.level -= wanted
        share.running += 1
        return Lease(
            limits, share, wanted, self.clock, headers={f"x-ratelimit-{name}": text for name, text in describe(limits, share).items()}
        )

    def check_model(self, caller: Caller, model: str) -> None:
        """Raises Forbidden unless the key may use `model`. A name without a number allows all its versions."""
        allowed = caller.limits.models
        if allowed is None:
            return
        names = {model, self._canonical(model), model.partition("@")[0]}
        if not any(name in names or self._canonical(name) in names for name in allowed):
            raise Forbidden(f"this key may not use model {model[:200]!r}; it may use: {', '.join(sorted(allowed))}", param="model")

    def use(self, key_id: str, limits: Limits) -> tuple[int, dict[str, str]]:
        """What a key uses now: how many of its requests run, and its limits with what is left of them."""
        share, now = self._shares.get(key_id, Share()), self.clock()
        requests, tokens = _bucket(share.requests, limits.rpm, now), _bucket(share.tokens, limits.tpm, now)
        return share.running, describe(limits, Share(share.running, requests, tokens))

    def running(self) -> int:
        """Admitted requests of all keys."""
        return sum(share.running for share in self._shares.values())

    def _refuse(self, limits: Limits, share: Share, tokens: float) -> None:
        waits = {}
        if limits.concurrency is not None and share.running >= limits.concurrency:
            waits[f"{limits.concurrency} requests at once"] = 1.0
        if share.requests is not None and (wait := share.requests.seconds_until(1.0)) > 0:
            waits[f"{limits.rpm} requests a minute"] = wait
        if share.tokens is not None and (wait := share.tokens.seconds_until(tokens)) > 0:
            waits[f"{limits.tpm} tokens a minute"] = wait
        if not waits:
            return
        seconds = max(1, math.ceil(max(waits.values())))
        message = f"this key may use {' and '.join(waits)}, and has used that up; try again in {seconds} s"
        raise RateLimited(message, retry_after=seconds, limits=describe(limits, share))

    def _share(self, key_id: str) -> Share:
        if len(self._shares) > IDLE_KEYS:
            self._shares = {key: share for key, share in self._shares.items() if share.running or _in_use(share, self.clock())}
        return self._shares.setdefault(key_id, Share())

    def _canonical(self, model: str) -> str:
        """A base model's own name for its aliases; other names as they are."""
        try:
            return self.catalog.resolve(model).name
        except NotFound:
            return model


def describe(limits: Limits, share: Share) -> dict[str, str]:
    """Limits, what is left and when all of it is there again, in the words of OpenAI's x-ratelimit headers."""
    words: dict[str, str] = {}
    for name, limit, bucket in (("requests", limits.rpm, share.requests), ("tokens", limits.tpm, share.tokens)):
        if bucket is not None:
            words[f"limit-{name}"] = str(limit)
            words[f"remaining-{name}"] = str(max(0, math.floor(bucket.level)))
            words[f"reset-{name}"] = f"{bucket.seconds_until(bucket.size):.3g}s"
    return words


def _bucket(bucket: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket(float(limit), float(limit), now)
    bucket.fill(now, float(limit))
    return bucket


def _in_use(share: Share, now: float) -> bool:
    buckets = [bucket for bucket in (share.requests, share.tokens) if bucket is not None]
    return any(bucket.level + (now - bucket.at) * bucket.size / MINUTE < bucket.size for bucket in buckets)
