"""Mask: which chunks are worked on now. Nothing is while the window has room; under pressure, those that are worth least."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.memory.window import Chunk


class Masking(msgspec.Struct, frozen=True):
    """`most`: how many chunks are refilled in one turn, at most. `keep`: the share of a masked chunk that is to stay, on average.
    `slack`: the share of the window that is freed beyond what is needed, so that not every turn rewrites something. `half_life`: after
    so many turns a chunk is worth half; 0: age alone changes nothing. `inertia`: how much more each rewrite makes a chunk worth, because
    what was rewritten again and again decays."""

    most: int = 8
    keep: float = 0.75
    slack: float = 0.02
    half_life: float = 0.0
    inertia: float = 0.1

    def __post_init__(self) -> None:
        for name, low, high in (("most", 1, 64), ("keep", 0, 0.95), ("slack", 0, 0.5), ("half_life", 0, 1e9), ("inertia", 0, 10)):
            if not low <= getattr(self, name) <= high:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must lie in {low}..{high}", param=name)


def worth(chunk: Chunk, now: int, masking: Masking) -> float:
    """importance x 0.5 ^ (age / half_life) x (1 + inertia x rewrites)"""
    decay = 0.5 ** ((now - chunk.born) / masking.half_life) if masking.half_life else 1.0
    return chunk.importance * decay * (1.0 + masking.inertia * chunk.rewrites)


def select(chunks: Sequence[Chunk], kept: frozenset[int], need: int, now: int, masking: Masking) -> list[int]:
    """Places of the masked chunks, in order. None if `need` (tokens to be freed) is 0 or less.

    The chunks outside of `kept` by rising worth, the older first among equals, until (1 - keep) of what they hold covers the need; no more
    than `most`, unless even forgetting those wouldn't be enough: then as many as that takes.
    """
    if need <= 0:
        return []
    order = sorted(
        (place for place in range(len(chunks)) if place not in kept),
        key=lambda place: (worth(chunks[place], now, masking), chunks[place].born, place),
    )
    masked: list[int] = []
    held = 0
    for place in order:
        if held * (1.0 - masking.keep) >= need or (len(masked) >= masking.most and held >= need):
            break
        masked.append(place)
        held += len(chunks[place].tokens)
    return sorted(masked)
