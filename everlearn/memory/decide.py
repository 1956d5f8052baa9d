"""Importance by the policy's own decision: it is shown a chunk among the window's lines and writes keep, compress with a level, or drop.

What it writes is an action like any other, so a policy can be trained to decide well. An answer that is none of the three leaves the chunk
at `UNDECIDED`, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import tinker

from everlearn.memory.orders import LEVEL_TOKENS, UNDECIDED, keeping, level_of
from everlearn.memory.window import Chunk, Window
from everlearn.rl.prompts import ChatMl


class Decided:
    name, late = "decided", True

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl):
        self.sampler, self.chat, self.undecided = sampler, chat, 0

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        params = tinker.SamplingParams(max_tokens=LEVEL_TOKENS, temperature=0.0, stop=list(self.chat.stop))
        futures = [self.sampler.sample(self.prompt(chunks, place), 1, params) for place in places]
        levels = [level_of(self.chat.decode(list(future.result().sequences[0].tokens))) for future in futures]
        self.undecided += sum(level is None for level in levels)
        return [UNDECIDED if level is None else level for level in levels]

    def prompt(self, chunks: Sequence[Chunk], place: int) -> tinker.ModelInput:
        return self.chat.ask(keeping(chunks, place))
