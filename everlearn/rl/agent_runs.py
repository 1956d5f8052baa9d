"""Agents in the loop of train.py: `train(service, settings, AgentTasks(...), folder, agents=AgentHost(url, key))`.

A step plays its batch with an `AgentServer` on the weights as they are, saved under a name that expires, instead of with a sampling client.
All else is the loop's: comparing, losses, checkpoints, continuing, evaluation, measures, limits, failures. An agent bounds its answers
itself (`max_tokens` of the settings is for policies of tokens), and the turns of an episode are its requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rl.agents import Agent, AgentGroup, AgentServer
from everlearn.rl.env import EnvGroup, deal

TTL_SECONDS = 6 * 3600  # of the weights of one step; an episode that outlasts them fails as sampling


class AgentHost:
    """Where the agents of a run are played: the OpenAI API (`base_url` ends with /v1) of the server that trains. The key needs the scopes
    sample and read, and its content must be kept."""

    def __init__(self, base_url: str, api_key: str, request_seconds: float = 300.0):
        self.base_url, self.api_key, self.request_seconds = base_url, api_key, request_seconds
        self._saved = itertools.count()

    def check(self, loss: str) -> None:
        """Raises InvalidRequest for a loss that can't be computed from agents' records."""
        if loss == "stable_reinforce":
            raise InvalidRequest(f"{loss} needs the ids of sampled sequences, which agents' records don't have; take another", param="loss")

    def server(self, client: tinker.TrainingClient) -> AgentServer:
        """Plays with the client's weights as they are now."""
        path = client.save_weights_for_sampler(f"agents-{next(self._saved):06}", ttl_seconds=TTL_SECONDS).result().path
        return AgentServer(self.base_url, self.api_key, path, request_seconds=self.request_seconds)


class AgentTasks:
    """A dataset of agents. `make_agent(number)` gives the agent of task `number`, anew for each member of its group; the same number must
    give the same task, so that a run can be continued. For rewards that need sight of a whole group, deal out `AgentGroup`s of your own."""

    def __init__(
        self, make_agent: Callable[[int], Agent], batches: int, groups_per_batch: int = 16, group_size: int = 8, tags: Sequence[str] = ()
    ):
        for name, value in (("batches", batches), ("groups_per_batch", groups_per_batch), ("group_size", group_size)):
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; it must be at least 1", param=name)
        self.make_agent, self.batches, self.groups_per_batch = make_agent, batches, groups_per_batch
        self.group_size, self.tags = group_size, list(tags)

    def __len__(self) -> int:
        return self.batches

    def get_batch(self, index: int) -> Sequence[EnvGroup]:
        return deal(index, self.batches, self.groups_per_batch, self.group)

    def group(self, number: int) -> AgentGroup:
        return AgentGroup(lambda: self.make_agent(number), self.group_size, self.tags)
