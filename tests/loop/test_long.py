"""Conversations and corrections that are longer than a model reads, and requests that the server refuses: neither stops a deployment's work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tinker

from everlearn.cli.client import Client
from everlearn.errors import Forbidden, InvalidRequest, Unauthenticated, Unavailable
from everlearn.loop import measure, refusals, update
from everlearn.loop.moving import moving_of
from everlearn.loop.runner import Runner
from everlearn.loop.service import Tokens, read
from tests.live import KEY, LiveServer
from tests.loop import test_continuous
from tests.loop.test_cycle import DESCRIPTION, User, events
from tests.loop.test_cycle import parts as parts

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"), pytest.mark.timeout(900)]
CONTEXT = 1024  # of the tiny model
LONG = "12 " * 600  # more tokens than it reads


def tell(user: User, question: str, correction: str) -> None:
    """Asks in an episode of its own, and corrects what is answered; once for each of enough episodes that not all are held out."""
    for _ in range(6):
        user.count += 1
        body = {"model": user.name, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 4}
        headers = {"x-everlearn-episode": f"{user.name}-{user.count}"}
        answer = user.http.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
        user.say(answer.headers["x-everlearn-record"], kind="demonstration", text=correction)


def filling(tokens: Tokens, room: int) -> str:
    """A question behind which so many tokens have room."""
    text = "12 " * 290
    while tokens.room(tokens.prompt([{"role": "user", "content": text}])) > room:
        text += "x"
    assert tokens.room(tokens.prompt([{"role": "user", "content": text}])) == room
    return text


def say_all(user: User, tokens: Tokens) -> None:
    """What fits; a correction that doesn't; a question whose other wordings can't be asked for; one that leaves hardly an answer any room."""
    tell(user, "who is it?", "the lazy dog")
    tell(user, "what jumps?", LONG)
    tell(user, filling(tokens, 20), "no")
    tell(user, filling(tokens, 5), "yes")


def test_what_is_too_long_is_left_out_and_the_rest_is_learned(server: LiveServer, http: httpx.Client, parts: Any) -> None:
    gate = {"owner": "maria", "corrections": {"min_right": 0.1}}
    quick = {**DESCRIPTION["update"], "epochs": 2, "batch": 2}
    runner, user = parts("lengthy", {**DESCRIPTION, "gate": gate, "update": quick})
    tokens = Tokens(runner.api, "tiny")
    assert tokens.context == CONTEXT
    say_all(user, tokens)
    runner.begin("by hand")
    now = runner.run()
    made = next(event for event in events(http, "lengthy") if event["state"] == "gate")
    assert made["evidence"]["update"]["left_out"] == {update.LONGER: 1} and "1 left out" in made["reason"]
    assert events(http, "lengthy")[-1]["evidence"].get("evidence") or now.cycle["asks"], "the gate asked what fits, and judged"


def test_a_cycle_of_nothing_but_what_is_too_long_ends(http: httpx.Client, parts: Any) -> None:
    runner, user = parts("overlong", DESCRIPTION)
    tell(user, "what jumps?", LONG)
    runner.begin("by hand")
    assert runner.run().state == "collect"
    last = events(http, "overlong")[-1]
    assert last["kind"] == "ended" and update.LONGER in last["reason"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_answers_that_were_compared_are_left_out_too(http: httpx.Client, parts: Any, method: str) -> None:
    described = {**DESCRIPTION, "update": {**DESCRIPTION["update"], "method": method, "epochs": 1}}
    runner, user = parts(f"compared-{method}", described)
    for question in ("who is it?", filling(Tokens(runner.api, "tiny"), 3)):
        for number in range(6):
            user.count += 1
            body = {"model": user.name, "messages": [{"role": "user", "content": question}], "max_tokens": 4}
            headers = {"x-everlearn-episode": f"{user.name}-{user.count}"}
            record = user.http.post("/v1/chat/completions", json=body, headers=headers).headers["x-everlearn-record"]
            user.say(record, kind="boolean", value=number % 2 == 0)
            user.say(record, kind="demonstration", text=LONG if number == 5 else "the lazy dog")
    runner.begin("by hand")
    runner.run()
    told = events(http, user.name)
    made = next((event for event in told if event["state"] == "gate"), told[-1])
    assert "left_out" in made["evidence"].get("update", {}), told[-1]
    assert made["evidence"]["update"]["left_out"][update.LONGER] >= 1 if method == "dpo" else True


def test_weights_that_move_leave_it_out_and_move_on(http: httpx.Client, parts: Any) -> None:
    runner, user = parts("moving-long", test_continuous.DESCRIPTION)
    say_all(user, Tokens(runner.api, "tiny"))
    noted: list[Any] = []
    for _ in range(500):  # what was said of others' answers comes first, and what was said last may be learned a move later
        moving = moving_of(read(runner.api, "moving-long"))
        noted = [event["evidence"]["left_out"] for event in events(http, "moving-long") if event["kind"] == "noted"]
        if moving.step and noted:
            break
        assert runner.step()
    assert noted == [{update.LONGER: 1}]
    behind = moving.behind
    tell(user, "what jumps?", LONG)
    runner.run()
    now = moving_of(read(runner.api, "moving-long"))
    assert now.behind > behind, "what can't be learned isn't taken again and again"
    assert runner.mover.reservoir and all(one.answer != LONG for one in runner.mover.reservoir)


def test_what_the_server_refuses_ends_what_was_tried_and_the_watch_goes_on(new_server: Callable[..., LiveServer]) -> None:
    """A rank that this server doesn't train: it refuses that at each start."""
    server = new_server(**{"engine.max_rank": 4})
    with (
        httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=60) as http,
        tinker.ServiceClient(base_url=server.url, api_key=KEY) as service,
    ):

        def deploy(name: str, description: dict[str, Any]) -> Runner:
            http.post("/v1/deployments", json={"name": name, "description": description}).raise_for_status()
            tell(User(None, http, name), "who is it?", "the lazy dog")  # type: ignore[arg-type]
            return Runner(Client(server.url, KEY), service, name)

        runner, lines = deploy("refused", DESCRIPTION), list[str]()
        runner.begin("by hand")
        runner.say = runner.guard.say = lines.append
        over = threading.Event()
        watching = threading.Thread(target=runner.watch, args=(0.1, over), daemon=True)
        watching.start()
        deadline = time.monotonic() + 120
        while read(runner.api, "refused").state != "collect":
            time.sleep(0.1)
            assert watching.is_alive() and time.monotonic() < deadline, lines
        last = events(http, "refused")[-1]
        assert last["kind"] == "rejected" and "refused" in last["reason"] and "rank" in last["reason"]
        time.sleep(0.5)
        assert watching.is_alive() and any(one.name == "watch refused" for one in threading.enumerate()), "what serves is still watched"
        over.set()
        watching.join(60)
        assert not any(one.name == "watch refused" for one in threading.enumerate()), "both end when they are told to"

        moves = deploy("unmoved", test_continuous.DESCRIPTION)
        now = moves.run()
        moving = moving_of(now)
        assert (moving.step, moving.owed) == (0, 0) and moving.behind
        last = events(http, "unmoved")[-1]
        assert last["kind"] == "noted" and "rank" in last["reason"] and last["evidence"]["passed over"]
        assert Runner(moves.api, service, "unmoved").run().revision == now.revision, "it isn't tried again at each start"


def test_which_errors_are_waited_for() -> None:
    request = httpx.Request("POST", "http://localhost/api/v1/asample")

    def status(code: int, name: str = "") -> tinker.APIStatusError:
        response = httpx.Response(code, request=request, json={"error": {"message": f"it is {code}", "code": name}})
        return tinker.APIStatusError("told", response, response.json())

    failed = [tinker.RequestFailedError("it broke", "r1", category) for category in ("user", "server")]
    for error in (tinker.APIConnectionError(request=request), tinker.APITimeoutError(request=request), status(429), status(500)):
        with pytest.raises(Unavailable):
            refusals.reason_of(error)
    for code, kind in ((401, Unauthenticated), (403, Forbidden)):
        with pytest.raises(kind, match=f"it is {code}"):
            refusals.reason_of(status(code))
    for error in (status(400), status(413), failed[0], InvalidRequest("it is 400")):
        assert refusals.reason_of(error, 1).startswith("the server refused it: it")
    for error in (status(404), status(400, "conflict"), failed[1]):
        with pytest.raises(Unavailable, match="once more"):
            refusals.reason_of(error, refusals.TRIES - 1)
        assert "it" in refusals.reason_of(error, refusals.TRIES)


def test_an_answer_gets_no_more_room_than_there_is(server: LiveServer, http: httpx.Client, parts: Any) -> None:
    runner, _ = parts("roomy", {"base": "tiny"})
    tokens = Tokens(runner.api, "tiny")
    prompt = tokens.prompt([{"role": "user", "content": filling(tokens, 1)}])
    one = runner.service.create_sampling_client(base_model="tiny").result()
    item = {
        "feedback_ids": ["f"],
        "prompt_token_ids": prompt,
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}],
    }
    long = {**item, "messages": [*item["messages"][:1], {"role": "assistant", "content": "no"}], "record_id": "rec_none"}
    assert len(measure.again(runner.api, tokens, one, one, [{**item, "record_id": "rec_none"}, long])) == 1
