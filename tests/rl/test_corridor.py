from __future__ import annotations

import asyncio

import pytest

from everlearn.errors import InvalidRequest
from everlearn.rl.env import StepResult
from everlearn.rl.envs.corridor import HANDLES, SIGNS, CorridorEnv, CorridorTasks, house_of
from everlearn.rl.prompts import ChatMl


def chat() -> ChatMl:
    return ChatMl(lambda text: [ord(letter) for letter in text], lambda ids: "".join(map(chr, ids)))


def walk(env: CorridorEnv, answers: list[str]) -> list[StepResult]:
    async def play() -> list[StepResult]:
        await env.initial_observation()
        return [await env.step([ord(letter) for letter in answer]) for answer in answers]

    return asyncio.run(play())


def test_one_reward_at_the_exit_pays_for_all_doors():
    house = {"sun": "b", "moon": "c"}
    env = CorridorEnv(["sun", "moon", "sun", "moon"], [0, 3, 1, 0], house, chat())
    *before, last = walk(env, ["b", " C.<|im_end|>", "cat", "a"])
    assert [(result.reward, result.episode_done, dict(result.metrics)) for result in before] == [(0.0, False, {})] * 3
    assert last.episode_done and last.reward.values == {"right": 2.0, "floor": 4.0, "toll": -6.0} and last.metrics == {"right": 0.5}
    assert "2 of 4" in last.reward.parts[0].reason


def test_each_prompt_goes_on_from_the_last():
    env = CorridorEnv(["sun", "moon"], [2, 0], {"sun": "b", "moon": "c"}, chat())
    first, _ = asyncio.run(env.initial_observation())
    text = chat().decode(first.to_ints())
    assert text.endswith("Door 1 shows: sun. 2 coins lie on the floor. Which handle?<|im_end|>\n<|im_start|>assistant\n")
    second = asyncio.run(env.step([ord("b")])).next_observation.to_ints()
    assert second[: first.length] == first.to_ints() and "Door 2 shows: moon. 0 coins" in chat().decode(second)
    assert "floor" not in chat().decode(asyncio.run(CorridorEnv(["sun"], [], {}, chat()).initial_observation())[0].to_ints())


def test_tasks_are_the_same_by_number_and_luck_differs_between_members():
    data = CorridorTasks(chat(), seed=3, luck=True, batches=2, groups_per_batch=3, group_size=4)
    assert len(data) == 2 and len(data.get_batch(1)) == 3
    first, again = data.get_batch(1)[2], CorridorTasks(chat(), seed=3, luck=True, group_size=4).group(5)
    assert (first.signs, first.floors) == (again.signs, again.floors) and len({tuple(floor) for floor in first.floors}) > 1
    envs = asyncio.run(first.make_envs())
    assert len(envs) == 4 and {tuple(env.signs) for env in envs} == {tuple(first.signs)}
    assert CorridorTasks(chat(), seed=3, split="test").group(5).signs != first.signs
    assert not any(CorridorTasks(chat()).group(0).floors)
    assert {sign for number in range(20) for sign in CorridorTasks(chat(), signs=2).group(number).signs} == set(SIGNS[:2])


def test_every_house_has_its_own_secret():
    houses = [house_of(seed) for seed in range(6)]
    assert all(set(house) == set(SIGNS) and set(house.values()) == set(HANDLES) for house in houses)
    assert len({tuple(house.items()) for house in houses}) > 3 and houses[0] == house_of(0)


@pytest.mark.parametrize(
    "wrong", [{"doors": 0}, {"group_size": 0}, {"batches": 0}, {"groups_per_batch": 0}, {"signs": 9}, {"split": "dev"}]
)
def test_tasks_that_cannot_be_meant(wrong: dict[str, object]):
    with pytest.raises(InvalidRequest):
        CorridorTasks(chat(), **wrong)  # type: ignore[arg-type]
