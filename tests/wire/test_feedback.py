"""From an answer to a dataset, by the unmodified `openai` client on a real server: episodes, feedback, tokens, implicit labels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner

from everlearn.cli.console import Console
from everlearn.cli.main import build
from everlearn.loop.client import Feedback, in_episode, record_of
from tests.live import KEY, LiveServer, start_server


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = {"feedback.implicit": True, "feedback.heldout_share": 0.0}
    server = start_server(tmp_path_factory.mktemp("feedback"), tiny_model, settings)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def get(live: LiveServer, path: str, **params: Any) -> Any:
    reply = httpx.get(live.url + path, params=params)
    assert reply.status_code == 200, reply.text
    return reply.json()


def chat(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, **{"seed": 1, **more})


def test_a_conversation_becomes_an_episode_and_says_what_was_wrong(live: LiveServer, client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "It is one o'clock."}, {"role": "user", "content": "Where is my big parcel?"}]
    first = chat(client, messages, user="jo")
    messages = [
        {"role": "system", "content": "It is two."},
        messages[1],
        first.choices[0].message,
        {"role": "user", "content": "No, the other one"},
    ]
    second = chat(client, messages, user="jo")
    again = chat(client, messages, user="jo", seed=2)
    ids = [record_of(answer) for answer in (first, second, again)]
    rows = [get(live, f"/v1/records/{record_id}") for record_id in ids]
    episode = rows[0]["episode_id"]
    assert [row["episode_id"] for row in rows] == [episode] * 3
    shown = get(live, f"/v1/episodes/{episode}")
    assert [entry["type"] for entry in shown["timeline"] if entry["type"] != "feedback"] == [
        "system",
        "user",
        "answer",
        "user",
        "answer",
        "user",
        "answer",
    ]
    said = {entry["name"]: entry for entry in shown["timeline"] if entry["type"] == "feedback"}
    assert set(said) == {"correction", "retry"}
    assert said["correction"]["target"]["record_id"] == ids[0] and said["correction"]["value"] is False
    assert said["retry"]["target"]["record_id"] == ids[1] and said["retry"]["noise"] == 0.35
    assert all((one["kind"], one["source"], one["source_id"]) == ("implicit", "program", "jo") for one in said.values())


def test_the_helper_says_everything_through_the_client_that_is_there(live: LiveServer, client: openai.OpenAI) -> None:
    mine = in_episode(client, "ticket-1")
    answer, other = chat(mine, [{"role": "user", "content": "a?"}]), chat(mine, [{"role": "user", "content": "a?"}], seed=3)
    feedback = Feedback(client, source_id="jo")
    assert feedback.thumb(answer, up=False, reason="wrong")["source_id"] == "jo"
    corrected = feedback.correct(answer, "At seven.")
    assert feedback.edit(corrected["id"], text="At eight.")["answer"] == "At eight."
    assert feedback.score(answer, 4, "stars")["value"] == 4.0
    assert feedback.prefer(other, answer)["over"]["record_id"] == record_of(answer)
    assert feedback.outcome(answer, "tests", True, source="program")["kind"] == "outcome"
    comment = feedback.comment(answer, "hm")
    feedback.delete(comment["id"])
    assert feedback.event("ticket-1", "outcome", "solved", value=True)["kind"] == "outcome"
    assert feedback.say(None, episode_id="ticket-1", kind="boolean", value=True)["target"]["record_id"] is None
    shown = get(live, "/v1/episodes/ticket-1")
    assert (shown["client_given"], shown["records"]) == (True, 2)
    with pytest.raises(openai.BadRequestError, match="value"):
        feedback.score(answer, 1e300)
    with pytest.raises(openai.NotFoundError):
        feedback.thumb("rec_nothing", up=True)
    with pytest.raises(ValueError):
        record_of("something else")
    stream = list(chat(mine, [{"role": "user", "content": "streamed?"}], stream=True))
    assert feedback.thumb(stream[0], up=True)["target"]["record_id"] == record_of(stream[-1])
    response = mine.responses.create(model="tiny", input="a?", max_output_tokens=4)
    assert feedback.thumb(response, up=True)["target"]["episode_id"] == "ticket-1"
    body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "a?"}]}
    reply = httpx.post(live.url + "/anthropic/api/v1/messages", json=body, headers={"x-everlearn-episode": "ticket-2"}, timeout=60)
    assert reply.headers["x-everlearn-episode"] == "ticket-2"
    assert feedback.thumb(reply.json()["id"], up=True)["target"]["episode_id"] == "ticket-2"
    metrics = httpx.get(live.url + "/metrics").text
    assert 'everlearn_feedback_total{kind="demonstration",source="human"} 1.0' in metrics
    with pytest.raises(openai.BadRequestError, match="episode"):
        chat(in_episode(client, "not/this"), [{"role": "user", "content": "a?"}])


def test_a_span_is_corrected_in_its_answer(live: LiveServer, client: openai.OpenAI) -> None:
    answer = chat(client, [{"role": "user", "content": "span?"}], seed=5)
    content = answer.choices[0].message.content
    tokens = len(get(live, f"/v1/records/{record_of(answer)}")["content"]["choices"][0]["token_ids"])
    feedback = Feedback(client)
    for start in range(tokens):
        try:
            said = feedback.correct(answer, "<here>", span=[start, start + 1])
        except openai.BadRequestError as error:
            assert "cuts a character" in str(error)
            continue
        before, _, after = said["answer"].partition("<here>")
        assert content.startswith(before.lstrip() or content[:0]) and content.endswith(after)
        assert said["text"] == "<here>" and said["target"]["span"] == [start, start + 1]
        break
    else:
        pytest.fail("no token of the answer is a whole character")


def test_a_browser_needs_no_key(live: LiveServer, client: openai.OpenAI, root: Path) -> None:
    """The script of the guide, run by Node with a page's own objects, against the real server."""
    text = (root / "docs" / "guides" / "feedback.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```js\n(.*?)^```$", text, flags=re.M | re.S)
    assert len(script.splitlines()) <= 40
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node isn't here to run the script of the guide")
    answer = chat(client, [{"role": "user", "content": "browser?"}])
    token = Feedback(client).token(answer, 60, "visitor-1")
    page = """
const made = [];
class Element {
  constructor(tag) { this.tag = tag; this.children = []; this.listeners = {}; this.dataset = {}; this.disabled = false; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.children = more; }
  setAttribute(name, value) { this[name] = value; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
}
globalThis.document = { createElement: (tag) => { const one = new Element(tag); made.push(one); return one; } };
"""
    run = f"""
{page}
{script.replace("export ", "")}
const box = new Element("div");
thumbs(box, {json.dumps(live.url)}, {json.dumps(token)});
const buttons = made.filter((one) => one.tag === "button");
await (buttons[1].listeners.click ?? buttons[1].onclick)();
console.log(buttons.length);
"""
    ran = subprocess.run([node, "--input-type=module", "-e", run], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    (said,) = get(live, "/v1/feedback", record_id=record_of(answer))["data"]
    assert (said["kind"], said["value"], said["source"], said["source_id"]) == ("boolean", False, "human", "visitor-1")


def everlearn(live: LiveServer, *words: str, code: int = 0) -> str:
    ran = CliRunner().invoke(build(), ["--url", live.url, *words], obj=Console(), standalone_mode=False, catch_exceptions=True)
    if code:
        assert ran.exception is not None
        return str(ran.exception)
    assert ran.exception is None, ran.exception
    return ran.output


def test_the_command_line_goes_the_same_way(live: LiveServer, client: openai.OpenAI, tmp_path: Path) -> None:
    answer = chat(in_episode(client, "shell-1"), [{"role": "user", "content": "When do you open?"}])
    record = record_of(answer)
    assert "dry run" in everlearn(live, "feedback", "add", record, "--up", "--dry-run")
    everlearn(live, "feedback", "add", record, "--correct", "At seven.", "--source-id", "boss")
    everlearn(live, "feedback", "add", "shell-1", "--stars", "4")
    assert "things are said" in everlearn(live, "feedback", "add", record, "--up", "--comment", "x", code=2)
    listed = json.loads(everlearn(live, "-f", "json", "feedback", "list", "--episode", "shell-1"))
    assert [one["kind"] for one in listed] == ["float", "demonstration"]
    assert "shell-1" in everlearn(live, "episode", "list") and "At seven." in everlearn(live, "episode", "show", "shell-1")
    made = json.loads(everlearn(live, "-f", "json", "dataset", "create", "hours", "--form", "sft", "--source", "human"))
    assert made["items"]["train"] >= 1 and made["items"]["heldout"] == 0
    out = tmp_path / "hours.jsonl"
    everlearn(live, "dataset", "export", made["id"], "--out", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    mine = next(line for line in lines if line["record_id"] == record)
    assert [message["content"] for message in mine["messages"]] == ["When do you open?", "At seven."]
    assert "prompt_token_ids" not in mine
    assert "prompt_token_ids" in everlearn(live, "dataset", "export", made["id"], "--tokens")
    assert "held-out" in everlearn(live, "dataset", "export", made["id"], "--split", "heldout", code=1)
    assert everlearn(live, "dataset", "export", made["id"], "--split", "heldout", "--evaluate") == ""
    assert made["id"] in everlearn(live, "dataset", "list")
    httpx.delete(f"{live.url}/v1/records/{record}").raise_for_status()
    shown = json.loads(everlearn(live, "-f", "json", "dataset", "show", made["id"]))
    assert shown["marks"] == 1 and shown["deleted"][0]["id"] == record
    assert "rebuild" in everlearn(live, "dataset", "export", made["id"], code=1)
    if len(lines) > 1:
        again = json.loads(everlearn(live, "-f", "json", "dataset", "rebuild", made["id"]))
        assert again["items"]["train"] == len(lines) - 1 and again["rebuilt_from"] == made["id"]
    everlearn(live, "-y", "dataset", "delete", made["id"])
    assert made["id"] not in everlearn(live, "dataset", "list")


def test_it_all_survives_a_kill(live: LiveServer, client: openai.OpenAI) -> None:
    answer = chat(client, [{"role": "user", "content": "Will you remember?"}])
    said = Feedback(client).correct(answer, "Yes.")
    live.kill()
    live.restart()
    assert get(live, f"/v1/feedback/{said['id']}")["answer"] == "Yes."
    assert get(live, f"/v1/records/{record_of(answer)}")["episode_id"] == said["target"]["episode_id"]
