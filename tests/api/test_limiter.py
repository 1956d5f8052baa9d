"""What a key may use: pure bookkeeping under a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from everlearn.api.auth import Caller
from everlearn.api.limiter import Lease, Limiter
from everlearn.config import Settings
from everlearn.errors import Forbidden, Overloaded, RateLimited
from everlearn.models.catalog import Catalog
from everlearn.store.keys import Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def catalog(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    base = [{"name": "tiny", "path": str(tiny_model), "aliases": ["org/tiny"]}]
    return Catalog(Settings.model_validate({"home": tmp_path_factory.mktemp("home"), "models": {"default": "tiny", "base": base}}))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(catalog: Catalog, clock: Clock) -> Limiter:
    return Limiter(catalog, clock=clock)


def key(key_id: str | None = "key-1", **limits: object) -> Caller:
    return Caller("acme", key_id, frozenset({"sample"}), Limits(**limits))  # type: ignore[arg-type]


def refused(limiter: Limiter, caller: Caller, tokens: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        limiter.admit(caller, "tiny", tokens)
    return caught.value


def done(lease: Lease, tokens: int | None = None) -> None:
    if tokens is not None:
        lease.spent(tokens)
    lease.release()


def test_requests_a_minute(limiter: Limiter, clock: Clock) -> None:
    caller = key(rpm=3)
    for _ in range(3):
        done(limiter.admit(caller, "tiny", 10))
    error = refused(limiter, caller)
    assert error.retry_after == 20 and error.limits["remaining-requests"] == "0" and error.limits["limit-requests"] == "3"
    assert "3 requests a minute" in error.message and "20 s" in error.message
    clock.now += 19.9
    refused(limiter, caller)
    clock.now += 0.2
    done(limiter.admit(caller, "tiny", 10))
    refused(limiter, caller)
    clock.now += 600
    for _ in range(3):
        done(limiter.admit(caller, "tiny", 10))
    refused(limiter, caller)


def test_tokens_are_taken_at_admission_and_settled_at_the_end(limiter: Limiter, clock: Clock) -> None:
    caller = key(tpm=1000)
    first = limiter.admit(caller, "tiny", 800)
    assert first.headers["x-ratelimit-remaining-tokens"] == "200" and first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert refused(limiter, caller, 300).retry_after == 6
    done(first, 100)
    second = limiter.admit(caller, "tiny", 300)
    done(second, 300)
    third = limiter.admit(caller, "tiny", 600)
    done(third)  # without a word of what it used, all of it counts
    assert refused(limiter, caller, 1).limits["remaining-tokens"] == "0"
    clock.now += 0.1
    done(limiter.admit(caller, "tiny", 1), 1)


def test_no_request_is_too_large_for_ever(limiter: Limiter, clock: Clock) -> None:
    caller = key(tpm=100)
    large = limiter.admit(caller, "tiny", 5000)
    done(large, 400)  # more than there was: the debt is paid first
    assert refused(limiter, caller, 1).retry_after == 181
    clock.now += 181
    done(limiter.admit(caller, "tiny", 1), 1)


def test_requests_at_once(limiter: Limiter) -> None:
    caller = key(concurrency=2)
    one, two = limiter.admit(caller, "tiny", 1), limiter.admit(caller, "tiny", 1)
    assert "2 requests at once" in refused(limiter, caller).message
    with pytest.raises(ValueError), two:
        raise ValueError
    two.release()
    assert limiter.running() == 1, "a lease ends once"
    three = limiter.admit(caller, "tiny", 1)
    refused(limiter, caller)
    for lease in (one, three):
        lease.release()
    assert limiter.running() == 0


def test_keys_have_shares_of_their_own_and_callers_without_a_key_no_limits(limiter: Limiter) -> None:
    done(limiter.admit(key("key-1", rpm=1), "tiny", 1))
    refused(limiter, key("key-1", rpm=1))
    done(limiter.admit(key("key-2", rpm=1), "tiny", 1))
    for _ in range(100):
        done(limiter.admit(key(None), "tiny", 10**9))
        done(limiter.admit(key("key-3"), "tiny", 10**9))


def test_a_refused_request_takes_nothing(limiter: Limiter) -> None:
    caller = key(rpm=10, tpm=100)
    held = limiter.admit(caller, "tiny", 100)
    for _ in range(20):
        refused(limiter, caller, 50)
    done(held, 0)
    lease = limiter.admit(caller, "tiny", 1)
    assert lease.headers["x-ratelimit-remaining-requests"] == "8"


def test_other_limits_count_from_now_on(limiter: Limiter) -> None:
    done(limiter.admit(key(rpm=1), "tiny", 1))
    refused(limiter, key(rpm=1))
    for _ in range(4):
        done(limiter.admit(key(rpm=5), "tiny", 1))
    refused(limiter, key(rpm=5))
    done(limiter.admit(key(), "tiny", 1))


@pytest.mark.parametrize(
    ("allowed", "model", "may"),
    [
        (["support"], "support@3", True),
        (["support"], "support", True),
        (["support@3"], "support@3", True),
        (["support@3"], "support@4", False),
        (["support"], "support-two@1", False),
        (["support"], "tiny", False),
        (["tiny"], "tiny", True),
        (["org/tiny"], "tiny", True),
        (["tiny"], "org/tiny", True),
        (["tiny"], "tinker://x:train:0/weights/a", False),
        (["tinker://x:train:0/weights/a"], "tinker://x:train:0/weights/a", True),
    ],
)
def test_models(limiter: Limiter, allowed: list[str], model: str, may: bool) -> None:
    caller = key(models=allowed)
    if may:
        limiter.admit(caller, model, 1).release()
    else:
        with pytest.raises(Forbidden, match="may not use model") as caught:
            limiter.admit(caller, model, 1)
        assert caught.value.param == "model"


def test_nothing_is_begun_that_can_not_be_recorded(catalog: Catalog) -> None:
    limiter = Limiter(catalog, backlog=lambda: "20000 answers wait to be recorded (the disk is full)")
    with pytest.raises(Overloaded, match="the disk is full") as caught:
        limiter.admit(key(None), "tiny", 1)
    assert caught.value.retry_after


def test_idle_keys_are_forgotten(limiter: Limiter, clock: Clock) -> None:
    busy = limiter.admit(key("busy", concurrency=1), "tiny", 1)
    for number in range(6000):
        done(limiter.admit(key(f"key-{number}", rpm=60), "tiny", 1))
        clock.now += 0.01
    assert len(limiter._shares) < 5000
    refused(limiter, key("busy", concurrency=1))
    busy.release()
