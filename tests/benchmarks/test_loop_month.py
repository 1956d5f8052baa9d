"""The study of thirty days: its clock, by which the server's rows are dated, and its intervals."""

from __future__ import annotations

import random
from typing import Any

import pytest

STUDY = "loop_month"


class Client:
    url, key = "", ""

    def get(self, path: str, **_: Any) -> Any:
        return {"created_at": 12, "data": [{"created_at": at, "cycle": {"began": 5.0}} for at in (9, 10, 11, 12)], "has_more": False}


def test_rows_carry_the_virtual_time_in_which_they_were_made(study: Any) -> None:
    times, slept = iter((9.25, 10.0, 11.5, 12.0)), []
    clock = study.Clock(lambda: next(times), slept.append)
    clock.turn(study.FIRST + study.DAY)
    clock.turn(study.FIRST + 2 * study.DAY)
    assert slept == [0.75, 0.5] and clock() == study.FIRST + 2 * study.DAY
    found = study.Dated(Client(), clock).get("/v1/records")
    days = [(row["created_at"] - study.FIRST) / study.DAY for row in found["data"]]
    assert days == [0, 1, 1, 2] and found["created_at"] == clock() and found["data"][0]["cycle"] == {"began": 5.0}


def test_what_users_order_is_known_and_held_out_letters_stay_so(study: Any) -> None:
    rng = random.Random(0)
    asked, gold = ({study.ordered(rng, held_out, "RN").text[3:7] for _ in range(200)} for held_out in (False, True))
    assert not asked & gold
    assert study.ordered(rng, False, "RN").order == "RN" and study.operation(rng, False).order == ""


def test_intervals_are_student_s(study: Any) -> None:
    found = study.interval([0.1, 0.2, 0.3])
    assert found["mean"] == pytest.approx(0.2) and found["high"] == pytest.approx(0.2 + 4.303 * 0.1 / 3**0.5)
