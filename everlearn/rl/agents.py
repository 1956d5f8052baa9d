"""Episodes of agents: code that talks to a model through an `openai` client, played and trained on as it is.

An agent is a function that gets a `Chat`, asks it whatever it likes, and returns a reward. The tokens of its episode are those that the
server recorded: for each request the prompt as the model got it, and the token ids and log-probabilities as they were sampled. Nothing is
rendered, encoded or parsed here. If the server's template spells the history anew in a later prompt, that prompt is another beginning, and
`datums_of` trains each answer behind the prompt that it was an answer to.

Needs `pip install openai`. The key needs the scopes sample and read.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import httpx
import msgspec
import tinker

from everlearn.errors import InvalidRequest, Unavailable
from everlearn.rewards.reward import Reward, total_of
from everlearn.rewards.verifiers import VerifierFailed
from everlearn.rl.bounded import OutOfTime, bounded
from everlearn.rl.env import Env, EnvGroup, Metrics, StepResult, StopCondition
from everlearn.rl.policy import Player
from everlearn.rl.rollouts import Limits
from everlearn.rl.tape import BlockingTap, Said, Tap, Tape
from everlearn.rl.trajectory import Action, Failure, FailureKind, Trajectory, Transition

FETCH_SECONDS = 60.0  # what reading an episode's records may take, after its own time
RETRY_SECONDS = 0.5
MESSAGE_LENGTH = 2000
IMAGES = ("image_url", "input_image", "image")  # as the routes call them
RESHAPING = {"top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {}}


class Chat:
    """What an agent gets: `client` (an `openai.AsyncOpenAI`) or `blocking` (an `openai.OpenAI`, for code in `asyncio.to_thread`), and the
    `model` to name. Frameworks that bring a client of their own take `http` or `blocking_http` as its HTTP client, and `base_url`.

    Whatever the agent says about model, temperature, top_p and seed, the server that plays it has the last word. `metrics` and `logs`
    go to the record of the episode; `earn` gives a reward to the latest answer, so that turns can be credited apart.
    """

    def __init__(self, server: AgentServer, tape: Tape):
        self.server, self.tape = server, tape
        self.model, self.base_url = server.newest(), server.base_url
        self.metrics: dict[str, float] = {}
        self.logs: dict[str, Any] = {}
        self.http = httpx.AsyncClient(transport=Tap(tape), timeout=server.request_seconds)
        self.blocking_http = httpx.Client(transport=BlockingTap(tape), timeout=server.request_seconds)
        self._earned: dict[int, Reward] = {}

    @cached_property
    def client(self) -> Any:
        return _openai().AsyncOpenAI(base_url=self.base_url, api_key=self.server.api_key, http_client=self.http)

    @cached_property
    def blocking(self) -> Any:
        return _openai().OpenAI(base_url=self.base_url, api_key=self.server.api_key, http_client=self.blocking_http)

    def earn(self, reward: Reward | float) -> None:
        """A reward for the latest answer. Raises InvalidRequest before the first."""
        if not self.tape.said:
            raise InvalidRequest("there is no answer yet that could earn something; ask first", param="reward")
        place = len(self.tape.said) - 1
        self._earned[place] = total_of([self._earned.get(place, Reward()), Reward.of(reward)])

    def earned(self, last: Reward) -> dict[int, Reward]:
        """By the place of the answer; `last` goes to the last one."""
        place = len(self.tape.said) - 1
        return {**self._earned, place: total_of([self._earned.get(place, Reward()), last])}

    async def close(self) -> None:
        await self.http.aclose()
        self.blocking_http.close()


Agent = Callable[[Chat], Awaitable[Reward | float]]


class AgentEnv:
    """One episode of an agent; used once. `begun`: what an earlier episode of the same agent and task had said.

    After it was played, `said` holds what this one said. It is an environment only in that groups are made of it: an `AgentServer` plays
    it, and no policy of tokens can.
    """

    def __init__(self, agent: Agent, begun: Sequence[Said] = ()):
        self.agent, self.begun = agent, list(begun)
        self.said: list[Said] = []

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        raise InvalidRequest("an agent asks by itself; play it with an AgentServer in the place of the policy", param="policy")

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        raise InvalidRequest("an agent asks by itself; play it with an AgentServer in the place of the policy", param="policy")


class AgentGroup(EnvGroup):
    """A group of `size` episodes of one agent and task. Code that comes from `make_agent()` is called once for each episode."""

    def __init__(self, make_agent: Callable[[], Agent], size: int, tags: Sequence[str] = (), begun_G: Sequence[Sequence[Said]] = ()):
        if size < 1:
            raise InvalidRequest(f"a group of {size} agents can't be played; size must be at least 1", param="size")
        if len(begun_G) not in (0, size):
            raise InvalidRequest(f"begun_G holds {len(begun_G)} beginnings for {size} members; give each its own", param="begun_G")
        self.make_agent, self.size, self.tags = make_agent, size, list(tags)
        self.envs = [AgentEnv(make_agent(), begun) for begun in (begun_G or [()] * size)]

    @property
    def said_G(self) -> list[list[Said]]:
        """What each member said; with it, an interrupted group can be continued (`resumed`), here or, as JSON, in another process."""
        return [env.said for env in self.envs]

    def resumed(self) -> AgentGroup:
        """The group to play next, if this one was interrupted. Each agent runs from its beginning and gets the answers that it got, with
        their tokens and log-probabilities; what it asks that it hadn't asked, whoever then is the policy answers. Its own acts, such as
        calls of tools, are done again: where one comes out differently, the episode goes another way from there."""
        return AgentGroup(self.make_agent, self.size, self.tags, self.said_G)

    async def make_envs(self) -> Sequence[Env]:
        return self.envs

    def logging_tags(self) -> list[str]:
        return self.tags


class AgentServer(Player):
    """Plays agents on a server of the OpenAI API that keeps records (everlearn). Stands where a policy does: `play_now(groups, server)`.

    `base_url` ends with /v1. `model` is who answers, whatever an agent names: a checkpoint of the sampler (`tinker://...`), `name@version`;
    or a function that says who answers now, asked with each request, for episodes that outlast a version.

    `sampling` takes the place of the agents' own settings. At temperature 1 and top_p 1 the recorded log-probabilities are those of the
    distribution that was drawn from; other settings are for evaluations, or for `train` (temperature.py). Agents that reshape the
    distribution otherwise (top_k, penalties, ...) fail as `sampling` where `trains`, which it does at temperature 1 unless it is told
    otherwise. A grammar (strict tools, a response format) reshapes it too and is let through: what it ruled out was never drawn, and the
    log-probabilities are the model's own, without it.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        model: str | Callable[[], str],
        sampling: Mapping[str, Any] | None = None,
        request_seconds: float = 300.0,
        trains: bool | None = None,
    ):
        self.base_url, self.api_key, self.model = base_url.rstrip("/"), api_key, model
        self.sampling = {"temperature": 1.0, "top_p": 1.0} if sampling is None else dict(sampling)
        self.request_seconds = request_seconds
        self.trains = self.sampling.get("temperature", 1.0) == 1.0 if trains is None else trains

    def at(self, temperature: float) -> AgentServer:
        """The same server and model at a temperature: at 0 to evaluate, at any other to train."""
        sampling = {"temperature": temperature, "top_p": 1.0}
        return AgentServer(self.base_url, self.api_key, self.model, sampling, self.request_seconds, trains=temperature > 0)

    def newest(self) -> str:
        return self.model if isinstance(self.model, str) else self.model()

    async def play(self, env: Any, limits: Limits, seed: int | None) -> Trajectory:
        if not isinstance(env, AgentEnv):
            why = f"an AgentServer plays agents, and this is a {type(env).__name__}; play it with a TinkerPolicy"
            return Trajectory([], Failure("environment", why))
        started = time.monotonic()
        tape = Tape(self.newest, self.sampling, limits.turns, seed, env.begun)
        chat = Chat(self, tape)
        env.said = tape.said
        last, failure = Reward(), None
        try:
            last = Reward.of(await bounded(env.agent(chat), limits.seconds, "the agent")).check()
            failure = Failure("turns", tape.over, len(tape.said)) if tape.over else None
        except Exception as error:  # noqa: BLE001 - whatever an agent raises is its episode's failure
            failure = _failure(tape, error)
        finally:
            tape.over = tape.over or "the episode is over"  # for threads that the agent left behind
            await chat.close()
        seconds = time.monotonic() - started
        try:
            transitions = await bounded(self._transitions(chat, last), FETCH_SECONDS, "the server")
        except Exception as error:  # noqa: BLE001 - a record that can't be had says nothing about the others of the batch
            return Trajectory([], failure or Failure("sampling", f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]), seconds)
        if failure is None and not transitions:
            failure = Failure("environment", "the agent returned a reward and had asked nothing; there is nothing that earned it")
        return Trajectory(transitions, failure, seconds)

    async def _transitions(self, chat: Chat, last: Reward) -> list[Transition]:
        said, earned = chat.tape.said, chat.earned(last)
        found: list[Transition] = []
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {self.api_key}"}, timeout=FETCH_SECONDS) as http:
            records = await asyncio.gather(*(self._record(http, name) for one in said for name in one.records))
        left = iter(records)
        owed: list[Reward] = []  # for answers without tokens before the first with some
        for place, one in enumerate(said):
            actions = [pair for _ in one.records for pair in _actions(next(left), self.trains)]
            for observation, action, logs in actions:
                logs = {**logs, "version": one.version, "replayed": place < chat.tape.replayed}
                found.append(Transition(observation, action, Reward(), False, {}, logs))
            owed += [earned[place].check()] if place in earned else []
            if found and owed:
                found[-1] = msgspec.structs.replace(found[-1], reward=total_of([found[-1].reward, *owed]))
                owed = []
        if found:
            found[-1] = msgspec.structs.replace(found[-1], episode_done=True, metrics=chat.metrics, logs={**found[-1].logs, **chat.logs})
        return found

    async def _record(self, http: httpx.AsyncClient, name: str) -> dict[str, Any]:
        """A record is there when its answer has ended, but for one that was broken off a moment ago."""
        while True:
            response = await http.get(f"{self.base_url}/records/{name}")
            if response.status_code == 200:
                return dict(response.json())
            if response.status_code not in (404, 503) or name == "":
                raise Unavailable(f"the record {name} can't be read ({response.status_code}): {response.text[:500]}")
            await asyncio.sleep(RETRY_SECONDS)


def _actions(record: Mapping[str, Any], trains: bool) -> list[tuple[tinker.ModelInput, Action, dict[str, Any]]]:
    """What was sampled for one prompt: one action for each choice that has tokens. Raises InvalidRequest for what can't be trained on."""
    content, name = record["content"], record["id"]
    if content is None:
        raise InvalidRequest(f"the record {name} has no tokens; use a key whose content is kept, and leave store: false out", param="store")
    params = content["params"]
    reshaped = [field for field, neutral in RESHAPING.items() if params.get(field) not in (None, neutral)]
    if reshaped and trains:
        raise InvalidRequest(
            f"the agent asked with {', '.join(reshaped)}, so the log-probabilities aren't those of what was drawn from; leave it out, "
            "or evaluate at another temperature than 1",
            param=reshaped[0],
        )
    if any(part.get("type") in IMAGES for message in content.get("messages") or [] for part in _parts(message)):
        raise InvalidRequest(f"the record {name} has an image in its prompt; episodes of agents are trained on as text", param="messages")
    observation = tinker.ModelInput.from_ints(content["prompt_token_ids"])
    found = []
    for place, choice in enumerate(content["choices"]):
        if choice["token_ids"]:
            ended = "stop" if choice["finish_reason"] in ("stop", "tool_calls") else "length"
            answers = content.get("answer") or []
            logs = {"record": name, "answer": answers[place] if place < len(answers) else None}
            found.append((observation, Action(choice["token_ids"], choice["logprobs"], ended).check(), logs))  # type: ignore[arg-type]
    return found


def _parts(message: Any) -> list[Mapping[str, Any]]:
    """Of a message of a chat; a bare prompt has none."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _failure(tape: Tape, error: Exception) -> Failure:
    kind: FailureKind = "environment"
    package = sys.modules.get("openai")
    if tape.over:
        return Failure("turns", tape.over, len(tape.said))
    if isinstance(error, OutOfTime):
        kind = "timeout"
    elif isinstance(error, VerifierFailed):
        kind = "verifier"
    elif isinstance(error, httpx.HTTPError) or (package is not None and isinstance(error, package.APIError)):
        kind = "sampling"
    elif isinstance(error, InvalidRequest) and error.param == "reward":
        kind = "not_finite"
    return Failure(kind, f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH], len(tape.said))


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise Unavailable("agents need a package: pip install openai") from None
    return openai


def agent_metrics(trajectories: Sequence[Trajectory]) -> Metrics:
    """Shares over the answers of these episodes: `agents/replayed`, taken from an earlier episode, and `agents/continued`, whose prompt
    goes on from the tokens of the answer before. Where the second is low, the template spells history anew, and each answer costs its
    whole prompt in training."""
    turns = [turn for one in trajectories for turn in one.transitions]
    later = [pair for one in trajectories for pair in zip(one.transitions, one.transitions[1:], strict=False)]
    continued = [
        after.observation.to_ints()[: len(whole)] == whole
        for before, after in later
        for whole in [[*before.observation.to_ints(), *before.action.tokens]]
    ]
    replayed = [bool(turn.logs.get("replayed")) for turn in turns]
    return {
        "agents/replayed": sum(replayed) / len(replayed) if replayed else 0.0,
        "agents/continued": sum(continued) / len(continued) if continued else 1.0,
    }
