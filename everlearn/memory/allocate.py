"""Allocate: how many tokens each masked chunk gets. Pure integers; water-filling with floors."""

from __future__ import annotations

from collections.abc import Sequence

from everlearn.errors import InvalidRequest


def allocate(importance: Sequence[float], lengths: Sequence[int], free: int, floors: Sequence[int]) -> list[int]:
    """Token budgets, one for each chunk: at most its length, and in all at most `free`.

    A budget is 0 (the chunk is forgotten) or at least min(floor, length): with less of it, nothing would be said. First, by falling
    importance (the later chunk first among equals: what is newer stays), chunks get their floor until one's no longer fits; it and all
    behind it get 0, and so does every chunk of importance 0. Then what is left is poured over those that have a floor,

        b_i = min(length_i, floor_i + level x importance_i),

    with the level at which it is used up, rounded down; what rounding left goes one token each in the same order.

    So, for chunks of equal length and floor, more importance is never less budget; a chunk's own budget never falls when its importance
    rises; and `free` is used up unless all that have a floor are whole.
    """
    if not len(importance) == len(lengths) == len(floors):
        counts = f"{len(importance)} importances for {len(lengths)} lengths and {len(floors)} floors"
        raise InvalidRequest(f"{counts}; give one for each chunk", param="importance")
    if any(not value >= 0.0 or value == float("inf") for value in importance) or any(number < 1 for number in (*lengths, *floors)):
        raise InvalidRequest("importances must be finite and at least 0, lengths and floors at least 1", param="importance")
    order = sorted((i for i in range(len(lengths)) if importance[i] > 0.0), key=lambda i: (-importance[i], -i))
    budgets = [0] * len(lengths)
    left, kept = free, []
    for i in order:
        least = min(floors[i], lengths[i])
        if least > left:
            break
        budgets[i], left = least, left - least
        kept.append(i)
    level = _level([(lengths[i] - budgets[i], importance[i]) for i in kept], left)
    for i in kept:
        # `level` may be off by the rounding of floats: never beyond what is left.
        more = min(lengths[i] - budgets[i], int(level * importance[i]), left)
        budgets[i], left = budgets[i] + more, left - more
    while left > 0:
        growing = [i for i in kept if budgets[i] < lengths[i]][:left]
        if not growing:
            break
        for i in growing:
            budgets[i] += 1
        left -= len(growing)
    return budgets


def _level(rooms: Sequence[tuple[int, float]], volume: int) -> float:
    """The level t at which sum of min(room, t x weight) is `volume`, or at which all are full."""
    by_level = sorted(rooms, key=lambda pair: pair[0] / pair[1])
    weight, level = sum(pair[1] for pair in rooms), 0.0
    left = float(volume)
    for room, own in by_level:
        full = room / own
        if weight <= 0.0 or (full - level) * weight > left:
            return level + left / weight if weight > 0.0 else level
        left -= (full - level) * weight
        weight -= own
        level = full
    return level
