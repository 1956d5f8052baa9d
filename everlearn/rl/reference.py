"""The base model as the policy to stay near: how far a policy went from it, and its log-probabilities for a KL term in the loss.

It is asked through a second training client whose adapter is never trained. Such an adapter adds nothing, so `forward` answers with the
base model's log-probabilities, in batches, aligned as the losses want them, images included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tinker
from tinker import types

from everlearn.rl.datums import datums_of, sampled_of
from everlearn.rl.measures import CAP
from everlearn.rl.temperature import at
from everlearn.rl.trajectory import TrajectoryGroup


class Reference:
    """The base model of a run. Its client is opened when it is first asked."""

    def __init__(self, service: tinker.ServiceClient, base_model: str):
        self.service, self.base_model = service, base_model
        self._client: tinker.TrainingClient | None = None

    def logprobs(self, data: Sequence[types.Datum], temperature: float = 1.0) -> list[types.TensorData]:
        """For each datum [T]: what the base model gives its targets at a temperature."""
        if self._client is None:
            self._client = self.service.create_lora_training_client(self.base_model, rank=1).result()
        # Of a loss's inputs only targets matter here; those of all policy losses have these three.
        plain = [
            types.Datum(
                model_input=datum.model_input,
                loss_fn_inputs={name: datum.loss_fn_inputs[name] for name in ("target_tokens", "logprobs", "advantages")},
            )
            for datum in data
        ]
        answer = self._client.forward(plain, "importance_sampling", at(temperature)).result()
        return [output["logprobs"] for output in answer.loss_fn_outputs]

    def distance(self, groups: Sequence[TrajectoryGroup], temperature: float = 1.0) -> dict[str, float]:
        """`kl/base`: KL(policy that sampled || base) in nats per sampled token, by k3 on all tokens of episodes that have a score,
        both at the temperature that the groups' log-probabilities are of.

        k3 = exp(-l) - 1 + l with l = log mu - log base (Schulman, 2020): unbiased for tokens of mu, never negative.
        """
        data = [
            datum
            for group in groups
            for index in group.scored
            for datum in datums_of(group.trajectories_G[index], [0.0] * len(group.trajectories_G[index].transitions), sequence_mask=True)
        ]
        if not data:
            return {}
        gaps = []
        for datum, base in zip(data, self.logprobs(data, temperature), strict=True):
            gaps.append((datum.loss_fn_inputs["logprobs"].to_numpy() - base.to_numpy())[sampled_of(datum)])
        gap = np.clip(np.concatenate(gaps).astype(np.float64), -CAP, CAP)
        return {"kl/base": float((np.exp(-gap) - 1.0 + gap).mean())} if gap.size else {}
