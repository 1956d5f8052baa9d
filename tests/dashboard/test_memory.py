"""The Memory page in a real Chromium: what a memory holds, where it came from, and pin, correct and forget through the API's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.live import KEY, LiveServer

expect = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed (pip install 'everlearn[test]')").expect
FACT = "My sister Nora lives in Lisbon."
SECRET = "The password is plover-xyzzy."


def talk(server: LiveServer, memory: str, *texts: str) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        for text in texts:
            messages: list[Any] = [{"role": "user", "content": text}]
            body = {"memory": {"id": memory, "budget": 300}}
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, seed=1, extra_body=body)


def stored(home: Path, word: bytes) -> list[str]:
    """Files of the database that hold it."""
    return [path.name for path in home.glob("everlearn.db*") if word in path.read_bytes()]


def test_the_page_shows_pins_corrects_and_forgets(dashboard: LiveServer, page: Any) -> None:
    long = "Nora paid {n} euros in Lisbon. It was a nice day. The bus was {n} minutes late, and nobody knew why."
    talk(dashboard, "page", FACT, SECRET, *(long.format(n=n) for n in range(12)))
    page.goto("/dashboard")
    page.keyboard.press("g")
    page.keyboard.press("m")
    page.get_by_role("link", name="page", exact=True).click()
    page.wait_for_load_state()  # with its scripts
    expect(page.get_by_role("heading", name="Memory page")).to_be_visible()
    told = json.loads(dashboard.get("/dashboard/memory/page.json")[1])["memory"]
    chunks = page.locator(".chunk")
    expect(chunks).to_have_count(len(told["chunks"]))
    first = page.locator(".chunk[data-turn='0']")
    expect(first).to_contain_text(FACT)
    expect(first).to_contain_text("importance")
    expect(page.locator(".legend")).to_contain_text("ancient")
    assert f"{told['tokens']} tokens of 300" in page.locator("#window").inner_text() and told["tokens"] <= 300

    first.get_by_role("button", name="Pin").click()
    expect(first.get_by_text("pinned", exact=True)).to_be_visible()
    first.get_by_text("Correct", exact=True).click()
    first.get_by_label("What is right").fill("My sister Nora lives in Porto.")
    first.get_by_role("button", name="Put it in its place").click()
    corrected = page.locator(".chunk", has_text="lives in Porto")
    expect(corrected).to_contain_text("pinned")
    expect(page.locator(".chunk", has_text=FACT)).to_have_count(0)
    corrected.get_by_role("link", name="turn 0", exact=True).click()
    expect(page.locator("main")).to_contain_text(FACT)
    expect(page.get_by_text("corrected", exact=True)).to_be_visible()

    cut = next(chunk for chunk in told["chunks"] if chunk["rewrites"])
    page.goto(f"/dashboard/memory/page/turns/{cut['sources'][0]}")
    expect(page.get_by_role("region", name="Rewrites")).to_contain_text("extract")
    page.goto("/dashboard/memory/page/turns?limit=3")
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_role("region", name="Turns")).to_contain_text("user")

    assert stored(dashboard.home, b"plover-xyzzy")
    page.goto("/dashboard/memory/page/turns/2")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Forget this turn").click()
    expect(page.locator("main")).to_contain_text(SECRET)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Forget this turn").click()
    page.wait_for_url("**/dashboard/memory/page")
    assert stored(dashboard.home, b"plover-xyzzy") == []
    page.get_by_label("refill").select_option("generate")
    page.get_by_role("button", name="From the next turn on").click()
    expect(page.locator("#window")).to_contain_text("cut by generate")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Forget all of it").click()
    page.wait_for_url("**/dashboard/memory")
    assert stored(dashboard.home, b"lives in Porto") == []


def test_the_window_is_fetched_again_when_somebody_speaks_and_fits_a_phone(dashboard: LiveServer, open_page: Any) -> None:
    talk(dashboard, "phone", FACT)
    page = open_page(dashboard, "/dashboard/memory/phone", viewport={"width": 400, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    talk(dashboard, "phone", "And her birthday is in May.")
    expect(page.locator(".chunk", has_text="birthday")).to_be_visible()


def test_a_correction_that_is_being_typed_stays_while_others_speak_and_the_page_catches_up(dashboard: LiveServer, page: Any) -> None:
    talk(dashboard, "typed", FACT)
    page.goto("/dashboard/memory/typed")
    first, seen = page.locator(".chunk[data-turn='0']"), page.locator("#window pre")
    first.get_by_text("Correct", exact=True).click()
    field = first.get_by_label("What is right")
    field.press_sequentially("My sister Nora lives")
    talk(dashboard, "another", "Nobody asked.")
    talk(dashboard, "typed", "And her birthday is in May.")
    expect(page.get_by_role("status")).to_contain_text("when you have done")
    field.press_sequentially(" in Porto.")
    expect(field).to_have_value("My sister Nora lives in Porto.")
    expect(field).to_be_focused()
    page.get_by_role("heading", name="Memory typed").click()
    expect(page.locator(".chunk", has_text="birthday")).to_have_count(0)
    expect(field).to_have_value("My sister Nora lives in Porto.")

    field.fill("")
    expect(field).to_be_focused()
    page.get_by_role("heading", name="Memory typed").click()
    expect(page.locator(".chunk", has_text="birthday")).to_be_visible()
    expect(seen.filter(has_text="birthday")).to_have_count(1)
    expect(field).to_be_visible()
    first.get_by_role("button", name="Pin").focus()
    talk(dashboard, "typed", "She likes figs.")
    expect(page.locator(".chunk", has_text="figs")).to_be_visible()
    expect(first.get_by_role("button", name="Pin")).to_be_focused()
    field.fill("My sister Nora lives in Porto.")
    first.get_by_role("button", name="Put it in its place").click()
    expect(page.locator(".chunk .said", has_text="lives in Porto")).to_be_visible()
