"""Environments of `verifiers`, unchanged: `VerifiersTasks(verifiers.load_environment("..."), tokenizer)`.

What is played are its multi-turn environments and those made of them (`SingleTurnEnv`, `ToolEnv`), as versions 0.1.14 to 0.3.1 have them
(tested with 0.3.1).
Such an environment has a loop of its own that asks a model over HTTP. Here its parts are called in the order of that loop, and the policy
samples in between: so the tokens that are trained on are those that were sampled, and limits, failures and records are those of every
other environment. Version 0.4 has none of these parts: it plays with programs that speak to an endpoint.

Messages are spelled by the model's own chat template. An answer is never spelled anew: what the environment says next is appended to the
tokens of the answer; where the template spells what came before in another way (some drop earlier reasoning), the prompt begins afresh.

Its rubric scores a whole group, weights and all, as one part, `reward`; the functions' own results are metrics. A function that raises
would count as 0 there; here it fails the group.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rewards.reward import Reward
from everlearn.rewards.verifiers import VerifierFailed
from everlearn.rl.datums import extended
from everlearn.rl.env import Env, EnvGroup, Metrics, StepResult, StopCondition, deal
from everlearn.rl.trajectory import Trajectory

TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.S)
_raised: ContextVar[list[str]] = ContextVar("_raised")


class Template:
    """A model's chat template, with a tokenizer of `transformers`. `end` ends every answer."""

    def __init__(self, tokenizer: Any, end: str | None = None):
        self.tokenizer, self.end = tokenizer, end or str(tokenizer.eos_token)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, action: list[int]) -> str:
        return str(self.tokenizer.decode(action, skip_special_tokens=True))

    def spell(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], ask: bool = True) -> str:
        """The text of a prompt; with `ask` an answer comes next."""
        return str(self.tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, add_generation_prompt=ask, tokenize=False))

    def go_on(
        self, observation: tinker.ModelInput, action: list[int], before: list[dict[str, Any]], after: list[dict[str, Any]], tools: Any
    ) -> tinker.ModelInput:
        """The prompt of `after`, which begins with the messages of `before`, the answer in `action` among them."""
        old, new = self.spell(before, tools, ask=False), self.spell(after, tools)
        cut = old.rfind(self.end) + len(self.end)
        if len(after) <= len(before) or cut < len(self.end) or not new.startswith(old[:cut]):
            return tinker.ModelInput.from_ints(self.encode(new))
        ended = action[-1:] == self.encode(self.end)[-1:]
        return extended(observation, action, *self.encode(("" if ended else self.end) + new[cut:]))


class VerifiersEnv:
    """One rollout of an environment on one row of its dataset."""

    def __init__(self, env: Any, row: dict[str, Any], template: Template):
        self.env, self.row, self.template = env, row, template
        self.state: Any = None
        self.cleaned = False

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        from verifiers.types import ClientConfig

        # Whoever calls a model behind the policy's back shall fail, not sample from another model: nobody listens there.
        nobody = ClientConfig(api_base_url="http://127.0.0.1:9/v1", api_key_var="EVERLEARN_NO_KEY", max_retries=0)
        self.state = await self.env.init_state(self.row, nobody, "policy", {})
        now = time.time()
        self.state["timing"].generation.start = self.state["timing"].setup.start = now
        self.state = await self.env.setup_state(self.state) or self.state
        self.state["timing"].setup.end = time.time()
        self.tools = [_wire_tool(tool) for tool in self.state["tool_defs"] or []]
        self.messages = await self._next_messages()
        if self.messages is None:
            raise InvalidRequest(f"the environment was over before it began ({self.state.get('stop_condition')})")
        self.observation = tinker.ModelInput.from_ints(self.template.encode(self.template.spell(_wire(self.messages), self.tools)))
        return self.observation, [self.template.end]

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        said = self.template.decode(action)
        cut_off = (extra or {}).get("stop_reason") == "length"
        await self.env.add_model_response(self.state, self.messages, _response(said, cut_off, bool(self.tools), self.observation, action))
        before = _wire([*self.state["trajectory"][-1]["prompt"], *self.state["trajectory"][-1]["completion"]])
        messages = await self._next_messages()
        if messages is None:
            await self.clean_up()
            return StepResult(0.0, True, logs={"said": said, "stopped": str(self.state.get("stop_condition"))})
        self.observation = self.template.go_on(self.observation, action, before, _wire(messages), self.tools)
        self.messages = messages
        return StepResult(0.0, False, self.observation, [self.template.end], logs={"said": said})

    async def _next_messages(self) -> list[Any] | None:
        """What the policy sees next; None if the rollout is over. Errors of the environment's own are raised, not scored."""
        from verifiers.utils.message_utils import maybe_normalize_messages

        if await self.env.is_completed(self.state):
            return None
        messages = maybe_normalize_messages(await self.env.get_prompt_messages(self.state), field_name="prompt_messages")
        if self.state.get("final_env_response") is not None:
            await self.env.is_completed(self.state)  # says in the state why it ended
            return None
        return list(messages)

    async def clean_up(self) -> None:
        """Renders the completion, which rewards look at, and gives back what the rollout holds; once."""
        if self.state is not None and not self.cleaned:
            self.cleaned = True
            await self.env.cleanup(self.state)


class VerifiersGroup(EnvGroup):
    """One row several times; the rubric scores all of them together."""

    def __init__(self, env: Any, row: dict[str, Any], size: int, template: Template):
        self.env, self.row, self.size, self.template = env, row, size, template
        self.envs: list[VerifiersEnv] = []

    async def make_envs(self) -> Sequence[Env]:
        self.envs = [VerifiersEnv(self.env, self.row, self.template) for _ in range(self.size)]
        return self.envs

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> Sequence[tuple[Reward | float, Metrics]]:
        envs = [env for env in env_group if isinstance(env, VerifiersEnv)]
        await asyncio.gather(*(env.clean_up() for env in envs))  # those that a budget ended have no completion yet
        states = [env.state for env in envs]
        raised: list[str] = []
        _raised.set(raised)
        await self.env.rubric.score_group(states)
        if raised:
            raise VerifierFailed(f"a reward function raised: {raised[0]}")
        return [
            (Reward.of(float(state["reward"])), {name: float(value) for name, value in (state["metrics"] or {}).items()})
            for state in states
        ]

    async def cleanup(self) -> None:
        await asyncio.gather(*(env.clean_up() for env in self.envs))

    def logging_tags(self) -> list[str]:
        return ["verifiers", str(getattr(self.env, "env_id", None) or type(self.env).__name__)]


class VerifiersTasks:
    """A dataset of the rows from `first` to before `last` of an environment's own; two ranges make a held-out split."""

    def __init__(
        self,
        env: Any,
        tokenizer: Any,
        first: int = 0,
        last: int | None = None,
        groups_per_batch: int = 8,
        group_size: int = 8,
        end: str | None = None,
    ):
        import verifiers

        if not isinstance(env, verifiers.MultiTurnEnv):
            raise InvalidRequest(f"{type(env).__name__} brings a loop of its own; a verifiers MultiTurnEnv can be played", param="env")
        self.env, self.template, self.rows = env, Template(tokenizer, end), env.get_dataset()
        self.first, self.last = first, len(self.rows) if last is None else last
        self.groups_per_batch, self.group_size = groups_per_batch, group_size
        if not 0 <= self.first <= self.last - groups_per_batch or self.last > len(self.rows):
            raise InvalidRequest(
                f"rows from {first} to {self.last} of {len(self.rows)} make no batch of {groups_per_batch} groups; choose another range",
                param="last",
            )
        _watch(env.rubric)

    def __len__(self) -> int:
        return (self.last - self.first) // self.groups_per_batch

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, len(self), self.groups_per_batch, self.group)

    def group(self, number: int) -> VerifiersGroup:
        return VerifiersGroup(self.env, dict(self.rows[self.first + number]), self.group_size, self.template)


def _watch(rubric: Any) -> None:
    """Lets each function of a rubric tell when it raises, since the rubric itself would go on with 0."""
    for part in getattr(rubric, "rubrics", []):
        _watch(part)
    rubric.funcs = [_watched(function) for function in rubric.funcs]


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # the rubric looks at name and signature
    async def call(*args: Any, **named: Any) -> Any:
        try:
            found = function(*args, **named)
            return await found if inspect.isawaitable(found) else found
        except Exception as error:
            _raised.get([]).append(f"{function.__name__}: {type(error).__name__}: {error}")
            raise

    return call


def _response(said: str, cut_off: bool, with_tools: bool, observation: tinker.ModelInput, action: list[int]) -> Any:
    """What the environment would have got from an endpoint."""
    from verifiers.types import Response, ResponseMessage, ToolCall, Usage

    content, calls = _tool_calls(said) if with_tools else (said, [])
    message = ResponseMessage(
        content=content,
        tool_calls=[ToolCall(id=f"call_{place}", name=name, arguments=arguments) for place, (name, arguments) in enumerate(calls)] or None,
        finish_reason="length" if cut_off else "tool_calls" if calls else "stop",
        is_truncated=cut_off,
    )
    prompt = observation.length
    usage = Usage(prompt_tokens=prompt, reasoning_tokens=0, completion_tokens=len(action), total_tokens=prompt + len(action))
    return Response(id=uuid.uuid4().hex, created=int(time.time()), model="policy", usage=usage, message=message)


def _tool_calls(said: str) -> tuple[str, list[tuple[str, str]]]:
    """The text without its calls, and name and arguments (JSON) of each, written as Hermes, Qwen and SmolLM write them. What is none stays
    text."""
    calls: list[tuple[str, str]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            calls.append((str(call["name"]), json.dumps(call.get("arguments", {}))))
        except (ValueError, KeyError, TypeError, AttributeError):
            return found[0]
        return ""

    return TOOL_CALL.sub(take, said).strip(), calls


def _wire(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: tool calls with a function's name and arguments."""
    found = []
    for message in messages:
        row = message.model_dump(exclude_none=True)
        if row.get("tool_calls"):
            row["tool_calls"] = [
                {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": json.loads(call["arguments"])}}
                for call in row["tool_calls"]
            ]
        found.append(row)
    return found


def _wire_tool(tool: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters}}
