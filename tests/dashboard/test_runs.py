"""Runs and rollouts: what a client trains by the SDK, and what a loop tells of its steps, as a browser shows it."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from everlearn.rl.server_sink import ServerSink
from everlearn.rl.settings import Settings
from everlearn.rl.sinks import Sinks
from everlearn.rl.train import train
from tests.dashboard.conftest import aside
from tests.dashboard.test_frame import ask, expect
from tests.live import KEY, LiveServer, start_server
from tests.rl.run_first import Starts


@pytest.fixture(scope="module")
def service(dashboard: LiveServer) -> Iterator[tinker.ServiceClient]:
    client = aside(lambda: tinker.ServiceClient(base_url=dashboard.url, api_key=KEY))
    yield client
    aside(lambda: client.close("success").result())


def datum() -> types.Datum:
    inputs = {"target_tokens": [5, 6, 7, 8], "weights": [1.0] * 4}
    return types.Datum(model_input=types.ModelInput.from_ints([4, 5, 6, 7]), loss_fn_inputs=inputs)


def step(client: tinker.TrainingClient, parts: int = 1) -> list[float]:
    """One optimizer step of the gradients of `parts` requests; their losses."""

    def act() -> list[float]:
        sent = [client.forward_backward([datum()], "cross_entropy") for _ in range(parts)]
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        return [one.result().metrics["loss:sum"] for one in sent]

    return aside(act)


@pytest.fixture(scope="module")
def trained(service: tinker.ServiceClient) -> tuple[tinker.TrainingClient, list[list[float]]]:
    client = aside(lambda: service.create_lora_training_client("tiny", rank=4, seed=1).result())
    losses = [step(client), step(client, parts=2), step(client)]
    aside(lambda: client.forward([datum()], "cross_entropy").result())  # is no step
    aside(lambda: client.save_state("one").result())
    return client, losses


@pytest.fixture(scope="module")
def played(service: tinker.ServiceClient, dashboard: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of reinforcement learning that told the server of its steps."""
    folder = tmp_path_factory.mktemp("played")
    settings = Settings("tiny", steps=3, rank=4, learning_rate=1e-2, max_tokens=3, seed=5)
    with Sinks([ServerSink(folder, dashboard.url)]) as sinks:
        aside(lambda: train(service, settings, Starts(30, 2, 4), folder, on_step=sinks))
        assert sinks.names == ["ServerSink"]
    return json.loads((folder / "run.json").read_text())["run_id"], folder


def twin(server: LiveServer, path: str) -> Any:
    status, body = server.get(path)
    assert status == 200, body
    return json.loads(body)


def test_curves_come_from_the_log_by_optimizer_step(dashboard: LiveServer, trained: Any) -> None:
    client, losses = trained
    shown = twin(dashboard, f"/dashboard/runs/{client.model_id}.json")
    assert shown["curves"]["log"]["x"] == [1, 2, 3] and shown["curves"]["client"]["x"] == []
    assert shown["curves"]["log"]["series"]["loss:sum"] == pytest.approx([sum(parts) for parts in losses], rel=1e-6)
    assert shown["curves"]["log"]["series"]["learning_rate"] == [0.01] * 3
    assert shown["config"]["losses"] == "cross_entropy" and shown["config"]["lora.rank"] == 4
    assert [one["tinker_path"] for one in shown["checkpoints"]] == [f"tinker://{client.model_id}/weights/one"]
    rows = twin(dashboard, f"/v1/runs/{client.model_id}/steps?source=log")["data"]
    assert "".join(row["kind"][0] for row in rows) == "fo" + "ffo" + "fo"


def test_a_run_s_page_draws_its_curves_while_it_trains(dashboard: LiveServer, trained: Any, page: Any) -> None:
    client, losses = trained
    page.goto("/dashboard/runs")
    page.get_by_role("link", name=client.model_id).click()
    chart = page.locator("#curves figure[data-metric='loss:sum']")
    expect(chart.locator("canvas")).to_be_visible()
    curves = page.locator("#curves")
    before = int(curves.get_attribute("data-points") or 0)
    assert before >= 3
    painted = chart.locator("canvas").evaluate("c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 4")
    assert painted, "the canvas isn't empty"
    losses.append(step(client))
    expect(curves).to_have_attribute("data-points", str(before + 1))
    page.get_by_text("Choose curves").click()
    for box in page.get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("value") == "learning_rate")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_url("**?show=learning_rate")
    expect(page.locator("#curves figure")).to_have_count(1)
    page.get_by_role("button", name="Light or dark").click()
    expect(page.locator("#curves figure canvas")).to_be_visible()


def test_pages_that_were_opened_empty_come_alive(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, open_page: Callable[..., Any]
) -> None:
    server = start_server(tmp_path_factory.mktemp("empty"), tiny_model)
    try:
        page = open_page(server, "/dashboard/runs")
        expect(page.get_by_text("No training run yet")).to_be_visible()
        assert page.get_by_label("Run A").count() == 0
        service = aside(lambda: tinker.ServiceClient(base_url=server.url, api_key=KEY))
        client = aside(lambda: service.create_lora_training_client("tiny", rank=4, seed=1).result())
        link = page.get_by_role("link", name=client.model_id)
        expect(link).to_be_visible()
        expect(page.get_by_label("Run A")).to_be_visible()
        expect(page.get_by_text("No training run yet")).to_have_count(0)
        link.click()
        expect(page.get_by_text("No step yet")).to_be_visible()
        step(client)
        expect(page.locator("#curves figure[data-metric='loss:sum'] canvas")).to_be_visible()
        expect(page.get_by_text("No step yet")).to_have_count(0)
        page.get_by_text("Choose curves").click()
        assert post_to(server, f"{client.model_id}/steps", {"steps": [{"step": 1, "metrics": {"entropy": 0.5, "own": 2}}]}) == 204
        expect(page.locator("#curves figure[data-metric='entropy'] canvas")).to_be_visible()
        expect(page.get_by_role("checkbox", name="entropy")).to_be_checked()
        expect(page.get_by_role("checkbox", name="own")).not_to_be_checked()
        page.get_by_role("checkbox", name="own").check()
        assert post_to(server, f"{client.model_id}/steps", {"steps": [{"step": 2, "metrics": {"kl/k3": 0.5}}]}) == 204
        expect(page.locator("#curves figure[data-metric='kl/k3'] canvas")).to_be_visible()
        expect(page.get_by_role("checkbox", name="own")).to_be_checked()
        aside(lambda: service.close("success").result())
        page.close()  # it would complain of a server that is gone
    finally:
        server.stop()


def test_two_runs_are_compared_by_their_settings(dashboard: LiveServer, service: tinker.ServiceClient, trained: Any, page: Any) -> None:
    other = aside(lambda: service.create_lora_training_client("tiny", rank=8, seed=1, user_metadata={"why": "wider"}).result())
    page.goto("/dashboard/runs")
    page.get_by_label("Run A").fill(trained[0].model_id)
    page.get_by_label("Run B").fill(other.model_id)
    page.keyboard.press("Enter")
    rows = page.locator("tbody tr.selected")
    expect(rows).to_have_count(3)
    assert [row.locator("th").inner_text().split()[0] for row in rows.all()] == ["lora.rank", "losses", "user_metadata.why"]
    assert rows.first.locator("td").all_inner_texts() == ["4", "8"]


def test_a_loop_s_own_steps_are_drawn_and_its_settings_kept(dashboard: LiveServer, played: tuple[str, Path], page: Any) -> None:
    run, folder = played
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = twin(dashboard, f"/dashboard/runs/{run}.json")
    assert shown["curves"]["client"]["x"] == [row["step"] for row in rows]
    assert shown["curves"]["client"]["series"]["reward/total"] == [row.get("reward/total") for row in rows]
    assert shown["config"]["settings.estimator"] == "group_mean" and shown["config"]["settings.max_tokens"] == 3
    page.goto(f"/dashboard/runs/{run}")
    expect(page.locator("#curves figure[data-metric='reward/total'] canvas")).to_be_visible()
    expect(page.get_by_role("link", name="Rollouts").last).to_be_visible()


def test_a_group_is_shown_side_by_side_with_reasons_and_shades(dashboard: LiveServer, played: tuple[str, Path], page: Any) -> None:
    run, folder = played
    recorded = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    page.goto("/dashboard/rollouts")
    page.get_by_role("link", name=run).click()
    expect(page.get_by_text("step 2", exact=True)).to_be_visible()
    page.get_by_role("link", name="step 1").click()
    page.wait_for_url("**step=1*")
    ours = next(row for row in recorded if row["step"] == 1)
    articles = page.get_by_role("article")
    assert articles.count() == len(ours["members"])
    for article, member in zip(articles.all(), ours["members"], strict=True):
        tokens = article.locator(".tokens span")
        assert tokens.count() == len(member["turns"][0]["action"]["tokens"])
        assert str(member["turns"][0]["action"]["tokens"][0]) in (tokens.first.get_attribute("title") or "")
        assert "shade" in (tokens.first.get_attribute("class") or "")
        assert member["reward"]["parts"][0]["name"] in article.inner_text()
    first = articles.first
    first.get_by_text("Raw request and answer").focus()
    page.keyboard.press("Enter")
    expect(first.get_by_text('"stop_reason"')).to_be_visible()
    status, body = dashboard.get(f"/dashboard/rollouts.json?run={urllib.parse.quote(run)}&step=1")
    assert (
        status == 200
        and json.loads(body)["group"]["members"][0]["turns"][0]["drawn"][0]["id"] == ours["members"][0]["turns"][0]["action"]["tokens"][0]
    )
    assert twin(dashboard, f"/v1/runs/{run}/rollouts/1/0")["record"]["members"] == ours["members"]


def post_to(server: LiveServer, path: str, body: Any) -> int:
    return ask(server, f"/v1/runs/{path}", "POST", json.dumps(body).encode(), content_type="application/json")[0]


def test_groups_are_reached_however_many_there_are(dashboard: LiveServer, service: tinker.ServiceClient) -> None:
    run = aside(lambda: service.create_lora_training_client("tiny", rank=4).result()).model_id
    for step, count in ((3, 2), (5, 450), (6, 1)):
        groups = [{"number": number, "record": {"members": []}} for number in range(count)]
        assert post_to(dashboard, f"{run}/rollouts", {"step": step, "groups": groups}) == 204
    place = f"/dashboard/rollouts.json?run={urllib.parse.quote(run)}"
    shown = twin(dashboard, place)
    assert (shown["steps"], shown["step"], shown["before"], shown["after"]) == ([3, 5, 6], 6, 5, None)
    for group, first, before, after in ((0, 0, None, 200), (201, 200, 0, 400), (449, 400, 200, None)):
        shown = twin(dashboard, f"{place}&step=5&group={group}")
        assert shown["group"]["number"] == group and shown["groups"][0]["number"] == first
        assert (shown["groups_before"], shown["groups_after"], shown["before"], shown["after"]) == (before, after, 3, 6)
    status, html = dashboard.get(f"/dashboard/rollouts?run={urllib.parse.quote(run)}&step=5&group=201")
    assert status == 200 and b"group=400" in html
    listed, more = [], "?limit=300"
    while more:
        found = twin(dashboard, f"/v1/runs/{run}/rollouts{more}")
        listed += [one["id"] for one in found["data"]]
        more = f"?limit=300&after={found['last_id']}" if found["has_more"] else ""
    assert listed == ["6/0", *[f"5/{number}" for number in range(450)], "3/0", "3/1"]


def test_a_number_that_no_database_holds_is_refused(dashboard: LiveServer, trained: Any) -> None:
    run, huge = trained[0].model_id, 2**70
    for path in (
        f"/v1/runs/{run}/rollouts/{huge}/0", f"/v1/runs/{run}/rollouts/0/{huge}", f"/v1/runs/{run}/rollouts/0/-1",
        f"/v1/runs/{run}/rollouts?after={huge}/0", f"/v1/runs/{run}/rollouts?after=x", f"/v1/memories/none/turns?after={huge}",
        f"/dashboard/memory/none/turns.json?after={huge}", f"/dashboard/memory/none/turns/{huge}.json",
    ):  # fmt: skip
        assert dashboard.get(path)[0] == 400, path
    assert dashboard.get(f"/v1/memories/none/turns/{huge}")[0] == 404

    def told(token: Any) -> int:
        action = {"tokens": [token], "logprobs": [None], "stop_reason": "stop"}
        turn = {"continues": False, "prompt": [], "action": action, "reward": {"total": 0.0, "parts": []}, "metrics": {}, "logs": {}}
        member = {"failure": None, "reward": None, "turns": [turn]}
        return post_to(dashboard, f"{run}/rollouts", {"step": 1, "groups": [{"number": 0, "record": {"members": [member]}}]})

    assert [told(token) for token in (-3, huge, 2**32 - 1)] == [400, 400, 204]
    assert dashboard.get(f"/dashboard/rollouts.json?run={urllib.parse.quote(run)}&step=1")[0] == 200


def test_what_is_no_step_and_no_group_is_refused(dashboard: LiveServer, trained: Any, open_page: Callable[..., Any]) -> None:
    run = trained[0].model_id

    def post(path: str, body: Any) -> int:
        return post_to(dashboard, path, body)

    assert post(f"{run}/steps", {"steps": [{"step": -1, "metrics": {}}]}) == 400
    assert post(f"{run}/steps", {"steps": [{"step": 1, "metrics": {"x": "high"}}]}) == 400
    assert post("sess-1:train:0/steps", {"steps": []}) == 404
    assert post(f"{run}/rollouts", {"step": 0, "groups": [{"number": 0, "record": {"members": [{"turns": 3}]}}]}) == 400
    assert post(f"{run}/rollouts", {"step": 0, "groups": [{"number": 0, "record": {"members": [], "x": "y" * (2 << 20)}}]}) == 413
    evil = {"kind": "<script>alert(1)</script>", "message": "</pre><img src=x onerror=alert(2)>"}
    member = {"failure": evil, "reward": None, "turns": []}
    assert post(f"{run}/rollouts", {"step": 0, "groups": [{"number": 0, "record": {"members": [member], "tags": ["<b>"]}}]}) == 204
    page = open_page(dashboard, f"/dashboard/rollouts?run={run}&step=0")
    assert "onerror=alert(2)" in page.get_by_role("article").inner_text() and page.locator("article img, article script").count() == 0
    page.complaints.expect("404")
    page.goto(f"/dashboard/rollouts?run={run}&step=77")
    expect(page.get_by_role("alert")).to_contain_text("no rollouts of step 77")
