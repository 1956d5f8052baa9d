"""The search for the request that kills the engine."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from everlearn.api.quarantine import ALONE_BLAME, DEATH, FROM_OUTSIDE, SUSPECT_BLAME, Quarantine

MOST_DEATHS = (SUSPECT_BLAME + ALONE_BLAME) // DEATH


def test_suspects_run_alone() -> None:
    q = Quarantine()
    for _ in range(SUSPECT_BLAME // DEATH):
        assert q.died(["good", "bad"]) is None
    assert q.may_send("new", 0)
    assert not q.may_send("bad", 1) and not q.may_send("newer", 1), "the engine is emptied first"
    assert q.may_send("bad", 0) and not q.may_send("good", 1) and not q.may_send("new", 1)
    assert q.died(["bad"]) is None
    assert q.may_send("good", 0)
    q.release("good")
    for _ in range(ALONE_BLAME // DEATH - 2):
        assert q.may_send("bad", 0)
        assert q.died(["bad"]) is None
    assert q.may_send("bad", 0)
    assert q.died(["bad"]) == "bad"


def play(names: list[str], window: int, dies: Callable[[list[str]], bool | None]) -> tuple[list[str], list[str], int]:
    """An engine that takes up to `window` requests and `dies` with them: of itself (True) or from outside (None), or not (False: they
    finish). Returns who was blamed, who never finished, and how often it died."""
    q, waiting, blamed, deaths = Quarantine(), list(names), [], 0
    for _ in range(1000):
        inside: list[str] = []
        for name in waiting:
            if len(inside) < window and q.may_send(name, len(inside)):
                inside.append(name)
        if not waiting:
            break
        assert inside, "somebody may always go on"
        end = dies(inside)
        if end is False:
            for name in inside:
                waiting.remove(name)
                q.release(name)
            continue
        deaths += 1
        found = q.died(inside, from_outside=end is None)
        if found:
            blamed.append(found)
            waiting.remove(found)
            q.release(found)
    return blamed, waiting, deaths


@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 8))
def test_one_culprit_is_found_and_nobody_else_blamed(count: int, culprit: int, window: int) -> None:
    bad = f"r{culprit % count}"
    blamed, waiting, deaths = play([f"r{i}" for i in range(count)], window, lambda inside: bad in inside)
    assert not waiting and blamed == [bad] and deaths <= MOST_DEATHS


@given(st.integers(2, 20), st.integers(1, 8))
def test_several_culprits_are_found(count: int, window: int) -> None:
    bad = {"r0", f"r{count // 2}", f"r{count - 1}"}
    blamed, waiting, _ = play([f"r{i}" for i in range(count)], window, lambda inside: bool(bad & set(inside)))
    assert not waiting and sorted(blamed) == sorted(bad)


@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=200))
def test_a_long_request_outlives_engines_that_are_killed_from_outside(window: int, kills: list[bool]) -> None:
    """Killed up to a dozen times while it runs, beside others or alone, it is finished in the end; so are those that waited for it."""
    left = (SUSPECT_BLAME + ALONE_BLAME) // FROM_OUTSIDE - 1
    moments = iter(kills)

    def dies(inside: list[str]) -> bool | None:
        nonlocal left
        if "long" in inside and left and next(moments, True):
            left -= 1
            return None
        return False

    assert play(["a", "long", "b", "c"], window, dies)[:2] == ([], [])
