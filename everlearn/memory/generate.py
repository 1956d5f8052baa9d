"""Refill by a model: each hole is written anew by whoever samples, with what stands before and behind it in sight.

Autoregressive models see a hole as fill-in-the-middle: prefix, what stood in the hole, suffix, and the order to write it shorter. All holes
of a turn are sent at once, so a server answers them in one batch. What comes back is cut to the cap: a model's idea of a length is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import tinker

from everlearn.errors import InvalidRequest
from everlearn.memory import orders
from everlearn.memory.plan import FLOOR, Hole, Plan
from everlearn.memory.window import Chunk, Window
from everlearn.rl.policy import seed_of
from everlearn.rl.prompts import ChatMl


class Generate:
    """`temperature` 0 is greedy. With a temperature, the same window, holes and `seed` give the same texts."""

    name = "generate"
    sees_others = True

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl, temperature: float = 0.0, seed: int = 0):
        if not temperature >= 0.0:
            raise InvalidRequest(f"temperature is {temperature}; it must be at least 0", param="temperature")
        self.sampler, self.chat, self.temperature, self.seed = sampler, chat, temperature, seed

    def fill(self, plan: Plan) -> list[str]:
        chunks, holes = plan.chunks, plan.holes
        futures = [self.sampler.sample(rewriting(self.chat, chunks, hole), 1, self._params(chunks, hole)) for hole in holes]
        return [
            filled(self.chat, chunks[hole.place], hole, list(future.result().sequences[0].tokens))
            for hole, future in zip(holes, futures, strict=True)
        ]

    def least(self, window: Window, chunk: Chunk) -> int:
        return FLOOR

    def _params(self, chunks: Sequence[Chunk], hole: Hole) -> tinker.SamplingParams:
        seed = seed_of(self.seed, chunks[hole.place].sources, chunks[hole.place].rewrites, hole.cap)
        return tinker.SamplingParams(max_tokens=hole.cap, temperature=self.temperature, stop=list(self.chat.stop), seed=seed)


def rewriting(chat: ChatMl, chunks: Sequence[Chunk], hole: Hole) -> tinker.ModelInput:
    """The order to write a hole anew, the answer begun with its role."""
    return chat.ask(orders.shorter(chunks, hole), begun=orders.begun(chunks[hole.place]))


def written(chat: ChatMl, chunk: Chunk, tokens: list[int]) -> str:
    """What a sampled answer says in the hole: its first paragraph, however long."""
    return orders.written(chat.decode(tokens), chunk)


def filled(chat: ChatMl, chunk: Chunk, hole: Hole, tokens: list[int]) -> str:
    """The same, cut to the cap."""
    return orders.refilled(chat.decode(tokens), chunk, hole.cap, chat.encode)
