"""Importance by the policy's own decision: it is shown a chunk among the window's lines and writes keep, compress with a level, or drop.

What it writes is an action like any other, so a policy can be trained to decide well (everlearn/memory/train.py). An answer that is none of
the three leaves the chunk at `UNDECIDED`, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import tinker

from everlearn.memory.orders import LEVEL_TOKENS, UNDECIDED, keeping, level_of
from everlearn.memory.window import Chunk, Window
from everlearn.rl.prompts import ChatMl


class Decided:
    """`once`: a line that was decided on isn't asked about again while it stands in the window as it is, whatever comes to stand around it.
    That is one answer for each turn of a history, and not several."""

    name, late = "decided", True

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl, once: bool = False):
        self.sampler, self.chat, self.undecided = sampler, chat, 0
        self.known: dict[tuple[str, str], float] | None = {} if once else None

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        if self.known is None:
            return self._asked(chunks, places)
        new = [place for place in places if _said(chunks[place]) not in self.known]
        self.known |= dict(zip((_said(chunks[place]) for place in new), self._asked(chunks, new), strict=True))
        found = [self.known[_said(chunks[place])] for place in places]
        here = {_said(chunk) for chunk in chunks}  # what left the window is forgotten here too
        self.known = {said: level for said, level in self.known.items() if said in here}
        return found

    def _asked(self, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        params = tinker.SamplingParams(max_tokens=LEVEL_TOKENS, temperature=0.0, stop=list(self.chat.stop))
        futures = [self.sampler.sample(decision(self.chat, chunks, place), 1, params) for place in places]
        levels = [level_of(self.chat.decode(list(future.result().sequences[0].tokens))) for future in futures]
        self.undecided += sum(level is None for level in levels)
        return [UNDECIDED if level is None else level for level in levels]


def _said(chunk: Chunk) -> tuple[str, str]:
    return chunk.role, chunk.text


def decision(chat: ChatMl, chunks: Sequence[Chunk], place: int) -> tinker.ModelInput:
    """What is asked about the chunk at `place`: it among its neighbours."""
    return chat.ask(keeping(chunks, place))
