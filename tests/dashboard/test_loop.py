"""The loop in the browser: a correction by keyboard, the version that learned it, its promotion and the way back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.dashboard.story import Users, runner, tab_to, until, until_says
from tests.live import LiveServer

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(300)]
# Passes whatever a random model has learned: what is shown here is the way, not the lesson.
ASKS = {"owner": "maria", "corrections": {"min_right": 0.0, "max_broken": 1.0}}
UPDATE = {"rank": 4, "epochs": 2, "batch": 2, "paraphrases": 0, "rehearsed": 0}


def test_a_correction_by_keyboard_becomes_a_version_that_is_promoted_and_rolled_back(dashboard: LiveServer, page: Any) -> None:
    users = Users(dashboard, "keyboard", ASKS, update=UPDATE)
    first, second = (users.ask(question) for question in ("who is it?", "what jumps?"))
    for record, _, _ in (first, second):
        users.say(record, kind="boolean", value=False)
    page.goto("/dashboard/review?model=keyboard")
    card = page.locator("article.answer")
    assert card.count() == 2 and page.evaluate("document.activeElement.id").startswith(second[0]), "the newest is where the keys are"

    page.keyboard.press("ArrowDown")
    page.keyboard.press("e")
    page.keyboard.type("the lazy dog")
    page.keyboard.press("Control+Enter")
    until(page.locator("article.sent"), count=1)
    thumb, correction = users.said(first[0])
    assert (thumb["kind"], correction["kind"], correction["answer"]) == ("boolean", "demonstration", "the lazy dog")
    assert correction["source"] == "human" and correction["source_id"] == "reviewer here" and thumb["counts"] and correction["counts"]
    assert page.evaluate("document.activeElement.id").startswith(second[0]), "and on to what is left"
    page.keyboard.press("k")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/dashboard/episodes/{first[1]}*")
    assert page.locator("li.feedback", has_text="the lazy dog").count() == 1

    with runner(users) as work:
        work.begin("by hand")
        assert (work.run().state, work.run().candidate) == ("gate", "keyboard@1")
    page.locator("#learned").wait_for()  # without a reload
    dataset = users.deployment()["cycle"]["id"]
    tab_to(page, dataset)
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard/datasets/*")
    assert page.locator("#versions").inner_text().startswith("keyboard@1")
    tab_to(page, "keyboard@1")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard/deploys/keyboard")

    assert "person" in page.locator("#asks").inner_text()
    rows = page.locator("#deployment .verdict tbody tr")
    assert [rows.nth(n).locator("td").nth(1).inner_text() for n in range(rows.count())] == ["pass", "wait"]
    page.keyboard.press("p")
    page.keyboard.type("reads well")
    page.keyboard.press("Enter")
    until(page.locator("#champion"), "keyboard@1")
    until(page.locator("#act[open]"), count=0)  # the page may hear of the move before its own request is answered
    now = users.deployment()
    assert (now["champion"], now["state"], now["previous"]) == ("keyboard@1", "collect", "keyboard@0")
    page.keyboard.press("b")
    until(page.locator("#act[open]"), count=1)
    page.keyboard.press("Escape")
    until(page.locator("#act[open]"), count=0)
    page.keyboard.press("b")
    until(page.locator("#act[open]"), count=1)
    page.keyboard.press("Enter")
    until(page.locator("#champion"), "keyboard@0")
    events = users.http.get("/v1/deployments/keyboard/history").json()["data"]
    assert [(event["kind"], event["reason"]) for event in events[:2]] == [("rolled_back", ""), ("promoted", "reads well")]
    assert users.ask("who is it?")[2] is not None
    newest = page.locator("#history li").first
    until_says(newest, "rolled back")  # a part of its own, which is fetched beside that of the champion
    assert newest.inner_text().startswith("rolled back")


def test_what_somebody_else_changed_meanwhile_is_refused_and_pause_has_two_ways(dashboard: LiveServer, page: Any) -> None:
    page.complaints.expect("400")
    users = Users(dashboard, "two-hands", {"owner": "maria"})
    page.route("**/dashboard/events", lambda route: route.abort())  # a page that hasn't heard of it
    page.complaints.expect("ERR_FAILED")
    page.goto("/dashboard/deploys/two-hands")
    page.keyboard.press("h")
    users.http.patch("/v1/deployments/two-hands", json={"paused": True}).raise_for_status()
    users.http.patch("/v1/deployments/two-hands", json={"paused": False}).raise_for_status()
    page.keyboard.press("Enter")
    until_says(page.locator("#act-error"), "somebody changed it")
    assert not users.deployment()["paused"]
    page.reload()
    for paused, shown in ((True, "paused"), (False, "collect")):
        page.keyboard.press("h")
        page.keyboard.press("Enter")
        until(page.locator("#stands .card:last-child .big"), shown)
        assert users.deployment()["paused"] is paused


def test_many_answers_at_once_each_said_once_and_taken_back(dashboard: LiveServer, page: Any) -> None:
    page.complaints.expect("ERR_FAILED")
    users = Users(dashboard, "bulk", {"owner": "maria"})
    records = [users.ask(f"question {number}?")[0] for number in range(4)]
    for record in records:
        users.say(record, kind="boolean", value=False)
    lost = []

    def lose(route: Any) -> None:  # the server has heard it, and its answer is lost
        route.fetch()
        lost.append(route.request.post_data)
        route.abort()

    # Before the page is there: Chromium takes a moment until a page that is open asks through a new route.
    page.route("**/dashboard/review/feedback", lose, times=1)
    page.goto("/dashboard/review?model=bulk")
    page.keyboard.press("x")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("x")
    assert page.locator("#chosen").inner_text() == "2 chosen"
    page.keyboard.press("2")
    assert page.locator("article.drafted .state").all_inner_texts() == ["poor", "poor"]
    page.keyboard.press("Control+Enter")
    until_says(page.locator("#notice"), "counts once")
    assert page.locator("article.sent").count() == 0
    page.keyboard.press("Control+Enter")
    until(page.locator("article.sent"), count=2)
    chosen = [records[3], records[1]]
    for record in chosen:
        (_, rating) = users.said(record)
        assert (rating["kind"], rating["value"], rating["name"], rating["source"]) == ("float", 0.25, "review", "human"), "said once"
    assert json.loads(lost[0])["record_id"] == records[3]
    until(page.locator("#waiting"), "2")

    page.keyboard.press("a")
    page.keyboard.press("5")
    page.keyboard.press("Control+Enter")
    until(page.locator("article.sent"), count=4)
    page.keyboard.press("u")
    until(page.locator("article.sent"), count=2)
    assert [len(users.said(record)) for record in records] == [1, 2, 1, 2]
    page.reload()
    assert page.locator("article.answer").count() == 2
    page.keyboard.press("u")
    until(page.locator("article.answer"), count=4)
    assert [len(users.said(record)) for record in records] == [1, 1, 1, 1], "also after the page was loaded anew"
    page.wait_for_load_state()  # keys are heard once its scripts have run
    page.keyboard.press("?")
    page.get_by_role("dialog").get_by_text("correct the answer in place").wait_for()


def test_the_interval_of_a_canary_grows_while_one_watches(dashboard: LiveServer, page: Any) -> None:
    canary = {"steps": [{"share": 0.5, "min_feedback": 1000}], "alpha": 0.2, "alpha_stop": 0.2}
    rule = {"owner": "maria", "canary": canary, "guardrails": {"length": {"worse": "up", "margin": 0.5, "limit": 64.0, "min_num": 4}}}
    users = Users(dashboard, "tried", rule)
    with runner(users) as work:
        run = work.service.create_lora_training_client(dashboard.model, rank=4).result()
        path = run.save_state("one").result().path
        users.http.post("/v1/adapters", json={"name": "tried", "path": path}).raise_for_status()
        work.enter(1)
        assert work.run().state == "canary"
    page.goto("/dashboard/deploys/tried")
    told = page.locator("#canary-told")
    told.wait_for()
    assert "between -100.0 % and 100.0 %" in told.inner_text() and "after 0 outcomes" in told.inner_text()
    for number in range(40):
        record, _, _ = users.ask("who is it?")
        answered = users.http.get(f"/v1/records/{record}").json()["model"]
        users.say(record, kind="boolean", value=answered == "tried@1" or number % 4 == 0)
    until_says(page.locator("#canary-told"), "after 40 outcomes")
    low, high, own = re.search(r"between (-?[\d.]+) % and (-?[\d.]+) % so far, after 40 outcomes, (\d+) of", told.inner_text()).groups()  # type: ignore[union-attr]
    assert -100 < float(low) <= float(high) and 0 < int(own) < 40, "every answer of the candidate was called good"
    assert page.evaluate("performance.getEntriesByType('navigation').length") == 1
    shown = page.locator("#canary-plot canvas")
    assert shown.count() == 1 and shown.bounding_box()["width"] > 300  # type: ignore[index]
    asked = {
        row.locator("td").first.inner_text(): row.locator("td").nth(4).inner_text()
        for row in page.locator("#deployment .verdict tbody tr").all()
    }
    assert asked["guardrail:length"] == "at most +0.5" and asked["canary"] == "above +0; stopped below -0"
    twin = users.http.get("/dashboard/deploys/tried.json").json()
    assert twin["course"]["live"] and twin["course"]["outcomes"] == 40 and twin["verdict"]["now"]
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    until(page.locator("#candidate"), "none")
    assert users.deployment()["champion"] == "tried@0"


def test_episodes_are_found_and_everything_fits_a_phone_in_the_dark(dashboard: LiveServer, open_page: Any) -> None:
    users = Users(dashboard, "phone", {"owner": "maria"})
    made = [users.ask(question) for question in ("where is the zanzibar kite?", "and a " + "very" * 60 + " long word?")]
    users.say(made[0][0], kind="boolean", value=False, reason="nobody " + "asked" * 40)
    users.say(made[0][0], kind="demonstration", text="It is in the " + "w" * 200)
    page = open_page(dashboard, "", viewport={"width": 400, "height": 700}, color_scheme="dark")

    def found() -> list[str]:
        return list(page.locator("#episode-list tbody td:first-child").all_inner_texts())

    page.goto("/dashboard/episodes?model=phone")
    assert found() == [made[1][1], made[0][1]]
    page.get_by_label("Text").fill("Zanzibar")
    page.keyboard.press("Enter")
    page.wait_for_url("**text=Zanzibar**")
    assert found() == [made[0][1]] and "answers" in page.locator("#episode-list p.dim").inner_text()
    for query, wanted in (
        ("feedback=without", made[1][1:2]),
        ("feedback=with", made[0][1:2]),
        ("since=2020-01-01&until=2020-01-02", ()),
        ("split=heldout", ()),
    ):
        page.goto(f"/dashboard/episodes?model=phone&{query}")
        assert found() == list(wanted), query
    page.complaints.expect("400")
    page.goto("/dashboard/episodes?since=yesterday")
    assert "must be a day" in page.get_by_role("alert").inner_text()
    body = {"name": "night", "form": "sft", "filters": {"model": "phone"}}
    dataset = users.http.post("/v1/datasets", json=body).raise_for_status().json()["id"]
    users.say(made[0][0], kind="boolean", value=True)
    for path in (
        f"episodes/{made[0][1]}",
        f"episodes/{made[1][1]}",
        f"datasets/{dataset}",
        "datasets",
        "deploys/phone",
        "review?model=phone",
    ):
        page.goto(f"/dashboard/{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, path
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 21)"
    page.goto(f"/dashboard/episodes/{made[0][1]}")
    page.locator("li.feedback summary").first.click()
    assert (
        "superseded" in page.locator("li.feedback").first.inner_text()
        and "a later word counts" in page.locator("li.feedback").first.inner_text()
    )
    users.say(made[0][0], kind="comment", text="and one word more")
    until(page.locator("li.feedback", has_text="and one word more"), count=1)
    assert page.locator("li.feedback details").first.evaluate("one => one.open"), "what was opened stays open"
    assert users.http.delete(f"/v1/episodes/{made[1][1]}").status_code == 204
    page.complaints.expect("404")
    page.goto(f"/dashboard/episodes/{made[1][1]}")
    assert "no episode" in page.get_by_role("alert").inner_text()
