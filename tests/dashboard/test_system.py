"""The state of the server as a page, live; and the stream that makes pages live, which is bounded and ends with its client."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from everlearn.api.dashboard.live import MAX_OF_TENANT
from tests.dashboard.test_frame import ask, expect
from tests.live import LiveServer


def chat(server: LiveServer, tokens: int) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "ignore_eos": True}
    status, _, answer = ask(server, "/v1/chat/completions", "POST", json.dumps(body).encode(), content_type="application/json")
    assert status == 200, answer


def test_the_page_says_what_the_engine_does_and_goes_on_saying_it(dashboard: LiveServer, page: Any) -> None:
    page.goto("/dashboard/system")
    engine = page.get_by_role("region", name="Engine")
    expect(engine).to_contain_text("ready")
    expect(engine).to_contain_text(f"process\n{dashboard.engine_pid()}", use_inner_text=True)
    expect(page.get_by_text("This server has no keys")).to_be_visible()
    sampled = json.loads(dashboard.get("/dashboard/system.json")[1])["engine"]["beat"]["sampled_tokens"]
    chat(dashboard, 7)
    work = page.get_by_role("region", name="Memory and work")
    expect(work).to_contain_text(f"tokens sampled\n{sampled + 7:,}", use_inner_text=True, timeout=15_000)
    shown = json.loads(dashboard.get("/dashboard/system.json")[1])
    assert time.time() - shown["engine"]["last_token_at"] < 60 and shown["ready"] and shown["engine"]["device"] == "cpu"
    assert shown["engine"]["beat"]["kv_blocks_total"] == 8192 // shown["engine"]["beat"]["block_tokens"]


@contextlib.contextmanager
def stream(server: LiveServer) -> Any:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("GET", "/dashboard/events")
    reply = connection.getresponse()
    try:
        yield reply
    finally:
        reply.close()
        connection.close()


def first_event(reply: http.client.HTTPResponse) -> dict[str, str]:
    while not (line := reply.readline()).startswith(b"data:"):
        assert line
    return json.loads(line.removeprefix(b"data:"))  # type: ignore[no-any-return]


def test_streams_say_what_changed_and_nothing_of_it(dashboard: LiveServer) -> None:
    with stream(dashboard) as reply:
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
        before = first_event(reply)
        chat(dashboard, 1)
        while (after := first_event(reply))["answers"] == before["answers"]:
            continue
        assert after.keys() == before.keys() and {"system", "runs", "steps", "feedback"} <= after.keys()
        assert after["feedback"] == before["feedback"] and all(len(value) == 12 for value in after.values())


def test_a_tenant_has_so_many_streams_and_a_closed_one_is_free_again(dashboard: LiveServer) -> None:
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(stream(dashboard)) for _ in range(MAX_OF_TENANT)]
        assert {reply.status for reply in streams} == {200}
        with stream(dashboard) as more:
            assert more.status == 429
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with stream(dashboard) as again:
            if again.status == 200:
                return
        time.sleep(0.2)
    pytest.fail("closed streams still count")
