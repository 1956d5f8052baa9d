"""Importance by counterfactual: how much less likely the model finds the last turns when a chunk isn't there.

For the window's chunks c_1 .. c_n and its last turns y,

    fall_i = log p(y | c_1 .. c_n) - log p(y | c_1 .. c_n without c_i)        in nats,
    importance_i = 1 - exp(-max(0, fall_i) / scale),

with the model's own log-probabilities. What no later turn has needed yet looks worthless to it: it tells what *was* needed, and a head
that is distilled from it (everlearn/memory/importance.py) learns what such chunks look like. All questions of a turn are sent at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tinker

from everlearn.errors import InternalError, InvalidRequest
from everlearn.memory.window import Chunk, Window, others


class Counterfactual:
    """`later`: how many of the last chunks are what is to be explained. `scale`: nats at which importance is 63 %."""

    name, late = "counterfactual", True

    def __init__(self, sampler: tinker.SamplingClient, later: int = 2, scale: float = 2.0):
        if later < 1 or not scale > 0:
            raise InvalidRequest(f"later is {later} and scale {scale}; both must be above 0", param="later")
        self.sampler, self.later, self.scale = sampler, later, scale

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        """Of a chunk that is itself to be explained nothing is known: it is worth what it was."""
        first = len(chunks) - self.later
        pairs = zip(places, self.falls(chunks, places), strict=True)
        return [chunks[place].importance if place >= first else 1.0 - math.exp(-max(0.0, fall) / self.scale) for place, fall in pairs]

    def falls(self, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        """In nats, summed over the tokens of the last `later` chunks; 0 for a chunk that is one of them."""
        first = len(chunks) - self.later
        asked = [place for place in places if place < first]
        if first < 1 or not asked:
            return [0.0] * len(places)
        target = [token for chunk in chunks[first:] for token in chunk.tokens]
        prompts = [self._prompt(chunks, first, None), *(self._prompt(chunks, first, place) for place in asked)]
        futures = [self.sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt)) for prompt in prompts]
        sums = [_tail(future.result(), len(target)) for future in futures]
        found = dict(zip(asked, sums[1:], strict=True))
        return [sums[0] - found[place] if place in found else 0.0 for place in places]

    def _prompt(self, chunks: Sequence[Chunk], first: int, without: int | None) -> list[int]:
        """All lines but one and its copies. With nothing before them, the first token of the last turns couldn't be scored: the hole is one
        line end."""
        shown = chunks[:first] if without is None else others(chunks[:first], without)
        kept = [token for chunk in shown for token in chunk.tokens]
        head = kept or [chunks[first - 1].tokens[-1]]
        return [*head, *(token for chunk in chunks[first:] for token in chunk.tokens)]


def _tail(logprobs: Sequence[float | None], num: int) -> float:
    values = [value for value in logprobs[-num:] if value is not None]
    if len(values) != num:
        raise InternalError(f"{num - len(values)} of {num} tokens have no log-probability; the prompt begins with them")
    return float(sum(values))


def surprisals(sampler: tinker.SamplingClient, chunks: Sequence[Chunk]) -> list[float]:
    """The mean of -log p of each chunk's tokens behind all chunks before it: one forward pass. The first chunk's first token has none."""
    futures = sampler.compute_logprobs(tinker.ModelInput.from_ints([token for chunk in chunks for token in chunk.tokens]))
    logprobs, found, at = futures.result(), [], 0
    for chunk in chunks:
        values = [value for value in logprobs[at : at + len(chunk.tokens)] if value is not None]
        found.append(-sum(values) / len(values) if values else 0.0)
        at += len(chunk.tokens)
    return found
