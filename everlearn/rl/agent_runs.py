"""Agents in the loop of train.py: `train(service, settings, AgentTasks(...), folder, agents=AgentHost(url, key))`.

A step plays its batch with an `AgentServer` on the weights as they are, saved until the next step saves its own, instead of with a
sampling client.
All else is the loop's: comparing, losses, checkpoints, continuing, evaluation, measures, limits, failures. An agent bounds its answers
itself (`max_tokens` of the settings is for policies of tokens), and the turns of an episode are its requests.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import tinker

from everlearn.errors import InvalidRequest
from everlearn.rl.agents import Agent, AgentGroup, AgentServer
from everlearn.rl.env import EnvGroup, deal
from everlearn.rl.temperature import Temperature

TTL_SECONDS = 6 * 3600  # of the weights of a step that nothing followed; an episode that outlasts them fails as sampling
HIGHEST = 2.0  # temperature that the OpenAI API takes
log = logging.getLogger("everlearn.rl")


class AgentHost:
    """Where the agents of a run are played: the OpenAI API (`base_url` ends with /v1) of the server that trains. The key needs the scopes
    sample and read, and its content must be kept."""

    def __init__(self, base_url: str, api_key: str, request_seconds: float = 300.0):
        self.base_url, self.api_key, self.request_seconds = base_url, api_key, request_seconds
        self._saved = itertools.count()
        self._newest: dict[str, str] = {}  # by training run: the weights that its last step was played with

    def check(self, loss: str, temperature: float | Temperature) -> None:
        """Raises InvalidRequest for a loss that can't be computed from agents' records, and for temperatures that no agent can ask at."""
        if loss == "stable_reinforce":
            raise InvalidRequest(f"{loss} needs the ids of sampled sequences, which agents' records don't have; take another", param="loss")
        highest = max(temperature.first, temperature.last) if isinstance(temperature, Temperature) else temperature
        if highest > HIGHEST:
            raise InvalidRequest(
                f"temperature is up to {highest:g}, and agents ask through the OpenAI API, which takes at most {HIGHEST:g}; lower it",
                param="temperature",
            )

    def server(self, client: tinker.TrainingClient) -> AgentServer:
        """Plays with the client's weights as they are now. Those that it gave for the same client before are deleted."""
        path = client.save_weights_for_sampler(f"agents-{next(self._saved):06}", ttl_seconds=TTL_SECONDS).result().path
        before, self._newest[client.model_id] = self._newest.get(client.model_id), path
        if before is not None:
            try:
                tinker.RestClient(client.holder).delete_checkpoint_from_tinker_path(before).result()
            except tinker.TinkerError as error:  # it expires anyway, and is no reason to end a run
                log.info("%s couldn't be deleted: %s", before, error)
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
