"""Text to imitate beside episodes, so that what isn't rewarded isn't lost (PTX: InstructGPT, arXiv 2203.02155; Kimi K2, arXiv 2507.20534).

The gradient of a weighted cross-entropy joins each optimizer step of a run. It is a request of its own before `optim_step`, since
gradients add up; so it goes with every policy loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rl.policy import seed_of

NAMES = {"target_tokens", "weights"}


class Ptx:
    """`data`: datums as `cross_entropy` takes them. Each optimizer step gets `batch` of them, with `weights` times `weight`: a token to
    imitate then counts as much as a sampled one with that advantage. All are seen before one comes again, in an order of the `seed`.
    """

    def __init__(self, data: Sequence[types.Datum], weight: float, batch: int, seed: int):
        for index, datum in enumerate(data):
            if set(datum.loss_fn_inputs) != NAMES:
                message = f"text to imitate is a datum with {' and '.join(sorted(NAMES))}; datum {index} has"
                raise InvalidRequest(f"{message} {', '.join(sorted(datum.loss_fn_inputs)) or 'nothing'}", param="ptx")
        self.data, self.batch, self.seed = [_weighted(datum, weight) for datum in data], min(batch, len(data)), seed
        self.tokens = [float(np.abs(datum.loss_fn_inputs["weights"].to_numpy()).sum()) for datum in data]
        self.weight = weight

    def chosen(self, number: int) -> list[int]:
        """The indices of the datums for optimizer step `number` of the run: the same whenever it is asked for."""
        first = number * self.batch
        return [self._order(place // len(self.data))[place % len(self.data)] for place in range(first, first + self.batch)]

    def send(self, client: tinker.TrainingClient, number: int) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        return client.forward_backward([self.data[index] for index in self.chosen(number)], "cross_entropy")

    def measured(self, output: types.ForwardBackwardOutput, number: int) -> dict[str, float]:
        """`ptx/loss`: nats for each token of weight 1, before the step; `ptx/tokens`: the weights' sum."""
        tokens = sum(self.tokens[index] for index in self.chosen(number))
        return {"ptx/loss": float(output.metrics["loss:sum"]) / self.weight / max(tokens, 1e-9), "ptx/tokens": tokens}

    def _order(self, epoch: int) -> list[int]:
        return random.Random(seed_of(self.seed, "ptx", epoch)).sample(range(len(self.data)), len(self.data))


def _weighted(datum: types.Datum, weight: float) -> types.Datum:
    own = datum.loss_fn_inputs["weights"].to_numpy().astype(np.float32) * np.float32(weight)
    return types.Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "weights": types.TensorData.from_numpy(own)})
