"""Importance by the policy's own decision: it is shown a chunk among the window's lines and writes keep, compress with a level, or drop.

What it writes is an action like any other, so a policy can be trained to decide well (everlearn/memory/train.py). An answer that is none of
the three leaves the chunk at `UNDECIDED`, and is counted.

`Certain` doesn't let it write: it asks how sure the policy is. Of a long history's chunks one in a hundred is needed, and a policy that is
wrong about one in twenty says keep of five times as many. What ranks them is how sure it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tinker

from everlearn.memory.orders import ALTERNATIVES, DROP, KEEP, LEVEL_TOKENS, UNDECIDED, keeping, level_of, sure_of
from everlearn.memory.refill import Extract
from everlearn.memory.window import Chunk, Encode, Window
from everlearn.rl.prompts import ChatMl

Said = tuple[str, str]  # a line: its role and its text
Ask = Callable[[Sequence[Chunk], Sequence[int]], list[float]]  # of the chunks at these places what each is worth


class Once:
    """What was asked of each line. It isn't asked again while the line stands in the window as it is, whatever comes to stand around it:
    that is one answer for each turn of a history, and not several. What is left of a chunk that was cut is worth at most what the chunk
    was: a bare remainder ("I understand.") is the easiest to be mistaken about, and would outlast all others."""

    def __init__(self) -> None:
        self.known: dict[Said, float] = {}

    def of(self, chunks: Sequence[Chunk], places: Sequence[int], ask: Ask) -> list[float]:
        new = [place for place in places if chunks[place].said not in self.known]
        self.known |= dict(zip((chunks[place].said for place in new), ask(chunks, new), strict=True))
        found = [_at_most(self.known[chunks[place].said], chunks[place]) for place in places]
        here = {chunk.said for chunk in chunks}  # what left the window is forgotten here too
        self.known = {said: level for said, level in self.known.items() if said in here}
        return found


class ByPolicy:
    """Asks for a level of each line by `_levels`; one that is none leaves the line at `UNDECIDED`, and is counted. `once`: a line is asked
    about once (`Once`)."""

    late = True

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl, once: bool = False):
        self.sampler, self.chat, self.undecided = sampler, chat, 0
        self.once = Once() if once else None

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        return self._asked(chunks, places) if self.once is None else self.once.of(chunks, places, self._asked)

    def _asked(self, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        return self.levels([(chunks, place) for place in places])

    def levels(self, asked: Sequence[tuple[Sequence[Chunk], int]]) -> list[float]:
        """What each of these lines is worth, 0 to 1, every one among chunks of its own. Raises what the server answers."""
        levels = self._levels([decision(self.chat, chunks, place) for chunks, place in asked])
        self.undecided += sum(level is None for level in levels)
        return [UNDECIDED if level is None else level for level in levels]

    def _levels(self, orders: Sequence[tinker.ModelInput]) -> list[float | None]:
        raise NotImplementedError


class Decided(ByPolicy):
    """By what the policy writes, greedily."""

    name = "decided"

    def _levels(self, orders: Sequence[tinker.ModelInput]) -> list[float | None]:
        params = tinker.SamplingParams(max_tokens=LEVEL_TOKENS, temperature=0.0, stop=list(self.chat.stop))
        futures = [self.sampler.sample(order, 1, params) for order in orders]
        return [level_of(self.chat.decode(list(future.result().sequences[0].tokens))) for future in futures]


class Certain(ByPolicy):
    """By how sure the policy is that a line is to be kept rather than dropped (`sure_of`): one token of an answer is drawn for each line,
    and what counts is which others were likely."""

    name = "certain"

    def _levels(self, orders: Sequence[tinker.ModelInput]) -> list[float | None]:
        params = tinker.SamplingParams(max_tokens=1, temperature=0.0)
        futures = [self.sampler.sample(order, 1, params, topk_sample_logprobs=ALTERNATIVES) for order in orders]
        keep, drop = (self.chat.encode(word)[0] for word in (KEEP, DROP))
        likely = [dict((future.result().sequences[0].topk_logprobs or [None])[0] or ()) for future in futures]
        return [sure_of(one, keep, drop) for one in likely]


class Surest(Extract):
    """Extraction by the policy: of a chunk's sentences those stay that it is surest to keep. Each is asked about as a line of its own where
    the chunk stands, and once while it stands in the window; the only sentence of a chunk isn't asked about."""

    name = "surest"

    def __init__(self, encode: Encode, by: ByPolicy):
        super().__init__(encode, lambda *_: UNDECIDED)
        self.by = by
        self.known: dict[Said, float] = {}

    def _scores(self, window: Window, role: str, text: str, pieces: Sequence[str]) -> list[float]:
        if len(pieces) < 2:
            return [UNDECIDED] * len(pieces)
        chunks = window.chunks
        place = next((i for i, chunk in enumerate(chunks) if chunk.role == role and text in chunk.text), len(chunks))
        new = [piece for piece in dict.fromkeys(pieces) if (role, piece) not in self.known]
        alone = [(*chunks[:place], Chunk(role, piece, (), (0,), 0), *chunks[place + 1 :]) for piece in new]
        levels = self.by.levels([(one, place) for one in alone])
        here = {said: level for said, level in self.known.items() if said[1] in pieces or _stands(said, chunks)}
        self.known = here | {(role, piece): level for piece, level in zip(new, levels, strict=True)}
        return [self.known[role, piece] for piece in pieces]


def _stands(said: Said, chunks: Sequence[Chunk]) -> bool:
    return any(chunk.role == said[0] and said[1] in chunk.text for chunk in chunks)


def _at_most(level: float, chunk: Chunk) -> float:
    return min(level, chunk.importance) if chunk.rewrites and chunk.importance != UNDECIDED else level


def decision(chat: ChatMl, chunks: Sequence[Chunk], place: int) -> tinker.ModelInput:
    """What is asked about the chunk at `place`: it among its neighbours."""
    return chat.ask(keeping(chunks, place))
