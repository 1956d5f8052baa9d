"""The demo's whole loop on the tiny model, where a lesson can only be remembered."""

from __future__ import annotations

import re

import pytest
import tinker

from everlearn.cli.client import Client
from everlearn.demo import loop_report, story
from everlearn.demo.handbook import Fact, Handbook
from tests.demo.test_report import assert_balanced
from tests.live import AT_ONCE, KEY, LiveServer

TRUTHS = {
    "who?": "the lazy dog",
    "where is it?": "in france",
    "what jumps?": "the quick brown fox",
    "hello, how?": "hello world",
    "which city?": "paris",
    "over what?": "the capital",
}
BOOK = Handbook("Larkspur Kites", [Fact(question, answer, [answer], [], []) for question, answer in TRUTHS.items()])
UPDATE = {"rank": 8, "learning_rate": 2e-2, "epochs": 40, "batch": 3, "paraphrases": 1, "rehearsed": 1}


@pytest.mark.slow  # a model of random weights learns: now and then the candidate doesn't convince
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaves its sockets to the garbage collector
def test_what_was_corrected_is_learned_tried_and_served_and_a_bad_version_isn_t(server: LiveServer) -> None:
    client = Client(server.url, KEY, timeout=300.0)
    lines: list[str] = []
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        told = story.play(BOOK, client, service, server.model, UPDATE, lines.append, min_right=0.6)
    client.close()
    right, num = told.trained
    assert num - right <= 2 <= right and num + told.held_out[1] == told.corrections == 6  # a model of random weights may not learn all
    assert told.scores[0].before == 0 and told.scores[0].after >= right
    assert "corrections" in told.stopped and told.rollback_seconds <= AT_ONCE
    assert [event["kind"] for event in told.events if event["kind"] != "advanced"] == ["created", "promoted", "rejected", "rolled_back"]
    assert set(told.seconds) == {"asking before", "correcting", "learning", "canary", "asking after", "a bad version"} and lines

    page = loop_report.render(BOOK.company, told, {"model": "tiny"})
    assert_balanced(page)
    assert not re.search(r"(src|href)\s*=|url\(|https?://", page), "the report must not need the network"
    assert page.count("<svg") >= 1 and "promote: handbook@1 against handbook@0, canary" in page
