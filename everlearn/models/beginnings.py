"""What several sequences of one request begin with is computed once.

In a causal model a token's hidden state depends on the tokens up to it and on nothing else, so that two sequences with the same beginning
have the same states there: a system prompt that all examples of a lesson share, or the prompt of a group of answers. `places` finds them;
the layers then see each such token one time, attention (PackedBatch) sees every sequence whole, and gradients of the copies add up.

Axes: T tokens of the packed row, U of them that are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from everlearn.models.lora import Segment


class Beginnings(NamedTuple):
    """`places_T`: which computed token stands for each token of the row; `firsts_U`: the first token that each of them stands for."""

    places_T: torch.Tensor
    firsts_U: torch.Tensor

    def spread(self, hidden_UD: torch.Tensor) -> torch.Tensor:
        """States of the computed tokens as those of the whole row."""
        return hidden_UD.index_select(0, self.places_T)

    def gathered(self, gradient_TD: torch.Tensor) -> torch.Tensor:
        """A gradient of the whole row as that of the computed tokens, in the order of the row."""
        sums_UD = gradient_TD.new_zeros(len(self.firsts_U), gradient_TD.shape[1])
        return sums_UD.index_add_(0, self.places_T, gradient_TD)

    def same(self, targets_TK: torch.Tensor) -> torch.Tensor:
        """For each token of the row the first one with the same beginning and the same targets: int64 [T]."""
        known: dict[tuple[int, ...], int] = {}
        keys = torch.cat([self.places_T.unsqueeze(1), targets_TK], dim=1).tolist()
        return torch.tensor([known.setdefault(tuple(key), place) for place, key in enumerate(keys)])

    def segments(self, whole: Sequence[Segment]) -> list[Segment]:
        """The segments of the row, one each request, as those of the computed tokens. Requests share nothing with each other."""
        starts = [int(self.places_T[segment.start]) for segment in whole]
        ends = [*starts[1:], len(self.firsts_U)]
        return [replace(segment, start=start, stop=stop) for segment, start, stop in zip(whole, starts, ends, strict=True)]


def places(parts: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """int64 [T]: for each token the number of its beginning, counted in the order of the row. `parts` are the requests' sequences of token
    ids; two tokens have one number if all that stands before them in their sequences is the same, in the same request."""
    known: dict[tuple[int, int], int] = {}
    found: list[int] = []
    for number, sequences in enumerate(parts, 1):
        for tokens in sequences:
            place = -number
            for token in tokens.tolist():
                place = known.setdefault((place, token), len(known))
                found.append(place)
    return np.array(found, dtype=np.int64)


def shared(parts: Sequence[Sequence[np.ndarray]]) -> Beginnings | None:
    """None where no two sequences of a request begin alike."""
    places_T = places(parts)
    _, firsts_U = np.unique(places_T, return_index=True)
    if len(firsts_U) == len(places_T):
        return None
    return Beginnings(torch.from_numpy(places_T), torch.from_numpy(firsts_U))
