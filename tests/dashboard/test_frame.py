"""The frame: navigation, themes, keys, signing in, tenants, what is refused, and that nothing is fetched from elsewhere."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tinker

from everlearn.store import keys
from everlearn.store.db import open_database
from tests.dashboard.conftest import aside
from tests.live import LiveServer, start_server

expect = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed (pip install 'everlearn[test]')").expect
VENDOR = Path("everlearn/api/dashboard/static/vendor")


# What a screen reader would call "button" or "link" alone, and ids that stand for two things.
NAMELESS = """() => {
  const named = (e) => e.textContent.trim() || e.getAttribute("aria-label") || e.getAttribute("title") || (e.labels && e.labels.length);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  return [...document.querySelectorAll("a, button, input:not([type=hidden]), select, textarea, [role=region]")].filter((e) => !named(e) && !e.getAttribute("aria-labelledby"))
    .map((e) => e.outerHTML).concat(ids.filter((id, n) => ids.indexOf(id) !== n));
}"""


@pytest.fixture(scope="module")
def keyed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, dict[str, tuple[keys.Key, str]]]]:
    """A server with keys of two tenants, and one that may not read."""
    home = tmp_path_factory.mktemp("keyed")
    db = open_database(f"sqlite:///{home / 'everlearn.db'}")
    given = {"acme": keys.SCOPES, "other": ("read",), "sampler": ("sample",)}
    made = {name: db.write(lambda conn, n=name: keys.create(conn, n, n, given[n])).result() for name in given}  # type: ignore[misc]
    db.close()
    server = start_server(home, tiny_model)
    yield server, made
    server.stop()


def ask(server: LiveServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, method=method, data=body, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def addresses(page: Any) -> list[str]:
    return [link.get_attribute("href") for link in page.locator("nav a").all()]


def test_every_page_opens_fits_a_phone_and_has_a_json_twin(dashboard: LiveServer, open_page: Callable[..., Any]) -> None:
    page = open_page(dashboard, "/", viewport={"width": 400, "height": 700})
    assert page.url == dashboard.url + "/dashboard"
    found = addresses(page)
    assert found[0] == "/dashboard" and "/dashboard/system" in found
    keys = [link.get_attribute("data-key") for link in page.locator("nav a").all()]
    assert len(set(keys)) == len(keys) and all(keys), f"each page has a key of its own: {keys}"
    for address in found:
        page.goto(address)
        assert page.locator("nav a[aria-current=page]").get_attribute("href") == address
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, address
        assert page.locator("nav a[aria-current=page]").is_visible()
        for link in page.locator("a[href^='/']").all():
            where = link.get_attribute("href")
            assert dashboard.get(where)[0] == 200, f"{address} has a dead link: {where}"
        assert page.evaluate(NAMELESS) == [], address
        status, body = dashboard.get(address + ".json")
        assert status == 200 and isinstance(json.loads(body), dict)


def test_dark_and_light_follow_the_system_until_somebody_chooses(dashboard: LiveServer, open_page: Callable[..., Any]) -> None:
    def background(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page = open_page(dashboard, color_scheme="dark")
    dark = background(page)
    page.emulate_media(color_scheme="light")
    light = background(page)
    assert dark != light
    page.get_by_role("button", name="Light or dark").click()
    assert background(page) == dark
    page.reload()
    assert background(page) == dark, "the choice is kept"
    page.keyboard.press("t")
    assert background(page) == light


def test_the_keyboard_reaches_every_page(dashboard: LiveServer, page: Any) -> None:
    page.goto("/dashboard")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("s")
    page.wait_for_url("**/dashboard/system")


def test_parts_fetch_themselves_when_something_changed(dashboard: LiveServer, page: Any) -> None:
    page.goto("/dashboard")
    station = page.locator("[data-station=answers]")
    before = int(station.inner_text().replace(",", ""))
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}).encode()
    assert ask(dashboard, "/v1/chat/completions", "POST", body, content_type="application/json")[0] == 200
    link = page.locator("#to-runs")
    link.focus()
    expect(station).to_have_text(str(before + 1))
    expect(link).to_be_focused()  # what is fetched again takes the focus from nobody


def test_a_key_signs_in_and_out_and_never_stands_in_the_cookie(keyed: Any, open_page: Callable[..., Any]) -> None:
    server, made = keyed
    page = open_page(server, "/dashboard/system?x=1")
    page.complaints.expect("401")
    assert page.locator("nav").count() == 0
    told = page.locator("#sign-in-error")
    for wrong, why in (("tml-wrong", "unknown or revoked"), ("ключ", "letters")):
        page.get_by_label("A key").fill(wrong)
        page.get_by_role("button", name="Sign in").click()
        expect(told).to_contain_text(why)
    page.complaints.expect("403")
    page.get_by_label("A key").fill(made["sampler"][1])
    page.keyboard.press("Enter")
    expect(told).to_contain_text("no scope 'read'")
    page.get_by_label("A key").fill(made["acme"][1])
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="System").wait_for()
    page.wait_for_load_state()  # the heading stands above what is counted below
    assert page.url.endswith("/dashboard/system?x=1"), "signing in leads to where one wanted to go"
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and made["acme"][1] not in json.dumps(cookie)
    assert page.get_by_text("acme", exact=True).count() and not page.get_by_text("other", exact=True).count(), "keys of one's own tenant"
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()


def cookie_of(server: LiveServer, secret: str) -> str:
    status, headers, _ = ask(server, "/dashboard/session", "POST", b"", authorization=f"Bearer {secret}")
    assert status == 204
    return headers["set-cookie"].partition(";")[0]


def test_a_cookie_opens_pages_and_nothing_else(keyed: Any) -> None:
    server, made = keyed
    cookie = cookie_of(server, made["acme"][1])
    assert ask(server, "/dashboard/system.json", cookie=cookie)[0] == 200
    assert ask(server, "/v1/records", cookie=cookie)[0] == 401, "the API wants the key"
    assert ask(server, "/dashboard/system.json", x_api_key=made["acme"][1])[0] == 200
    assert ask(server, "/dashboard/system.json", x_api_key=made["sampler"][1])[0] == 403
    for broken in (
        cookie[:-1] + ("0" if cookie[-1] != "0" else "1"),
        cookie.replace("=", "=e30", 1),
        cookie.partition("=")[0] + "=é",
        cookie + "é",
        "",
    ):
        assert ask(server, "/dashboard/system.json", cookie=broken.encode().decode("latin-1"))[0] == 401
    shown = json.loads(ask(server, "/dashboard/system.json", x_api_key=made["other"][1])[2])
    assert [key["name"] for key in shown["keys"]] == ["other"]


def test_a_tenant_s_runs_are_nobody_else_s(keyed: Any, open_page: Callable[..., Any]) -> None:
    server, made = keyed

    def create() -> str:
        service = tinker.ServiceClient(base_url=server.url, api_key=made["acme"][1])
        run = service.create_lora_training_client("tiny", rank=4).result().model_id
        service.close("success").result()
        return str(run)

    run = aside(create)
    ours, theirs = {"x_api_key": made["acme"][1]}, {"x_api_key": made["other"][1]}
    assert [row["run_id"] for row in json.loads(ask(server, "/dashboard/runs.json", **ours)[2])["runs"]] == [run]
    assert json.loads(ask(server, "/dashboard/runs.json", **theirs)[2])["runs"] == []
    for path in (f"/dashboard/runs/{run}.json", f"/dashboard/rollouts.json?run={run}", f"/dashboard/runs/diff.json?a={run}&b={run}"):
        assert (ask(server, path, **ours)[0], ask(server, path, **theirs)[0]) == (200, 404), path
    for path in (f"/v1/runs/{run}/steps", f"/v1/runs/{run}/rollouts"):
        assert ask(server, path, **ours)[0] == 200
    assert ask(server, f"/v1/runs/{run}/steps", **theirs)[0] == 404
    assert ask(server, f"/v1/runs/{run}/rollouts", **theirs)[0] == 404


def test_changes_are_taken_from_our_own_pages_alone(keyed: Any, dashboard: LiveServer) -> None:
    server, made = keyed
    cookie = cookie_of(server, made["acme"][1])

    def leave(where: LiveServer, **headers: str) -> int:
        return ask(where, "/dashboard/session", "DELETE", b"", **headers)[0]

    own = {"hx_request": "true", "origin": server.url, "cookie": cookie}
    assert leave(server, **own) == 204
    assert leave(server, origin=server.url, cookie=cookie) == 403, "a form can't send the header"
    for foreign in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", server.url + ".evil.example"):
        assert leave(server, **own | {"origin": foreign}) == 403, foreign
    assert leave(server, **own, sec_fetch_site="cross-site") == 403
    assert leave(dashboard, hx_request="true", origin=dashboard.url) == 204
    assert leave(dashboard, origin=dashboard.url) == 403 and leave(dashboard, hx_request="true", origin="http://localhost:3000") == 403


def test_what_goes_wrong_is_told_to_a_browser_as_a_page(dashboard: LiveServer, page: Any) -> None:
    page.complaints.expect("404")
    page.goto("/dashboard/nothing/here")
    assert "no page /dashboard/nothing/here" in page.get_by_role("alert").inner_text()
    status, _, body = ask(dashboard, "/dashboard/nothing")
    assert status == 404 and json.loads(body)["error"]["code"] == "not_found"
    assert ask(dashboard, "/")[0] == 404 and ask(dashboard, "/", accept="text/html")[0] == 200  # (redirected)


def test_a_slash_at_the_end_leads_to_the_page_and_nowhere_else(dashboard: LiveServer, page: Any) -> None:
    page.goto("/dashboard/")
    assert page.url == dashboard.url + "/dashboard" and page.locator("nav a[aria-current=page]").inner_text() == "Overview"
    page.goto("/dashboard/runs/?limit=5&offset=0")
    assert page.url == dashboard.url + "/dashboard/runs?limit=5&offset=0"

    def leads(path: str) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection(dashboard.url.removeprefix("http://"), timeout=30)
        connection.request("GET", path)
        reply = connection.getresponse()
        connection.close()
        return reply.status, reply.headers["location"]

    for path, place in (
        ("//", "/dashboard"),
        ("//evil.example/", "/dashboard//evil.example"),
        ("/%2f%2fevil.example//", "/dashboard///evil.example"),
        ("/%5cevil.example/?a=%26b", "/dashboard/%5Cevil.example?a=%26b"),
        ("/h%C3%B6/?", "/dashboard/h%C3%B6"),
    ):
        assert leads("/dashboard" + path) == (303, place), path
    assert leads("/dashboard/nothing") == leads("/dashboard/a%0d%0ax:%20y/") == (404, None)


def test_every_answer_forbids_what_no_page_needs(dashboard: LiveServer) -> None:
    for path in (
        "/dashboard",
        "/dashboard.json",
        "/dashboard/nothing",
        "/dashboard/static/everlearn.js",
        "/dashboard/static/vendor/htmx.min.js",
    ):
        headers = ask(dashboard, path, accept="text/html")[1]
        assert "script-src 'self'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff", path
    assert ask(dashboard, "/dashboard/static/../pages.py")[0] == 404
    assert ask(dashboard, "/dashboard/static/%2e%2e/pages.py")[0] == 404


def test_the_files_of_others_are_what_they_published(root: Path) -> None:
    listed = dict(
        reversed(line.split("  ")) for line in (root / VENDOR / "VERSIONS.txt").read_text().splitlines() if re.match("[0-9a-f]{64}  ", line)
    )
    files = {path.name: path for path in (root / VENDOR).iterdir() if path.suffix in (".js", ".css")}
    assert listed.keys() == files.keys()
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == listed


def test_a_wheel_has_every_file(root: Path) -> None:
    """What hatch packs is what git tracks under the package."""
    kept = subprocess.run(
        ["git", "check-ignore", "--no-index", "-v", *map(str, (root / "everlearn/api/dashboard").rglob("*"))],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert [line for line in kept.stdout.splitlines() if "__pycache__" not in line and ".pyc" not in line] == []


def test_a_key_that_only_reads_changes_nothing(keyed: Any) -> None:
    server, made = keyed
    acts = (("POST", "review/feedback"), ("DELETE", "review/feedback/fb_1"), ("POST", "deploys/x/promote"), ("POST", "deploys/x/rollback"))
    for method, path in (*acts, ("PATCH", "deploys/x")):
        tried = [
            ask(server, f"/dashboard/{path}", method, b"{}", x_api_key=made[name][1], content_type="application/json")[0]
            for name in ("other", "acme")
        ]
        assert tried[0] == 403 and tried[1] in (400, 404), (path, tried)


@pytest.fixture
def other_site(tmp_path: Path) -> Iterator[str]:
    """The address of another site, which serves what lies in `tmp_path`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_guide_s_thumbs_tell_on_another_site_what_became_of_a_word(
    dashboard: LiveServer, page: Any, root: Path, tmp_path: Path, other_site: str
) -> None:
    """What docs/guides/feedback.md gives a product's page."""
    script = re.search(r"```js\n(.*?)```", (root / "docs/guides/feedback.md").read_text(), re.DOTALL)
    assert script is not None
    (tmp_path / "thumbs.js").write_text(script[1])
    said = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    headers = ask(dashboard, "/v1/chat/completions", "POST", json.dumps(said).encode(), content_type="application/json")[1]
    wanted = json.dumps({"record_id": headers["x-everlearn-record"]}).encode()
    token = json.loads(ask(dashboard, "/v1/feedback/tokens", "POST", wanted, content_type="application/json")[2])["token"]
    page.complaints.expect(f"request: {other_site}")
    page.complaints.expect("401")
    for given, told in ((token, ""), (token[:-2], "Not kept (feedback: 401)")):
        call = f'import {{ thumbs }} from "./thumbs.js"; thumbs(document.body, "{dashboard.url}", "{given}");'
        html = f'<!doctype html><link rel="icon" href="data:,"><body><script type="module">{call}</script>'
        (tmp_path / f"shop{len(told)}.html").write_text(html)
        page.goto(f"{other_site}/shop{len(told)}.html")
        good = page.get_by_role("button", name="Good answer")
        good.click()
        expect(page.get_by_role("status")).to_have_text(told)
        expect(page.locator("[aria-pressed=true]")).to_have_count(0 if told else 1)
        expect(good).to_be_enabled()
