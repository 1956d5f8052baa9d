"""The search for the request that kills the engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from everlearn.api.quarantine import ALONE_DEATHS, SUSPECT_DEATHS, Quarantine


def test_suspects_run_alone() -> None:
    q = Quarantine()
    for _ in range(SUSPECT_DEATHS):
        assert q.died(["good", "bad"]) is None
    assert q.may_send("new", 0)
    assert not q.may_send("bad", 1) and not q.may_send("newer", 1), "the engine is emptied first"
    assert q.may_send("bad", 0) and not q.may_send("good", 1) and not q.may_send("new", 1)
    assert q.died(["bad"]) is None
    assert q.may_send("good", 0)
    q.release("good")
    assert q.may_send("bad", 0)
    assert q.died(["bad"]) == "bad"


@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 8))
def test_one_culprit_is_found_and_nobody_else_blamed(count: int, culprit: int, window: int) -> None:
    """An engine that takes up to `window` requests and dies whenever the culprit is in it."""
    names = [f"r{i}" for i in range(count)]
    bad, q, waiting, blamed, deaths = f"r{culprit % count}", Quarantine(), list(names), [], 0
    for _ in range(1000):
        inside: list[str] = []
        for name in waiting:
            if len(inside) < window and q.may_send(name, len(inside)):
                inside.append(name)
        if not waiting:
            break
        assert inside, "somebody may always go on"
        if bad in inside:
            deaths += 1
            found = q.died(inside)
            if found:
                blamed.append(found)
                waiting.remove(found)
                q.release(found)
        else:
            for name in inside:
                waiting.remove(name)
                q.release(name)
    assert not waiting and blamed == [bad] and deaths <= SUSPECT_DEATHS + ALONE_DEATHS
