"""The reward model's page on one that learns while it is watched, and what it is unsure of in the review."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.dashboard.story import Users, until, until_says
from tests.live import LiveServer

pytestmark = pytest.mark.timeout(300)


def thumbs(users: Users, first: int, num: int) -> None:
    """Four answers each to so many questions; a program likes those of every other one."""
    for number in range(first, first + num):
        record, _, _ = users.ask(("hello, world!", "what is it?")[number % 2], temperature=1.0, n=4)
        for choice in range(4):
            users.say(record, choice=choice, kind="boolean", value=number % 2 == 0, source="program", source_id=f"check {number}")


def test_a_reward_model_learns_while_one_watches_and_asks_when_it_is_unsure(dashboard: LiveServer, page: Any) -> None:
    users = Users(dashboard, "liked", {"owner": "maria"}, reward={"asked": 1.0, "review_sd": 0.001, "refit_every": 1})
    page.goto("/dashboard/reward-model/liked")
    assert "There is no version yet" in page.locator("#reward-model").inner_text()
    thumbs(users, 0, 16)
    until_says(page.locator("#versions"), "Published")
    until_says(page.locator("#reward-model .card").nth(1), "now there are 64")
    deadline = time.monotonic() + 60
    while (newest := users.http.get("/v1/reward-models/liked").json())["labels"] + newest["report"]["held_out"]["num"] < 64:
        assert time.monotonic() < deadline, "a version of all labels comes"
        time.sleep(0.1)
    page.reload()
    twin = users.http.get("/dashboard/reward-model/liked.json").json()
    assert twin["chosen"]["id"] == twin["versions"][0]["id"] and twin["chosen"]["number"] == newest["number"]
    report = twin["chosen"]["report"]
    assert report["reliability"]
    until(page.locator("#reliability circle"), count=len(report["reliability"]))
    figures = page.locator("#figures tbody tr").first.locator("td")
    until(figures.nth(1), str(report["prequential"]["num"]))
    until(figures.nth(7), f"{report['prequential']['ece']:.2g}")
    until(page.locator("#versions tbody tr"), count=len(twin["versions"]))
    page.locator("#versions tbody a").last.click()
    page.wait_for_url("**version=1")
    assert page.locator("h2", has_text="Calibration of version 1").count() == 1
    page.complaints.expect("404")
    page.goto("/dashboard/reward-model/liked?version=999")
    assert "no version 999" in page.get_by_role("alert").inner_text()

    record, _, _ = users.ask("where is it?")
    page.goto("/dashboard/review?model=liked")
    until_says(page.locator("ol.order"), "the reward model can't tell 1")  # found while one watches
    page.reload()
    card = page.locator(f"[data-record={record}]")
    assert card.locator(".badge").first.inner_text() == "unsure"
    card.focus()
    page.keyboard.press("5")
    page.keyboard.press("Control+Enter")
    until(page.locator("article.sent"), count=1)
    assert users.http.get("/dashboard/review.json?model=liked").json()["order"][2]["waiting"] == 0
    page.set_viewport_size({"width": 400, "height": 700})
    for path in ("reward-model", "reward-model/liked"):
        page.goto(f"/dashboard/{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, path
