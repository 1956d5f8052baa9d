"""Who acts: something that takes a prompt and samples. Through the Tinker API, so any server that speaks it will do."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rl.env import StopCondition
from everlearn.rl.trajectory import Action, Trajectory


class Policy(Protocol):
    """Samples one action. The same prompt, weights and seed give the same action; without a seed the server picks one."""

    async def __call__(self, observation: tinker.ModelInput, stop: StopCondition, seed: int | None) -> Action: ...


class Player:
    """Plays whole episodes by itself, for environments that hand no prompt of tokens to a policy (everlearn/rl/agents.py).

    Stands wherever a policy does. Never raises for what an environment does: that is the trajectory's failure.
    """

    async def play(self, env: Any, limits: Any, seed: int | None) -> Trajectory:
        raise NotImplementedError


class TinkerPolicy:
    """Samples with a `tinker.SamplingClient`.

    At `temperature` 1 the log-probabilities that come back describe the distribution that was drawn from, and a policy loss may divide
    by them. At another temperature they are still those of temperature 1: before training on them, `at_temperature` (temperature.py)
    asks for the right ones.
    """

    def __init__(self, sampler: tinker.SamplingClient, max_tokens: int, temperature: float = 1.0):
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {max_tokens}; an action has at least one token", param="max_tokens")
        self.sampler, self.max_tokens, self.temperature = sampler, max_tokens, temperature

    async def __call__(self, observation: tinker.ModelInput, stop: StopCondition, seed: int | None) -> Action:
        params = tinker.SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, stop=None if stop is None else list(stop), seed=seed
        )
        answer = await self.sampler.sample(observation, 1, params)
        sequence = answer.sequences[0]
        if sequence.logprobs is None:
            raise InvalidRequest("the server sampled without log-probabilities, and nothing can be trained without them", param="logprobs")
        return Action(list(sequence.tokens), list(sequence.logprobs), sequence.stop_reason, sequence.sequence_id or None)


def seed_of(*place: Any) -> int:
    """A seed for a place (run, batch, group, member, turn), from 0 to 2^31 - 1: the same wherever and whenever it is asked for."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
