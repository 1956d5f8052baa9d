"""Geometry, seeds and answers of the click environment, then whole groups on a real server with a model that sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tinker import types
from tokenizers import Tokenizer

from everlearn.errors import InvalidRequest
from everlearn.rl.advantages import advantages_of
from everlearn.rl.datums import datums_of
from everlearn.rl.envs.click import RANGE, ClickEnv, ClickRewards, ClickTasks, parse, point_at
from everlearn.rl.envs.forms import NAMES, Form, Widget, make_form
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.prompts import ChatMl
from everlearn.rl.records import record_of
from everlearn.rl.rollouts import count, play_batch
from everlearn.rl.trajectory import Action, Trajectory, TrajectoryGroup, Transition
from tests.live import KEY, LiveServer, start_server
from tests.tiny_vision import MERGE, PATCH, make_tiny_vision_model

SIDE = PATCH * MERGE
BUTTON = Widget("button", "Save", (20.0, 10.0, 60.0, 30.0))
FORM = Form(200, 100, (BUTTON,), b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("models") / "tiny-vl")


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatMl:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)


@pytest.fixture
def env(chat: ChatMl) -> ClickEnv:
    return ClickEnv(FORM, BUTTON, chat, side=20, rewards=ClickRewards(near=0.5))


# ---- geometry ----


@pytest.mark.parametrize(
    ("answer", "hit"),
    [
        ("100,100", 1),
        ("300,300", 1),
        ("99,200", 0),
        ("301,200", 0),
        ("200,99", 0),
        ("200,301", 0),
        ("200,200", 1),
        ("1000,1000", 0),
        ("0,0", 0),
    ],
)
def test_edges_belong_to_the_target(env: ClickEnv, answer: str, hit: int):
    """The box goes from 20 to 60 of 200 pixels and from 10 to 30 of 100: 100 to 300 both ways."""
    reward, metrics = env.score(answer)
    assert metrics["hit"] == reward.values["hit"] == hit and reward.values["parsed"] == 0.0
    assert ("hits Save" in reward.parts[1].reason) == bool(hit)


def test_nearer_is_worth_more_until_it_hits(env: ClickEnv):
    worth = [env.score(f"{x},200")[0].values["near"] for x in (1000, 700, 400, 301, 300, 200)]
    assert worth == sorted(worth) and worth[-2:] == [0.5, 0.5] and worth[0] > 0
    reward, metrics = env.score("800,200")
    assert metrics["distance"] == pytest.approx(100 / (200**2 + 100**2) ** 0.5)
    assert reward.total == pytest.approx(0.5 * (1 - metrics["distance"])), "a miss earns what its nearness is worth"


@given(st.integers(0, RANGE), st.integers(0, RANGE))
def test_a_point_hits_where_it_lies_in_the_box(x: int, y: int):
    inside = 20 <= x * 200 / RANGE <= 60 and 10 <= y * 100 / RANGE <= 30
    assert (BUTTON.distance(x * 200 / RANGE, y * 100 / RANGE) == 0.0) == inside


# ---- answers ----


@pytest.mark.parametrize("answer", ["12,34", " 12 , 34\n", "(12,34)", "012,0034"])
def test_answers_that_name_a_point(answer: str):
    assert parse(answer) == (12, 34)


BAD = [
    "",
    "12",
    "12,",
    ",34",
    "12 34",
    "1001,5",
    "5,1001",
    "-1,5",
    "1.5,2",
    "12,34,56",
    "at 12,34",
    "12,34.",
    "99999,1",
    "١٢,٣٤",
    "nan,nan",
]


@pytest.mark.parametrize("answer", BAD)
def test_answers_that_name_none_earn_less_than_a_miss(env: ClickEnv, answer: str):
    assert parse(answer) is None
    reward, metrics = env.score(answer)
    assert reward.values == {"parsed": -0.1, "hit": 0.0, "near": 0.0} and metrics == {"parsed": 0.0, "hit": 0.0}
    assert reward.total < env.score("1000,1000")[0].total


@given(st.text(max_size=40))
def test_no_answer_breaks_the_environment(text: str):
    env = ClickEnv(FORM, BUTTON, ChatMl(lambda _: [], lambda _: ""), side=20)
    assert -0.1 <= env.score(text)[0].check().total <= 1.0


# ---- forms ----


@pytest.mark.parametrize("size", [(448, 320), (128, 128), (960, 640), (96, 640)])
def test_forms_follow_from_their_seed_and_hold_what_they_say(size: tuple[int, int]):
    seen = set()
    for seed in range(30):
        form = make_form(seed, *size)
        assert form == make_form(seed, *size)
        seen.add(form.png)
        with Image.open(BytesIO(form.png)) as picture:
            assert picture.size == size and len(picture.getcolors(1 << 20)) > 4
        names = [widget.name for widget in form.widgets]
        assert len(names) >= 2 and len(set(names)) == len(names)
        for widget in form.widgets:
            left, top, right, bottom = widget.box
            assert widget.name in NAMES[widget.kind] and 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            others = [other for other in form.widgets if other is not widget]
            assert all(other.distance((left + right) / 2, (top + bottom) / 2) > 0 for other in others), "the middle of one is in another"
    assert len(seen) == 30


def test_a_form_without_room_is_refused(chat: ChatMl):
    with pytest.raises(InvalidRequest, match="no room"):
        make_form(0, 64, 20)
    with pytest.raises(InvalidRequest, match="no room"):
        ClickTasks(chat, columns=1, rows=1, side=16)
    with pytest.raises(InvalidRequest, match="multiples"):
        ClickEnv(FORM, BUTTON, chat, side=32)


def test_tasks_are_the_same_by_number_and_others_by_split_and_seed(chat: ChatMl):
    def tasks(**options) -> list[tuple[Form, Widget]]:
        data = ClickTasks(chat, columns=8, rows=8, side=16, groups_per_batch=4, **options)
        return [data.task(number) for number in range(8)]

    assert tasks() == tasks()
    pictures = [{form.png for form, _ in tasks(**options)} for options in ({}, {"split": "test"}, {"seed": 1})]
    assert [len(pngs) for pngs in pictures] == [8, 8, 8] and len(set.union(*pictures)) == 24
    data = ClickTasks(chat, columns=8, rows=8, side=16, batches=3)
    assert len(data) == 3 and len(data.get_batch(2)) == 8
    with pytest.raises(InvalidRequest, match="from 0 to 2"):
        data.get_batch(3)
    for form, target in tasks():
        point = parse(point_at(form, target))
        assert target.distance(point[0] * form.width / RANGE, point[1] * form.height / RANGE) == 0.0


def test_an_environment_is_used_once(env: ClickEnv):
    asyncio.run(env.initial_observation())
    with pytest.raises(InvalidRequest, match="used once"):
        asyncio.run(env.initial_observation())


# ---- a model that sees ----


@pytest.fixture(scope="module")
def seeing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start_server(tmp_path_factory.mktemp("home"), folder)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def training(seeing: LiveServer) -> Iterator[tinker.TrainingClient]:
    service = tinker.ServiceClient(base_url=seeing.url, api_key=KEY)
    yield service.create_lora_training_client(seeing.model, rank=16, seed=1).result()
    service.close("success").result()


TASKS = 4


@pytest.fixture(scope="module")
def tasks(chat: ChatMl) -> ClickTasks:
    """Four forms only, so that a model of random weights can learn what they look like."""
    return ClickTasks(chat, columns=8, rows=8, side=SIDE, groups_per_batch=TASKS, group_size=8, batches=1)


def demonstration(tasks: ClickTasks, number: int, answer: str) -> types.Datum:
    """What the environment shows, with an answer that is given."""
    form, target = tasks.task(number)
    prompt, _ = asyncio.run(ClickEnv(form, target, tasks.chat, tasks.side).initial_observation())
    said = tasks.chat.encode(f"{answer}<|im_end|>")
    (datum,) = datums_of(Trajectory([Transition(prompt, Action(said, [-1.0] * len(said)))]), [1.0])
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": datum.loss_fn_inputs["advantages"]}
    return types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


@pytest.fixture(scope="module")
def warm(training: tinker.TrainingClient, tasks: ClickTasks) -> tinker.TrainingClient:
    """A policy that answers with some widget's middle: it knows how to answer, not what was asked for."""
    data = []
    for number in range(TASKS):
        form = tasks.task(number)[0]
        data += [demonstration(tasks, number, point_at(form, widget)) for widget in form.widgets]
    for _ in range(40):
        training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return training


def play(training: tinker.TrainingClient, tasks: ClickTasks, seed: int) -> list[TrajectoryGroup]:
    sampler = training.save_weights_and_get_sampling_client().result()
    return asyncio.run(play_batch(tasks.get_batch(0), TinkerPolicy(sampler, max_tokens=10), seed=seed))


def hits(groups: list[TrajectoryGroup]) -> float:
    return mean(one.transitions[-1].metrics["hit"] for group in groups for one in group.trajectories_G)


def test_a_group_is_played_and_trained_on(warm: tinker.TrainingClient, tasks: ClickTasks):
    groups = play(warm, tasks, seed=0)
    assert count(groups) == {"episodes": 32, "failed": 0, "groups_failed": 0}
    shown = record_of(groups[0], tasks.chat.decode)["members"][0]["turns"][0]
    assert [part["type"] for part in shown["prompt"]] == ["text", "image", "text"] and shown["prompt"][1]["num_tokens"] == 64
    assert shown["logs"]["target"].split()[0] in NAMES
    before = hits(groups)
    assert 0 < before < 1, "some hit, some miss"

    rates = []
    for step in range(12):
        data = [
            datum
            for group in groups
            for one, advantages in zip(group.trajectories_G, advantages_of(group), strict=True)
            if advantages
            for datum in datums_of(one, advantages)
        ]
        output = warm.forward_backward(data, "importance_sampling")
        warm.optim_step(types.AdamParams(learning_rate=3e-3)).result()
        for datum, result in zip(data, output.result().loss_fn_outputs, strict=True):
            recorded = datum.loss_fn_inputs["logprobs"].to_numpy()
            assert np.abs(result["logprobs"].to_numpy() - recorded)[recorded != 0].max() < 1e-4, "trainer and sampler agree, images and all"
        groups = play(warm, tasks, seed=1 + step)
        rates.append(hits(groups))
    assert mean(rates[-4:]) > before + 0.2, rates
