"""The dashboard in a real Chromium against a real server. Whatever the browser complains of fails the test: errors on the console, exceptions
of scripts, violations of the content security policy (which Chromium tells on the console), requests to any other host.

The policy forbids what `page.wait_for_function` does in the page; `expect(locator)` waits from outside."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pytest

from tests.live import LiveServer, start_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


T = TypeVar("T")
READY_MS = 20_000  # what a browser waits for comes within one second, and on a busy machine within these


def aside(act: Callable[[], T]) -> T:
    """Runs `act` in a thread that has no event loop: playwright's runs in this one, and what calls asyncio.run, as the SDK and the loops of
    everlearn.rl do, can't work beside it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


class Complaints:
    """What a browser complained of, but for what the test expects (Chromium tells of every answer of 400 and above)."""

    def __init__(self, own: str):
        self.own, self.found, self.expected = own, [], []

    def expect(self, pattern: str) -> None:
        self.expected.append(pattern)

    def watch(self, page: Page) -> Page:
        page.on("console", lambda said: self.found.append(f"console: {said.text}") if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.found.append(f"script: {error}"))
        page.on("request", self.check)
        return page

    def check(self, request: Any) -> None:
        place = urlsplit(request.url)
        if place.scheme not in ("data", "blob") and place.netloc != self.own:
            self.found.append(f"request: {request.url}")

    def left(self) -> list[str]:
        return [found for found in self.found if not any(re.search(pattern, found) for pattern in self.expected)]


# Of the package: the sync API keeps an event loop running in this thread, and other tests want one of their own.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """One browser for all tests of this folder."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed (pip install 'everlearn[test]')")
    playwright.expect.set_options(timeout=READY_MS)
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def dashboard(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without keys for all tests of this folder: each makes what it needs and looks for that, whatever else is there."""
    live = start_server(tmp_path_factory.mktemp("dashboard"), tiny_model)
    yield live
    live.stop()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Any]]:
    """`open_page(server, path, **context)`: a page with its `complaints`, which must be empty when the test ends."""
    opened: list[tuple[Any, Complaints]] = []

    def start(server: LiveServer, path: str = "/dashboard", **context: Any) -> Any:
        context = {"viewport": {"width": 1200, "height": 800}, "base_url": server.url, **context}
        made = chromium.new_context(**context)
        made.set_default_timeout(READY_MS)
        complaints = Complaints(urlsplit(server.url).netloc)
        opened.append((made, complaints))
        page = complaints.watch(made.new_page())
        page.complaints = complaints
        if path:
            page.goto(path)
        return page

    yield start
    for made, _ in opened:
        made.close()
    assert [complaints.left() for _, complaints in opened] == [[] for _ in opened]


@pytest.fixture
def page(open_page: Callable[..., Any], dashboard: LiveServer) -> Any:
    """A page of the folder's server, not yet anywhere: `page.goto("/dashboard/...")`."""
    return open_page(dashboard, "")
