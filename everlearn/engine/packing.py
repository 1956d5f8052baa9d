"""From datums to rows: which sequences share a forward pass.

A request is cut into pieces of at most `budget` tokens by a rule that depends on the request alone, so a run that is replayed
after a crash sums its gradient in the same order. Pieces of different adapters then share a row while they fit together: that is
what lets many small tenants train at the speed of one large one, and it changes nothing but the shapes of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Some datums of one request, in row order. `width` is the number of targets a position has (1 but for distillation)."""

    datums: tuple[int, ...]
    num_tokens: int
    width: int


def cut(lengths: Sequence[int], widths: Sequence[int], budget: int) -> list[Piece]:
    """Pieces of at most `budget` tokens (a longer datum is a piece of its own). Sorted by width and length: neighbours of equal
    length share an attention call, and the longest come first so that memory peaks early."""
    order = sorted(range(len(lengths)), key=lambda i: (widths[i], -lengths[i], i))
    pieces: list[Piece] = []
    taken: list[int] = []
    total = 0
    for i in order:
        if taken and (total + lengths[i] > budget or widths[i] != widths[taken[0]]):
            pieces.append(Piece(tuple(taken), total, widths[taken[0]]))
            taken, total = [], 0
        taken.append(i)
        total += lengths[i]
    if taken:
        pieces.append(Piece(tuple(taken), total, widths[taken[0]]))
    return pieces


def choose(heads: Sequence[Piece | None], budget: int, first: int) -> list[int]:
    """Which queues give their next piece to this row: starting at `first` in turn, all that fit and have the same width."""
    chosen: list[int] = []
    total, width = 0, 0
    for offset in range(len(heads)):
        i = (first + offset) % len(heads)
        piece = heads[i]
        if piece is None or (chosen and (total + piece.num_tokens > budget or piece.width != width)):
            continue
        chosen.append(i)
        total, width = total + piece.num_tokens, piece.width
    return chosen
