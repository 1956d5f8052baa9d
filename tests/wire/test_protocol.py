"""What the SDK relies on without saying so: order by number, answers that repeat, polls that are held, sizes announced first."""

from __future__ import annotations

import time

import pytest
import zstandard

from tests.live import LiveServer
from tests.wire.raw import PROTO, Raw, batch, sample


@pytest.fixture(scope="module")
def raw(server: LiveServer) -> Raw:
    return Raw(server.url, server.model)


def test_flags_are_served_to_clients_of_any_age(raw: Raw) -> None:
    assert raw.ok("/client/config", sdk_version="0.38.0")["custom_loss_server_side"] is False
    assert raw.ok("/client/dynamic_config", sdk_version="0.38.0")["sample_cancel_enabled"] is True
    assert raw.http.get("/healthz").json() == {"status": "ok"}
    assert raw.post("/create_custom_loss").status_code == 400 and raw.post("/auth/token").status_code == 400


def test_zstd_bodies_are_read(raw: Raw) -> None:
    run = raw.create(0)
    body = zstandard.ZstdCompressor().compress(batch(run, 1).SerializeToString())
    reply = raw.forward_backward(body, **{"content-encoding": "zstd"})
    assert raw.result(reply.json()["request_id"])["metrics"]["loss:sum"] > 0


def test_requests_run_by_number_not_by_arrival(raw: Raw) -> None:
    """Numbers 3, 2, 1: the step at 2 must fall between, and until 1 comes the others say what they wait for."""
    run = raw.create(1)
    third = raw.forward_backward(batch(run, 3, forward_only=True).SerializeToString()).json()["request_id"]
    second = raw.ok("/optim_step", model_id=run, seq_id=2, adam_params={"learning_rate": 0.05})["request_id"]
    first = raw.forward_backward(batch(run, 1).SerializeToString()).json()["request_id"]
    before, after = raw.result(first)["metrics"]["loss:sum"], raw.result(third)["metrics"]["loss:sum"]
    assert after < before and raw.result(second)["metrics"]["grad_norm:mean"] > 0


def test_what_is_sent_again_has_no_second_effect(raw: Raw) -> None:
    run = raw.create(2)
    body = batch(run, 1).SerializeToString()
    answers = [raw.forward_backward(body).json() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert raw.create(2) == run
    step = [raw.ok("/optim_step", model_id=run, seq_id=2, adam_params={"learning_rate": 0.01}) for _ in range(2)]
    assert step[0] == step[1] and raw.result(step[0]["request_id"]) == raw.result(step[0]["request_id"])
    save = [raw.ok("/save_weights_for_sampler", model_id=run, seq_id=3, sampling_session_seq_id=70) for _ in range(2)]
    assert save[0] == save[1]
    # the SDK draws another number for each try
    assert raw.ok("/save_weights_for_sampler", model_id=run, seq_id=3, sampling_session_seq_id=71) == save[0]
    assert raw.result(save[0]["request_id"])["sampling_session_id"] == f"{raw.session}:sample:70"
    asked = [raw.ok("/asample", **sample(f"{raw.session}:sample:70", 0)) for _ in range(2)]
    assert asked[0] == asked[1] and len(asked[0]["sample_sequence_ids"]) == 1
    sessions = [raw.http.post("/create_session", json={"sdk_version": "1"}, headers={"x-idempotency-key": "k1"}).json() for _ in range(2)]
    assert sessions[0] == sessions[1]


def test_a_refused_form_leaves_no_hole(raw: Raw) -> None:
    run = raw.create(3)
    assert raw.post("/optim_step", model_id=run, seq_id=1, adam_params={"momentum": 1.0}).status_code == 400
    assert raw.post("/save_weights", model_id=run, seq_id=2, path=5).status_code == 400
    assert raw.post("/load_weights", model_id=run, seq_id=3, path="tinker://x/weights/y", optimizer=False).status_code == 404
    reply = raw.forward_backward(batch(run, 4).SerializeToString())
    assert raw.result(reply.json()["request_id"])["metrics"]["loss:sum"] > 0
    assert raw.result(f"{run}:1")["category"] == "user"


def test_an_accepted_request_stays_accepted(raw: Raw) -> None:
    """The answer was lost, and what the request needs has gone since: sent again, it gets the answer that it had."""
    run = raw.create(4)
    path = raw.result(raw.ok("/save_weights", model_id=run, seq_id=1, path="short-lived")["request_id"])["path"]
    load = {"model_id": run, "seq_id": 2, "path": path, "optimizer": False}
    anew = {"session_id": raw.session, "model_seq_id": 5, "path": path, "optimizer": False}
    first, born = raw.ok("/load_weights", **load), raw.ok("/load_weights", **anew)
    raw.result(first["request_id"])
    raw.result(born["request_id"])
    assert raw.http.delete(f"/training_runs/{run}/checkpoints/weights/short-lived").status_code < 300
    assert raw.ok("/load_weights", **load) == first
    assert raw.ok("/load_weights", **anew) == born
    assert raw.post("/load_weights", **load | {"seq_id": 3}).status_code == 404
    assert raw.post("/load_weights", **anew | {"model_seq_id": 6}).status_code == 404
    assert raw.result(raw.ok("/optim_step", model_id=run, seq_id=4, adam_params={})["request_id"])["type"] == "optim_step"


def test_a_refused_request_stays_refused(raw: Raw) -> None:
    """What it lacked is there when it comes again; but the run has gone on without it, as its client was told."""
    run = raw.create(7)
    load = {"model_id": run, "seq_id": 1, "path": f"tinker://{run}/weights/later", "optimizer": False}
    assert raw.post("/load_weights", **load).status_code == 404
    raw.result(raw.ok("/save_weights", model_id=run, seq_id=2, path="later")["request_id"])
    again = raw.post("/load_weights", **load)
    assert again.status_code == 404 and "no checkpoint" in again.json()["detail"]
    assert raw.ok("/load_weights", **load | {"seq_id": 3})["request_id"] == f"{run}:3"


def test_an_unfinished_poll_is_held_and_says_why(new_server) -> None:
    live = new_server(**{"api.long_poll_seconds": 1.5})
    raw = Raw(live.url, live.model)
    run = raw.create(0)
    waiting = raw.ok("/optim_step", model_id=run, seq_id=2, adam_params={})["request_id"]
    started = time.monotonic()
    answer = raw.poll(waiting).json()
    assert time.monotonic() - started > 1.2
    assert (answer["type"], answer["queue_state"]) == ("try_again", "active") and "waits for request 1" in answer["queue_state_reason"]
    started = time.monotonic()
    reply = raw.ok("/asample", **sample(raw.sampler(), 0, params={"max_tokens": 2}))
    assert raw.result(reply["request_id"])["sequences"] and time.monotonic() - started < 10


def test_large_results_are_announced_before_they_are_sent(raw: Raw) -> None:
    sampler = raw.sampler(10)
    body = sample(sampler, 0, tokens=[1] * 1000, topk_prompt_logprobs=200, prompt_logprobs=True)
    request_id = raw.ok("/asample", **body)["request_id"]
    raw.result(request_id)
    announced = raw.poll(request_id, proto=True, allow_metadata_only=True).json()
    whole = raw.poll(request_id, proto=True, allow_metadata_only=False)
    assert announced == {"status": "complete_metadata", "response_payload_size": len(whole.content)} and len(whole.content) > 2**20
    assert whole.headers["content-type"] == PROTO


def test_every_token_that_is_allowed_is_drawn(raw: Raw) -> None:
    """The door and the engine have one rule: the last drawn token needs no place in the context of 1024."""
    sampler = raw.sampler(14)
    body = sample(sampler, 0, tokens=[1] * 1020, params={"max_tokens": 5, "stop": []})
    (sequence,) = raw.result(raw.ok("/asample", **body)["request_id"])["sequences"]
    assert len(sequence["tokens"]) == 5
    refusal = raw.post("/asample", **sample(sampler, 1, tokens=[1] * 1020, params={"max_tokens": 6}))
    assert refusal.status_code == 400 and "room for 1..5" in refusal.json()["detail"]


def test_sampling_numbers_need_all_64_bits(raw: Raw) -> None:
    sampler = raw.sampler(11)
    seq = 1_000_000_000 * 999_999_999 + 1
    ids = {raw.ok("/asample", **sample(sampler, n))["request_id"] for n in (seq, seq + 1)}
    assert len(ids) == 2 and all(raw.result(request_id)["sequences"] for request_id in ids)


def test_one_poll_for_a_whole_sampling_session(raw: Raw) -> None:
    sampler = raw.sampler(12)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    wanted = {raw.ok("/asample", **sample(sampler, n))["request_id"] for n in range(3)}
    raw.ok("/asample", **sample(sampler, 5_000_000_000))
    seen: set[str] = set()
    cursor = 0
    while seen != wanted:
        reply = raw.ok("/retrieve_futures", target=target, prev_cursor=cursor)
        assert reply["cursor"] >= cursor and all(item["state"] == "finished" for item in reply["completions"])
        seen |= {item["request_id"] for item in reply["completions"]}
        cursor = reply["cursor"]
    started = time.monotonic()
    assert raw.ok("/retrieve_futures", target=target, prev_cursor=cursor, timeout=0)["completions"] == []
    assert time.monotonic() - started < 5
    joined = [raw.ok("/join_sampling_session", sampling_session_id=sampler)["client_counter"] for _ in range(2)]
    assert joined == [1, 2]


def test_a_cancelled_sample_fails_and_others_go_on(raw: Raw) -> None:
    sampler = raw.sampler(13)
    long = raw.ok("/asample", **sample(sampler, 0, num_samples=8, params={"max_tokens": 900, "stop": []}))["request_id"]
    assert raw.post("/cancel_future", request_id=long).status_code == 204
    assert "cancel" in raw.result(long)["error"]
    assert raw.result(raw.ok("/asample", **sample(sampler, 1))["request_id"])["sequences"]


def test_heartbeats_end_with_the_session(raw: Raw) -> None:
    session = raw.ok("/create_session", sdk_version="0.38.0")["session_id"]
    assert raw.ok("/session_heartbeat", session_id=session) == {"type": "session_heartbeat"}
    assert raw.post(f"/sessions/{session}/finish", reason={"type": "success"}).status_code == 204
    assert raw.post("/session_heartbeat", session_id=session).status_code == 410


def test_telemetry_is_kept_and_thanked_for(raw: Raw) -> None:
    body = {
        "events": [{"event": "SESSION_START"}],
        "platform": "Linux",
        "sdk_version": "0.38.0",
        "session_id": raw.session,
        "process_uuid": "x",
    }
    assert raw.ok("/telemetry", **body) == {"status": "accepted"}


def test_an_unloaded_run_takes_no_requests_and_keeps_its_checkpoints(raw: Raw) -> None:
    run = raw.create(20)
    path = raw.result(raw.ok("/save_weights", model_id=run, seq_id=1, path="kept")["request_id"])["path"]
    future = raw.ok("/unload_model", model_id=run)["request_id"]
    assert raw.result(future) == {"type": "unload_model", "model_id": run}
    assert raw.forward_backward(batch(run, 2).SerializeToString()).status_code == 400
    assert raw.ok("/weights_info", tinker_path=path)["lora_rank"] == 2
