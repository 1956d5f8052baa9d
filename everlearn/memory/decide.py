"""Importance by the policy's own decision: it is shown a chunk among the window's lines and writes keep, compress with a level, or drop.

What it writes is an action like any other, so a policy can be trained to decide well. An answer that is none of the three leaves the chunk
at `UNDECIDED`, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import tinker

from everlearn.memory.generate import AROUND
from everlearn.memory.window import Chunk, Window, line
from everlearn.rl.prompts import ChatMl

UNDECIDED = 0.5
TOKENS = 6
ANSWER = re.compile(r"\W*(keep|drop|compress(?:\W*([1-9]))?)\b", re.IGNORECASE)
ORDER = (
    "A memory has room for few lines. Say what becomes of the marked line: keep, compress 1 (almost nothing stays) to compress 9 (almost "
    "all stays), or drop.\n\n{before}>>> {line}{after}\nAnswer with keep, compress and a number, or drop."
)


class Decided:
    name, late = "decided", True

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl):
        self.sampler, self.chat, self.undecided = sampler, chat, 0

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        params = tinker.SamplingParams(max_tokens=TOKENS, temperature=0.0, stop=list(self.chat.stop))
        futures = [self.sampler.sample(self.prompt(chunks, place), 1, params) for place in places]
        levels = [level_of(self.chat.decode(list(future.result().sequences[0].tokens))) for future in futures]
        self.undecided += sum(level is None for level in levels)
        return [UNDECIDED if level is None else level for level in levels]

    def prompt(self, chunks: Sequence[Chunk], place: int) -> tinker.ModelInput:
        before = "".join(line(other.role, other.text[:400]) for other in chunks[max(0, place - AROUND) : place])
        after = "".join(line(other.role, other.text[:400]) for other in chunks[place + 1 : place + 1 + AROUND])
        return self.chat.ask(ORDER.format(before=before, line=line(chunks[place].role, chunks[place].text[:2000]), after=after))


def level_of(answer: str) -> float | None:
    """keep: 1, drop: 0, compress N: N / 10 (5 without a number); None for anything else."""
    found = ANSWER.match(answer)
    if found is None:
        return None
    word = found[1].lower()
    if word == "keep":
        return 1.0
    return 0.0 if word == "drop" else int(found[2] or 5) / 10.0
