"""What people do around the pages of the loop: users who ask and judge over the API, a reviewer with a keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import tinker

from everlearn.cli.client import Client
from everlearn.loop.runner import Runner
from everlearn.store.placing import split_of
from tests.live import KEY, LiveServer


class Users:
    """Of one deployment. Their episodes are all of the split that is trained on, so that nothing hangs on the ids."""

    def __init__(self, server: LiveServer, name: str, gate: dict[str, Any], **description: Any):
        self.http = httpx.Client(base_url=server.url, timeout=60)
        self.name, self.server, self.count = name, server, 0
        body = {"name": name, "description": {"base": server.model, "gate": gate, **description}}
        self.http.post("/v1/deployments", json=body).raise_for_status()

    def ask(self, question: str, **more: Any) -> tuple[str, str, str]:
        """The record of the answer, its episode, and what was answered (at first, if there are several)."""
        self.count += 1
        while split_of("default", self.episode(), 0.2) != "train":
            self.count += 1
        body = {"model": self.name, "messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0, **more}
        reply = self.http.post("/v1/chat/completions", json=body, headers={"x-everlearn-episode": self.episode()}).raise_for_status()
        return reply.headers["x-everlearn-record"], self.episode(), reply.json()["choices"][0]["message"]["content"]

    def episode(self) -> str:
        return f"{self.name}-{self.count}"

    def say(self, record: str, **what: Any) -> None:
        self.http.post("/v1/feedback", json={"record_id": record, **what}).raise_for_status()

    def said(self, record: str) -> list[dict[str, Any]]:
        """All of a record's feedback, oldest first."""
        found: list[dict[str, Any]] = self.http.get("/v1/feedback", params={"record_id": record}).raise_for_status().json()["data"]
        return found[::-1]

    def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/deployments/{self.name}").raise_for_status().json()
        return found


@contextmanager
def runner(users: Users) -> Iterator[Runner]:
    """The runner of their deployment."""
    with tinker.ServiceClient(base_url=users.server.url, api_key=KEY) as service:
        yield Runner(Client(users.server.url, KEY), service, users.name, say=lambda line: None)


def tab_to(page: Any, text: str) -> None:
    """Presses Tab until something of that text has the focus."""
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == text:
            return
    raise AssertionError(f"no way to {text!r} with the keyboard on {page.url}")


def until(locator: Any, text: str | None = None, count: int | None = None) -> None:
    """Waits until there are so many of something, or until it says just that. (The pages' own policy forbids Playwright's way to wait for
    an expression.)"""
    from playwright.sync_api import expect

    if count is not None:
        expect(locator).to_have_count(count, timeout=20_000)
    if text is not None:
        expect(locator).to_have_text(text, timeout=20_000)


def until_says(locator: Any, text: str) -> None:
    """Waits until something says that among other things."""
    from playwright.sync_api import expect

    expect(locator).to_contain_text(text, timeout=20_000)
