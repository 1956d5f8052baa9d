"""Agents on a real server: what they said is what is trained on, token by token; what they do wrong; episodes that are interrupted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import tinker
from tokenizers import Tokenizer

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.advantages import advantages_of
from everlearn.rl.agents import AgentEnv, AgentGroup, AgentServer, Chat, agent_metrics
from everlearn.rl.datums import datums_of
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.records import record_of
from everlearn.rl.rollouts import Limits, count, play, play_now
from everlearn.rl.tape import Said
from everlearn.rl.tool_loop import converse
from everlearn.rl.tools import Toolbox, ToolUnavailable
from everlearn.rl.trajectory import Trajectory
from tests.live import KEY, LiveServer

HI: list[Any] = [{"role": "user", "content": "hi, dëjà vu 你好 🙂"}]


@pytest.fixture(scope="module")
def agents(server: LiveServer) -> AgentServer:
    return AgentServer(server.url + "/v1", KEY, server.model)


@pytest.fixture(scope="module")
def trainer(service: tinker.ServiceClient, server: LiveServer) -> tinker.TrainingClient:
    return service.create_lora_training_client(server.model, rank=4).result()


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url + "/v1", headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


async def talks(chat: Chat, turns: int = 3, **fields: Any) -> float:
    """Answers whatever it hears, as an ordinary client does: with the texts of the answers as history."""
    messages = list(HI)
    for turn in range(turns):
        given = {"max_tokens": 12, "stop": ["zzz"], **fields}
        answer = await chat.client.chat.completions.create(model="gpt-of-others", messages=messages, **given)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}, {"role": "user", "content": f"go on {turn}"}]
    return 1.0


def run(agent: Callable[[Chat], Awaitable[Reward | float]], server: AgentServer, seed: int | None = 1, **limits: Any) -> Trajectory:
    return asyncio.run(play(AgentEnv(agent), server, Limits(**{"seconds": 120, **limits}), seed))


def check_tokens(one: Trajectory, scorer: tinker.SamplingClient) -> None:
    """Scores each answer behind its prompt anew. Were a token of either another than the model saw and drew, the scores would differ."""
    for turn in one.transitions:
        whole = tinker.ModelInput.from_ints([*turn.observation.to_ints(), *turn.action.tokens])
        scores = scorer.compute_logprobs(whole).result()[-len(turn.action.tokens) :]
        np.testing.assert_allclose(scores, turn.action.logprobs, atol=2e-3)


# ---- token in, token out ----


def test_what_is_trained_on_is_what_was_drawn_and_not_what_its_text_would_be(
    agents: AgentServer, service: tinker.ServiceClient, server: LiveServer, tokenizer: Tokenizer
):
    one = run(talks, agents)
    assert one.failure is None and len(one.transitions) == 3 and one.reward.total == 1.0
    check_tokens(one, service.create_sampling_client(base_model=server.model).result())

    first, second, _ = one.transitions
    spelled = tokenizer.encode(tokenizer.decode(first.action.tokens), add_special_tokens=False).ids
    assert spelled != first.action.tokens, "a model of random weights writes what no tokenizer would: text has another spelling"
    seen = second.observation.to_ints()
    before = [*first.observation.to_ints(), *first.action.tokens]
    assert seen[: len(before)] != before, "the template has spelled the answer anew, and the model saw that"
    data = datums_of(one, [1.0, 1.0, 1.0])
    assert len(data) == 3 and agent_metrics([one])["agents/continued"] == 0.0
    for datum, turn in zip(data, one.transitions, strict=True):
        prompt, drawn = turn.observation.to_ints(), turn.action.tokens
        assert datum.model_input.to_ints() == [*prompt, *drawn][:-1]
        assert datum.loss_fn_inputs["target_tokens"].tolist()[-len(drawn) :] == drawn
        assert datum.loss_fn_inputs["advantages"].tolist() == [0.0] * (len(prompt) - 1) + [1.0] * len(drawn)


def test_pieces_of_characters_survive(agents: AgentServer, service: tinker.ServiceClient, server: LiveServer, tokenizer: Tokenizer):
    """Tokens that are no text by themselves: a bias draws lone bytes, of which an answer's text shows replacement characters alone."""
    first_byte = tokenizer.encode("你", add_special_tokens=False).ids[0]

    async def bytes_of(chat: Chat) -> float:
        await chat.client.completions.create(
            model="x", prompt=[[20, first_byte], [21, first_byte]], max_tokens=3, extra_body={"structured_outputs": {"regex": "[你-🙂]+"}}
        )
        return 1.0

    one = run(bytes_of, agents)
    assert one.failure is None, one.failure
    assert [turn.observation.to_ints() for turn in one.transitions] == [[20, first_byte], [21, first_byte]]
    assert any("�" in tokenizer.decode([token]) for turn in one.transitions for token in turn.action.tokens)
    check_tokens(one, service.create_sampling_client(base_model=server.model).result())


def lookup(word: str) -> str:
    """Looks a word up."""
    return f"{word} 你好 means\n\n  hello </tool_call>"


def test_calls_that_the_template_writes_anew(agents: AgentServer, service: tinker.ServiceClient, server: LiveServer):
    """The second prompt holds a call as the template writes it, not as it was drawn; the record has what the model saw."""

    async def calls(chat: Chat) -> float:
        talk = await converse(chat, HI, Toolbox([lookup]), turns=3, max_tokens=120, tool_choice="required", parallel_tool_calls=False)
        chat.metrics |= talk.metrics
        return float(talk.calls)

    one = run(calls, agents)
    assert one.failure is None and len(one.transitions) == 3
    check_tokens(one, service.create_sampling_client(base_model=server.model).result())
    record = record_of(play_now([AgentGroup(lambda: calls, 1)], agents, seed=2)[0], str)
    assert json.dumps(record) and "answer" in record["members"][0]["turns"][0]["logs"]


def test_strict_calls_are_valid_even_from_a_model_that_knows_nothing(agents: AgentServer):
    def rate(place: int, stars: bool) -> int:
        return place

    async def calls(chat: Chat) -> float:
        talk = await converse(chat, HI, Toolbox([rate]), turns=2, max_tokens=150, tool_choice="required", parallel_tool_calls=False)
        cut_off = chat.tape.said[-1].answer.count('"length"')
        chat.metrics |= {**talk.metrics, "cut_off": float(cut_off)}
        return 0.0

    (group,) = play_now([AgentGroup(lambda: calls, 4)], agents, seed=3)
    last = [one.transitions[-1].metrics for one in group.trajectories_G]
    assert sum(own["tools/calls"] for own in last) >= 4
    assert all(own["tools/valid"] == 1.0 or own["cut_off"] for own in last), last


# ---- agents as they come ----


def test_the_server_that_plays_has_the_last_word_and_seeds_repeat(agents: AgentServer, http: httpx.Client):
    same = [run(lambda chat: talks(chat, temperature=0.1, seed=7, top_p=0.2), agents, seed=5) for _ in range(2)]
    assert [turn.action.tokens for turn in same[0].transitions] == [turn.action.tokens for turn in same[1].transitions]
    params = http.get(f"/records/{same[0].transitions[0].logs['record']}").json()["content"]["params"]
    assert (params["model"], params["temperature"], params["top_p"]) == (agents.model, 1.0, 1.0) and params["seed"] != 7
    assert run(talks, agents, seed=6).transitions[0].action.tokens != same[0].transitions[0].action.tokens
    greedy = AgentServer(agents.base_url, KEY, agents.model, {"temperature": 0.0})
    assert len({tuple(run(talks, greedy, seed=seed).transitions[0].action.tokens) for seed in range(3)}) == 1


def test_streams_blocking_clients_other_routes_and_several_choices(agents: AgentServer, service: tinker.ServiceClient, server: LiveServer):
    async def streams(chat: Chat) -> float:
        stream = await chat.client.chat.completions.create(model="x", messages=HI, max_tokens=5, stream=True)
        return float(len([chunk async for chunk in stream]) > 0)

    def blocks(chat: Chat) -> float:
        answer = chat.blocking.chat.completions.create(model="x", messages=HI, max_tokens=5, n=2)
        chat.blocking.models.list()
        return float(len(answer.choices))

    async def responds(chat: Chat) -> float:
        await chat.client.responses.create(model="x", input="hi", max_output_tokens=16)
        return 1.0

    scorer = service.create_sampling_client(base_model=server.model).result()
    for agent, turns in [(streams, 1), (lambda chat: asyncio.to_thread(blocks, chat), 2), (responds, 1)]:
        group = AgentGroup(lambda agent=agent: agent, 1)
        one = play_now([group], agents, seed=1)[0].trajectories_G[0]
        assert one.failure is None and len(one.transitions) == turns, one.failure
        assert one.transitions[-1].reward.total > 0 and one.transitions[-1].episode_done
        check_tokens(one, scorer)
        again = play_now([group.resumed()], agents, seed=2)[0].trajectories_G[0]  # all of it was heard, so nothing is asked
        assert all(turn.logs["replayed"] for turn in again.transitions), group.said_G
        assert [turn.action for turn in again.transitions] == [turn.action for turn in one.transitions]


def test_turns_earn_apart_and_groups_are_compared(agents: AgentServer, trainer: tinker.TrainingClient):
    class Longest(AgentGroup):
        async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Any) -> Any:
            assert all(isinstance(env, AgentEnv) for env in env_group)
            return [(Reward((Part("longest", float(one.num_tokens)),)), {}) for one in trajectory_group]

    def make() -> Callable[[Chat], Awaitable[float]]:
        async def earns(chat: Chat) -> float:
            for place in range(2):
                await chat.client.chat.completions.create(model="x", messages=HI, max_tokens=2 + ord(chat.logs.setdefault("x", "a")) % 2)
                chat.earn(Reward((Part("turn", float(place)),)))
            return 0.5

        return earns

    (group,) = play_now([Longest(make, 3, ["longest"])], agents, seed=1)
    assert group.tags == ["longest"] and count([group])["failed"] == 0
    assert group.trajectories_G[0].transitions[0].reward.values == {"turn": 0.0}
    assert group.trajectories_G[0].transitions[1].reward.values == {"turn": 1.0, "reward": 0.5}
    assert set(group.reward(0).values) == {"turn", "reward", "longest"}
    rows = [[1.0, -1.0] for _ in group.trajectories_G]
    data = [datum for one, row in zip(group.trajectories_G, rows, strict=True) for datum in datums_of(one, row)]
    output = trainer.forward_backward(data, "importance_sampling").result()
    for datum, told in zip(data, output.loss_fn_outputs, strict=True):
        drawn = datum.loss_fn_inputs["logprobs"].to_numpy()
        np.testing.assert_allclose(told["logprobs"].to_numpy()[drawn != 0], drawn[drawn != 0], atol=2e-3)
    assert len(advantages_of(group)) == 3


# ---- what goes wrong ----


async def raises(chat: Chat) -> float:
    await talks(chat, 1)
    raise ZeroDivisionError("the agent's own bug")


async def hangs(chat: Chat) -> float:
    await talks(chat, 1)
    await asyncio.sleep(3600)
    return 1.0


def blocks_for_ever(chat: Chat) -> float:
    while True:
        chat.blocking.chat.completions.create(model="x", messages=HI, max_tokens=2)
        time.sleep(0.1)


async def asks_nothing(chat: Chat) -> float:
    return 1.0


async def earns_nan(chat: Chat) -> float:
    await talks(chat, 1)
    return float("nan")


async def cannot_reach_its_tool(chat: Chat) -> float:
    await talks(chat, 1)
    raise ToolUnavailable("the shop's line is dead")


WRONG: dict[str, tuple[Any, str, str, int]] = {
    "raises": (raises, "environment", "the agent's own bug", 1),
    "hangs": (hangs, "timeout", "make the agent faster", 1),
    "never ends": (lambda chat: talks(chat, 10**6), "turns", "not over after 4 requests", 4),
    "blocks in a thread": (lambda chat: asyncio.to_thread(blocks_for_ever, chat), "turns", "not over after 4 requests", 4),
    "asks nothing": (asks_nothing, "environment", "had asked nothing", 0),
    "earns NaN": (earns_nan, "not_finite", "'reward' is nan", 1),
    "tool is gone": (cannot_reach_its_tool, "environment", "line is dead", 1),
    "asks for too much": (lambda chat: talks(chat, max_tokens=10**9), "sampling", "max_tokens", 0),
    "reshapes": (lambda chat: talks(chat, 1, presence_penalty=1.0), "sampling", "presence_penalty", 0),
    "keeps nothing": (lambda chat: talks(chat, 1, store=False), "sampling", "store: false", 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_agent_does_wrong_fails_its_episode_alone(agents: AgentServer, name: str):
    agent, kind, word, turns = WRONG[name]
    makes = iter([talks, agent, talks])
    limits = Limits(turns=4, seconds=10 if kind == "timeout" else 120)
    (group,) = play_now([AgentGroup(lambda: next(makes), 3)], agents, limits, seed=1)
    assert [one.failure and one.failure.kind for one in group.trajectories_G] == [None, kind, None], group.trajectories_G
    failed = group.trajectories_G[1]
    assert failed.failure is not None and word in failed.failure.message and len(failed.transitions) == turns
    json.dumps(record_of(group), allow_nan=False)


def test_agents_and_policies_of_tokens_do_not_mix(agents: AgentServer, policy: TinkerPolicy):
    failure = asyncio.run(play(AgentEnv(talks), policy)).failure
    assert failure is not None and "AgentServer" in failure.message
    failure = run_env(object(), agents).failure
    assert failure is not None and "TinkerPolicy" in failure.message
    with pytest.raises(InvalidRequest, match="size must be at least 1"):
        AgentGroup(lambda: talks, 0)
    with pytest.raises(InvalidRequest, match="1 beginnings for 2 members"):
        AgentGroup(lambda: talks, 2, begun_G=[[]])


def run_env(env: Any, server: AgentServer) -> Trajectory:
    return asyncio.run(play(env, server))


# ---- interrupted episodes ----


class Interrupted:
    """Three turns; hangs after the second as long as `stop` says so."""

    stop = True

    async def __call__(self, chat: Chat) -> float:
        await talks(chat, 2)
        if Interrupted.stop:
            await asyncio.sleep(3600)
        return await talks(chat, 3)


def num_records(http: httpx.Client) -> int:
    return len(http.get("/records", params={"limit": 100}).json()["data"])


def test_an_interrupted_group_goes_on_under_a_newer_version(
    agents: AgentServer, trainer: tinker.TrainingClient, service: tinker.ServiceClient, server: LiveServer
):
    Interrupted.stop = True
    group = AgentGroup(Interrupted, 2, ["partial"])
    (begun,) = play_now([group], agents, Limits(seconds=20), seed=1)
    assert [one.failure and one.failure.kind for one in begun.trajectories_G] == ["timeout", "timeout"]
    assert [len(one.transitions) for one in begun.trajectories_G] == [2, 2], "what happened until then is there to be looked at"

    data = [datum for one in begun.trajectories_G for datum in datums_of(one, [1.0, -1.0])]
    trainer.forward_backward(data, "importance_sampling").result()
    trainer.optim_step(tinker.AdamParams(learning_rate=0.05)).result()
    newer = AgentServer(agents.base_url, KEY, trainer.save_weights_for_sampler("newer").result().path)

    Interrupted.stop = False
    kept = msgspec.json.decode(msgspec.json.encode(group.said_G), type=list[list[Said]])  # as another process would read them
    resumed = AgentGroup(Interrupted, 2, ["partial"], begun_G=kept)
    (ended,) = play_now([resumed], newer, seed=2)
    assert count([ended])["failed"] == 0
    scorer = {agents.model: service.create_sampling_client(base_model=server.model).result()}
    scorer[newer.model] = service.create_sampling_client(model_path=newer.model).result()
    for old, new in zip(begun.trajectories_G, ended.trajectories_G, strict=True):
        assert [turn.action for turn in new.transitions[:2]] == [turn.action for turn in old.transitions]
        # the second talk asks what the first had asked, hears the same, and goes on to what is new
        versions = [turn.logs["version"] for turn in new.transitions]
        assert versions[:2] == [agents.model] * 2 and versions[-1] == newer.model
        for turn in new.transitions:
            check_tokens(Trajectory([turn]), scorer[turn.logs["version"]])
    assert agent_metrics(ended.trajectories_G)["agents/replayed"] == pytest.approx(2 / 5)


def test_a_rollout_survives_the_server(new_server: Callable[..., LiveServer]):
    live = new_server()
    agents = AgentServer(live.url + "/v1", KEY, live.model)

    class Killer:
        killed = False

        async def __call__(self, chat: Chat) -> float:
            await talks(chat, 2)
            if not Killer.killed:
                Killer.killed = True
                live.kill()
            return await talks(chat, 3, max_tokens=13)

    group = AgentGroup(Killer, 1)
    (begun,) = play_now([group], agents, Limits(seconds=120), seed=1)
    failure = begun.trajectories_G[0].failure
    assert failure is not None and failure.kind == "sampling" and len(group.said_G[0]) == 2
    live.restart()
    again = group.resumed()
    (ended,) = play_now([again], agents, seed=2)
    one = ended.trajectories_G[0]
    assert one.failure is None and [turn.logs["replayed"] for turn in one.transitions] == [True, True, False, False, False]
    with httpx.Client(base_url=live.url + "/v1", headers={"authorization": f"Bearer {KEY}"}) as http:
        assert num_records(http) == 5, "what was answered before is not asked again"
    assert [said.answer for said in again.said_G[0][:2]] == [said.answer for said in group.said_G[0]]
