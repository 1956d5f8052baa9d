"""Environments that were written for `verifiers`, unchanged: several turns, tools, groups, and rewards that raise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rl.advantages import advantages_of
from everlearn.rl.datums import datums_of
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.rollouts import Limits, count, play_batch
from tests.live import LiveServer

vf = pytest.importorskip("verifiers", reason="pip install 'verifiers>=0.1.14,<0.4'")
if not hasattr(vf, "MultiTurnEnv"):
    pytest.skip("verifiers 0.4 has no MultiTurnEnv: pip install 'verifiers>=0.1.14,<0.4'", allow_module_level=True)

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are theirs

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(service: tinker.ServiceClient, server: LiveServer) -> Any:
    found = service.create_lora_training_client(server.model, rank=4).result().get_tokenizer()
    found.chat_template = TEMPLATE
    return found


def rows(number: int) -> Any:
    return datasets.Dataset.from_list([{"question": f"Say a word, {place}.", "answer": str(place)} for place in range(number)])


class Three(vf.MultiTurnEnv):  # type: ignore[misc, name-defined]
    """Says how often it was answered, and is over after three answers."""

    async def setup_state(self, state: Any) -> Any:
        state["seen"] = 0
        return state

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        state["seen"] += 1
        return [vf.UserMessage(content=f"That was {state['seen']}. Go on.")]


def length(completion: Any, **kwargs: Any) -> float:
    return sum(len(message.content or "") for message in completion if message.role == "assistant") / 100


def turns(state: Any, **kwargs: Any) -> float:
    return float(len(state["trajectory"]))


def longest(states: Any, **kwargs: Any) -> list[float]:
    """A reward that needs sight of all."""
    lengths = [length(state["completion"]) for state in states]
    return [float(own == max(lengths)) for own in lengths]


def tasks_of(env: Any, tokenizer: Any, **options: Any) -> Any:
    from everlearn.rl.envs.verifiers import VerifiersTasks

    return VerifiersTasks(env, tokenizer, **({"groups_per_batch": 2, "group_size": 2} | options))


def test_a_multi_turn_environment_is_played_and_trained_on(
    tokenizer: Any, policy: TinkerPolicy, service: tinker.ServiceClient, server: LiveServer
):
    rubric = vf.Rubric(funcs=[length, turns, longest], weights=[1.0, 0.5, 2.0])
    tasks = tasks_of(Three(max_turns=3, dataset=rows(6), rubric=rubric, system_prompt="Be brief."), tokenizer)
    assert len(tasks) == 3
    groups = asyncio.run(play_batch(tasks.get_batch(1), policy, seed=0))
    assert count(groups) == {"episodes": 4, "failed": 0, "groups_failed": 0}
    for group in groups:
        assert group.tags == ["verifiers", "Three"]
        for place, one in enumerate(group.trajectories_G):
            assert len(one.transitions) == 3 and one.transitions[-1].logs["stopped"] == "max_turns_reached"
            own = group.metrics_G[place]
            assert own["turns"] == 3 and own["num_turns"] == 3
            assert group.reward(place).total == pytest.approx(own["length"] + 0.5 * own["turns"] + 2 * own["longest"])
            text = tokenizer.decode(one.transitions[2].observation.to_ints())
            assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay a word, ") and "That was 2." in text
            assert text.endswith("<|im_start|>assistant\n")
            (datum,) = datums_of(one, [1.0] * 3)
            assert sum(datum.loss_fn_inputs["advantages"].to_numpy()) == one.num_tokens, "no token was spelled anew"
    assert any(any(own) for own in advantages_of(groups[0]))
    training = service.create_lora_training_client(server.model, rank=4).result()
    data = [datum for group in groups for one in group.trajectories_G for datum in datums_of(one, [1.0] * 3)]
    assert training.forward_backward(data, "importance_sampling").result().metrics["ratio:max"] == pytest.approx(1, abs=1e-4)


def say(env: Any, text: str) -> Any:
    return asyncio.run(env.step(env.template.encode(text)))


def test_one_turn_is_scored_by_its_answer(tokenizer: Any):
    def right(completion: Any, answer: str, **kwargs: Any) -> float:
        return float(completion[-1].content == answer)

    tasks = tasks_of(vf.SingleTurnEnv(dataset=rows(4), rubric=vf.Rubric(funcs=[right])), tokenizer, last=4)
    group = tasks.get_batch(1)[1]
    envs = asyncio.run(group.make_envs())
    for env, answer in zip(envs, ["3<|im_end|>", "2<|im_end|>"], strict=True):
        asyncio.run(env.initial_observation())
        assert say(env, answer).episode_done
    found = asyncio.run(group.compute_group_rewards([], envs))
    assert [reward.total for reward, _ in found] == [1.0, 0.0]


def test_tools_are_called(tokenizer: Any):
    def double(number: int) -> int:
        """Twice a number."""
        return 2 * number

    env = tasks_of(vf.ToolEnv(tools=[double], dataset=rows(4), rubric=vf.Rubric(funcs=[turns])), tokenizer).group(0)
    (one, _) = asyncio.run(env.make_envs())
    first, stop = asyncio.run(one.initial_observation())
    assert stop == ["<|im_end|>"] and one.tools[0]["function"]["name"] == "double"
    result = say(one, 'I see. <tool_call>{"name": "double", "arguments": {"number": 21}}</tool_call><|im_end|>')
    text = tokenizer.decode(result.next_observation.to_ints())
    assert not result.episode_done and text.endswith("<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")
    assert result.next_observation.to_ints()[: first.length] == first.to_ints()
    assert say(one, "<tool_call>no call</tool_call> 42<|im_end|>").episode_done
    assert asyncio.run(env.compute_group_rewards([], [one]))[0][1]["double_calls"] == 1.0


def test_what_raises_is_a_failure_and_no_zero(tokenizer: Any, policy: TinkerPolicy):
    def broken(completion: Any, **kwargs: Any) -> float:
        raise ZeroDivisionError("mistake")

    async def broken_later(states: Any, **kwargs: Any) -> list[float]:
        raise OSError("down")

    class Down(Three):
        async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
            raise vf.Error("the simulator is down")

    def failure(env: Any) -> Any:
        (group, _) = asyncio.run(play_batch(tasks_of(env, tokenizer).get_batch(0), policy, Limits(seconds=60), seed=0))
        assert all(one.failure for one in group.trajectories_G)
        return group.trajectories_G[0].failure

    found = failure(vf.SingleTurnEnv(dataset=rows(2), rubric=vf.Rubric(funcs=[length, broken])))
    assert found.kind == "verifier" and "broken: ZeroDivisionError: mistake" in found.message
    found = failure(vf.SingleTurnEnv(dataset=rows(2), rubric=vf.Rubric(funcs=[broken_later])))
    assert found.kind in ("verifier", "group") and "down" in found.message
    found = failure(Down(max_turns=3, dataset=rows(2), rubric=vf.Rubric(funcs=[length])))
    assert found.kind == "environment" and "the simulator is down" in found.message


def test_environments_that_cannot_be_played(tokenizer: Any):
    class Own(vf.Environment):  # type: ignore[misc, name-defined]
        async def rollout(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    with pytest.raises(InvalidRequest, match="a loop of its own"):
        tasks_of(Own(dataset=rows(2), rubric=vf.Rubric(funcs=[length])), tokenizer)
    with pytest.raises(InvalidRequest, match="make no batch"):
        tasks_of(vf.SingleTurnEnv(dataset=rows(2), rubric=vf.Rubric(funcs=[length])), tokenizer, last=1)
