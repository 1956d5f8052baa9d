"""`everlearn adapter`, `usage`, `chat` and `bench serve` against a running server with a trained adapter."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import httpx
import pytest

from everlearn.cli import load
from everlearn.cli.main import run
from tests.live import KEY, LiveServer


@pytest.fixture(scope="module")
def paths(server: LiveServer) -> list[str]:
    """tinker:// paths of a run's sampler weights before and after a step."""
    import tinker
    from tinker import types

    tokens = [5, 6, 7, 8, 9, 10]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 5}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        training = service.create_lora_training_client(server.model, rank=4).result()
        first = training.save_weights_for_sampler("first").result().path
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.05)).result()
        return [first, training.save_weights_for_sampler("second").result().path]


def answer(capsys: pytest.CaptureFixture[str], server: LiveServer, *argv: str) -> Any:
    """What the command prints as JSON."""
    capsys.readouterr()
    code = run([*argv, "--url", server.url, "-f", "json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out or "null")


def said(capsys: pytest.CaptureFixture[str], server: LiveServer, *argv: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert run([*argv, "--url", server.url]) == code, capsys.readouterr().err
    return tuple(capsys.readouterr())  # type: ignore[return-value]


@pytest.fixture
def named(server: LiveServer, paths: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The name `talk`, which means its first version and has a second."""
    for path in paths:
        answer(capsys, server, "adapter", "name", "talk", path)
    answer(capsys, server, "adapter", "move", "talk", "1")
    return "talk"


def test_an_adapter_s_life(server, paths, capsys):
    made = answer(capsys, server, "adapter", "name", "cli-test", paths[0], "--note", "first try")
    assert (made["model"], made["current"], made["note"]) == ("cli-test@1", True, "first try")
    out, err = said(capsys, server, "adapter", "name", "cli-test", paths[1])
    assert "cli-test@2" in out and "everlearn adapter move cli-test 2" in err
    assert answer(capsys, server, "adapter", "move", "cli-test", "2", "--expected", "1")["current"]
    said(capsys, server, "adapter", "move", "cli-test", "1", "--expected", "1", code=1)
    assert {row["model"]: row["path"] for row in answer(capsys, server, "adapter", "list")}["cli-test@2"] == paths[1]
    out, _ = said(capsys, server, "adapter", "show", "cli-test")
    assert "cli-test@1" in out and "first try" in out
    assert answer(capsys, server, "adapter", "show", "cli-test@1")["path"] == paths[0]
    _, err = said(capsys, server, "checkpoint", "delete", paths[1], "--yes", code=1)
    assert "everlearn adapter delete" in err
    said(capsys, server, "adapter", "delete", "cli-test", code=2)
    said(capsys, server, "adapter", "delete", "cli-test", "--yes")
    said(capsys, server, "adapter", "show", "cli-test", code=4)


def test_chat_says_one_message(server, named, capsys):
    settings = ("--set", "temperature", "0", "--set", "max_tokens", "8", "--set", "ignore_eos", "true")
    first, err = said(capsys, server, "chat", named, "-m", "what is the capital of france?", *settings)
    assert first.strip() and "[talk@1: 8 tokens" in err and "rec_" in err
    again, _ = said(capsys, server, "chat", "talk@1", "-m", "what is the capital of france?", *settings)
    assert again == first
    other, err = said(capsys, server, "chat", "talk@2", "-m", "what is the capital of france?", *settings)
    assert other != first and "[talk@2: 8 tokens" in err
    base, err = said(capsys, server, "chat", "-m", "what is the capital of france?", *settings)
    assert "[tiny: 8 tokens" in err
    assert base == first, "a fresh adapter changes nothing"


def test_a_conversation_has_defaults_of_its_own(server, named, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/set top_p 0.5\n/set max_completion_tokens 3\n/set\nhello\n/set top_p\n/set\n"))
    _, err = said(capsys, server, "chat", named)
    shown = [line for line in err.splitlines() if line.startswith("temperature=")]
    assert shown == [
        "temperature=0.2 top_p=0.5 max_completion_tokens=3",
        "temperature=0.2 top_p=0.9 max_completion_tokens=3",
    ]
    record = json.loads(server.get("/v1/records/" + err.partition("rec_")[1] + err.partition("rec_")[2].split("]")[0])[1])
    params = record["content"]["params"]
    assert (params["temperature"], params["top_p"], params["max_completion_tokens"]) == (0.2, 0.5, 3) and "max_tokens" not in params


def test_a_wrong_value_is_not_called_a_fault(server, named, paths, capsys):
    _, err = said(capsys, server, "chat", named, "-m", "hi", "--set", "temperature", "hot", code=2)
    assert "temperature" in err and "everlearn chat --help" in err and "--debug" not in err
    _, err = said(capsys, server, "adapter", "name", "bad name!", paths[0], code=2)
    assert "everlearn adapter --help" in err and "--debug" not in err


def test_a_wrong_name_gets_the_nearest_and_a_wrong_version_those_there_are(server, named, capsys):
    _, err = said(capsys, server, "chat", "tolk", "-m", "hi", code=4)
    assert "there is no model 'tolk'" in err and "did you mean 'talk'?" in err
    _, err = said(capsys, server, "chat", "talk@9", "-m", "hi", code=4)
    assert "there is no model 'talk@9'; talk has versions 2, 1" in err
    _, err = said(capsys, server, "chat", "xyzzy", "-m", "hi", code=4)
    assert "did you mean" not in err and "GET /v1/models" in err


def test_chat_obeys_commands(server, named, capsys, monkeypatch):
    script = [
        "/set max_tokens 4",
        "/set ignore_eos true",
        "/set temperature 0",
        "hello",
        "/adapter talk@2",
        "/logprobs 2",
        "hello again",
        "/adapters",
    ]
    script += ["/system be brief", "hi", "/new", "/quit", "never said"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(script) + "\n"))
    out, err = said(capsys, server, "chat", named)
    assert len(out.splitlines()) >= 3 and "never" not in out
    for part in ("[talk@1: 4 tokens", "talking to talk@2", "[talk@2: 4 tokens", "with 2 alternatives", "* talk@2", "a new conversation"):
        assert part in err or part.lstrip("* ") in err, (part, err)
    scored = [line for line in err.splitlines() if line.endswith("%")]
    assert len(scored) >= 4, err


@pytest.mark.parametrize(
    ("script", "what", "code"),
    [
        ("/adapter nobody", "no model 'nobody'", 4),
        ("/adapter tinny", "did you mean 'tiny'?", 4),
        ("/adapter tinker://nobody:train:0/sampler_weights/x", "nobody", 4),
        ("/dance", "no command /dance", 2),
        ("/logprobs 99", "from 0 to 20", 2),
        ("/set top_k -7\nhi", "top_k", 2),
    ],
)
def test_chat_refuses_in_two_lines(server, capsys, monkeypatch, script, what, code):
    monkeypatch.setattr("sys.stdin", io.StringIO(script + "\n"))
    _, err = said(capsys, server, "chat", code=code)
    assert what in err


def deploy(server: LiveServer, name: str) -> None:
    description = {"base": server.model, "gate": {}}
    httpx.post(f"{server.url}/v1/deployments", json={"name": name, "description": description}).raise_for_status()


def test_a_name_that_is_deployed_on_the_base_model_is_a_model(server, paths, capsys, monkeypatch):
    deploy(server, "untaught")
    models = httpx.get(server.url + "/v1/models").json()["data"]
    roots = {one["id"]: one["root"] for one in models if one["parent"] == server.model}
    assert (roots["untaught"], roots["untaught@0"]) == ("untaught@0", server.model)
    found = httpx.get(server.url + "/v1/models/untaught").json()
    assert (found["id"], found["root"], found["parent"]) == ("untaught", "untaught@0", server.model)
    _, err = said(capsys, server, "chat", "untought", "-m", "hi", code=4)
    assert "did you mean 'untaught'?" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("/set max_tokens 2\n/adapter untaught\nhi\n/adapter untaught@0\n"))
    _, err = said(capsys, server, "chat")
    assert "talking to untaught\n" in err and "[untaught@0: " in err and "talking to untaught@0" in err
    _, err = said(capsys, server, "adapter", "name", "untaught", paths[0])
    assert "everlearn deploy promote untaught --to 1" in err
    _, err = said(capsys, server, "adapter", "name", "untaught", paths[0], "--move", code=1)
    assert "its name follows the deployment's champion" in err


def test_a_name_that_went_back_to_the_base_model_means_no_version(server, paths, capsys):
    answer(capsys, server, "adapter", "name", "back", paths[0])
    deploy(server, "back")

    def told() -> tuple[Any, ...]:
        listed = {row["name"]: row["current"] for row in answer(capsys, server, "adapter", "list")}
        shown = answer(capsys, server, "adapter", "show", "back")
        roots = {one["id"]: one["root"] for one in httpx.get(server.url + "/v1/models").json()["data"]}
        return roots["back"], "back@1" in roots, listed["back"], shown["current"], shown["versions"][0]["current"]

    assert told() == ("back@1", True, True, True, True)
    httpx.post(server.url + "/v1/deployments/back/rollback", json={"number": 0, "reason": "too curt"}).raise_for_status()
    assert told() == ("back@0", False, False, False, False)
    assert not answer(capsys, server, "adapter", "name", "back", paths[0])["current"]


def test_bench_prints_figures(server, named, capsys):
    options = ("--requests", "12", "--concurrency", "4", "--prompt-words", "4:12", "--output-tokens", "6:10", "--shared-words", "8")
    told = answer(capsys, server, "bench", "serve", "tiny", named, *options)
    assert told["requests"] == {"sent": 12, "ok": 12, "errors": {}}
    assert 72 <= told["tokens"]["output"] <= 120 and told["tokens"]["prompt"] > 0
    for name in ("ttft_seconds", "tpot_seconds", "request_seconds"):
        assert 0 < told[name]["p50"] <= told[name]["p99"] <= told[name]["max"]
    assert 0 <= told["goodput"]["share"] <= 1 and told["throughput"]["output_tokens_per_second"] > 0
    out, _ = said(capsys, server, "bench", "serve", *options, "--rate", "50", "--no-stream")
    assert "12 of 12 answered" in out and "time to first token" not in out
    told = answer(capsys, server, "bench", "serve", "tiny", "--requests", "2", "--ttft", "0")
    assert told["goodput"]["share"] == 0


def test_a_bench_without_an_answer_fails_and_says_why(server, capsys):
    _, err = said(capsys, server, "bench", "serve", "--output-tokens", "0", code=2)
    assert "is no span" in err
    out, _ = said(capsys, server, "bench", "serve", "nobody", "--requests", "3", code=1)
    assert "0 of 3 answered" in out and "3 404 " in out


def test_usage_is_summed_and_written_as_csv(server, named, capsys):
    said(capsys, server, "bench", "serve", named, "--requests", "3", "--output-tokens", "5")
    recorded = answer(capsys, server, "usage", "--by", "model")
    mine = next(row for row in recorded if row["model"] == "talk@1")
    assert mine["requests"] >= 3 and mine["tokens_out"] >= 15 and "day" not in mine
    out, _ = said(capsys, server, "usage", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {"day", "key_id", "model", "kind", "requests", "tokens_in", "tokens_out", "seconds"} <= set(rows[0])
    assert {row["kind"] for row in rows} >= {"chat.completions", "forward_backward"}
    said(capsys, server, "usage", "--since", "yesterday", code=2)


def test_a_load_is_the_same_for_the_same_seed():
    spec = load.Load(models=("a", "b"), requests=20, concurrency=2, prompt_words=(1, 30), output_tokens=(1, 99), shared_words=5, seed=3)
    assert list(load.bodies(spec)) == list(load.bodies(spec))
    made = list(load.bodies(spec))
    assert {body["model"] for body in made} == {"a", "b"}
    assert len({" ".join(body["messages"][0]["content"].split()[:5]) for body in made}) == 1
    assert len({body["seed"] for body in made}) == 20


def test_figures_of_a_load():
    spec = load.Load(models=("a",), requests=4, concurrency=1)
    fast = load.Seen("a", 0.0, 200, first=0.1, seconds=1.1, tokens=11, prompt_tokens=5)
    slow = load.Seen("a", 0.0, 200, first=3.0, seconds=4.0, tokens=11, prompt_tokens=5)
    limp = load.Seen("a", 0.0, 200, first=0.1, seconds=10.1, tokens=11, prompt_tokens=5)
    lost = load.Seen("a", 0.0, 429, error="rate_limited")
    told = load.report(spec, [fast, slow, limp, lost], 10.0, ttft=2.0, tpot=0.2)
    assert told["goodput"]["share"] == 0.25 and told["goodput"]["requests_per_second"] == 0.1
    assert told["requests"] == {"sent": 4, "ok": 3, "errors": {"429 rate_limited": 1}}
    assert told["throughput"] == {"requests_per_second": 0.3, "output_tokens_per_second": 3.3, "total_tokens_per_second": 4.8}
    assert told["ttft_seconds"]["p50"] == 0.1 and told["ttft_seconds"]["max"] == 3.0
    assert told["tpot_seconds"]["p99"] == 1.0
