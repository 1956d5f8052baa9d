"""The log against a plain model: whatever clients, the engine, snapshots, expiry and restarts do, what `rebuild` says to replay
rebuilds exactly the adapter that the answered requests made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from everlearn.errors import Conflict
from everlearn.store import log, rebuild
from everlearn.store.db import Database, open_database
from tests.store.acts import ERROR, append, do, entry, finish, new_run

KINDS = {"forward_backward": True, "optim_step": True, "forward_only": False}


class Request:
    def __init__(self, kind: str, body: bytes):
        self.kind, self.body = kind, body
        self.status = "pending"
        self.answer = b""
        self.forgotten = False

    @property
    def effect(self) -> bool:
        return KINDS[self.kind]


def make_machine(url: str) -> Callable[[], RuleBasedStateMachine]:
    class LogMachine(RuleBasedStateMachine):
        db: Database

        @initialize()
        def start(self) -> None:
            self.db = open_database(url)
            self.run = new_run(self.db)
            self.requests: dict[int, Request] = {}
            self.finished = 0
            self.snapshot: tuple[int, list[int]] | None = None  # its seq, and which requests its weights hold

        def entry(self, seq: int, request: Request) -> log.Entry:
            kind = "optim_step" if request.kind == "optim_step" else "forward_backward"
            return entry(self.run, seq, kind, body=request.body, forward_only=request.kind == "forward_only")

        def applied(self, upto: int) -> list[int]:
            done = {"done", "expired"}
            return [seq for seq in sorted(self.requests) if seq <= upto and self.requests[seq].effect and self.requests[seq].status in done]

        @rule(ahead=st.integers(1, 4), kind=st.sampled_from(sorted(KINDS)), body=st.binary(min_size=1, max_size=20))
        def submit(self, ahead: int, kind: str, body: bytes) -> None:
            seq = self.finished + ahead
            wanted = Request(kind, body)
            there = self.requests.get(seq)
            if there is None:
                assert not append(self.db, self.entry(seq, wanted), body).existing
                self.requests[seq] = wanted
            elif (there.kind == "optim_step", there.body) == (kind == "optim_step", body):
                assert append(self.db, self.entry(seq, wanted), body).existing
            else:
                with pytest.raises(Conflict):
                    append(self.db, self.entry(seq, wanted), body)

        @precondition(lambda self: self.requests)
        @rule(pick=st.randoms(use_true_random=False))
        def resubmit(self, pick: object) -> None:
            seq = pick.choice(sorted(self.requests))  # type: ignore[attr-defined]
            request = self.requests[seq]
            if request.forgotten:
                with pytest.raises(Conflict):
                    append(self.db, self.entry(seq, request), request.body)
            else:
                again = append(self.db, self.entry(seq, request), request.body)
                assert (again.existing, again.status) == (True, request.status)

        @precondition(lambda self: self.finished + 1 in self.requests)
        @rule(answer=st.binary(max_size=10), fails=st.booleans())
        def answer(self, answer: bytes, fails: bool) -> None:
            seq = self.finished = self.finished + 1
            request = self.requests[seq]
            assert finish(self.db, self.entry(seq, request), answer, ERROR if fails else None) is not None
            assert finish(self.db, self.entry(seq, request), b"again") is None
            request.status, request.answer = ("failed", b"") if fails else ("done", answer or log.NOTHING)

        @rule(back=st.integers(-1, 3))
        def take_snapshot(self, back: int) -> None:
            seq = self.finished - back
            newest = -1 if self.snapshot is None else self.snapshot[0]
            accepted = do(self.db, lambda conn: log.add_snapshot(conn, self.run, seq, f"/s/{seq}", 1))
            assert accepted == (newest <= seq <= self.finished and seq >= 0)
            if accepted and seq > newest:
                self.snapshot = (seq, self.applied(seq))

        @rule()
        def expire(self) -> None:
            do(self.db, lambda conn: log.expire(conn, time.time() + 10, 5))
            covered = -1 if self.snapshot is None else self.snapshot[0]
            for seq, request in self.requests.items():
                if request.status == "pending":
                    continue
                request.forgotten |= request.status == "failed" or not request.effect or seq <= covered
                if request.status == "done":
                    request.status = "expired"

        @rule()
        def reopen(self) -> None:
            self.db.close()
            self.db = open_database(url)

        @invariant()
        def rebuilds_the_adapter(self) -> None:
            replay = self.db.read(lambda conn: rebuild.rebuild(conn, self.run))
            assert replay is not None
            held = [] if replay.snapshot is None else list(self.snapshot[1] if self.snapshot else [])
            covered = -1 if replay.snapshot is None else replay.snapshot.seq
            assert covered == (-1 if self.snapshot is None else self.snapshot[0])
            assert replay.finished_seq == self.finished
            bodies = {entry.seq: self.db.read(lambda conn, entry=entry: log.payload(conn, entry.request_id)) for entry in replay.entries}
            again = [seq for seq in sorted(bodies) if 0 < seq <= self.finished]
            assert held + again == self.applied(self.finished)
            waiting = {seq for seq, request in self.requests.items() if request.status == "pending"}
            assert {seq for seq in bodies if seq > self.finished} == waiting
            assert all(bodies[seq] == self.requests[seq].body for seq in bodies if seq > 0)
            assert (0 in bodies) == (covered < 0)

        @invariant()
        def answers_stay(self) -> None:
            for seq, request in self.requests.items():
                if request.status == "done":
                    assert self.db.read(lambda conn, seq=seq: log.get(conn, "a", f"{self.run}:{seq}"))[1] == request.answer

        def teardown(self) -> None:
            with contextlib.suppress(AttributeError):
                self.db.close()

    return LogMachine


def test_the_log_rebuilds_what_was_answered(store_url: str) -> None:
    # No shrinking: each step commits to a disk, and a failing run of 25 steps can be read as it is.
    quick = settings(max_examples=4, stateful_step_count=25, deadline=None, derandomize=True, phases=[Phase.generate])
    quick = settings(quick, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(make_machine(store_url), settings=quick)  # type: ignore[no-untyped-call]
