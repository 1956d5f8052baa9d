"""What moves logits before a draw: penalties, biases, bans and the masks of grammars.

Each row of a step is edited as its own sequence asks, and all rows that ask are edited together: as (row, token) pairs where few tokens
are concerned, as a bit for each token where a grammar speaks. Nobody pays who doesn't ask. The edits are a function of the sequence's
own tokens, so they keep the promise that a seed gives the same tokens in any batch. They never touch the logits that log-probabilities
are computed from.

Axes: N rows, V vocabulary, M pairs, U words of 32 tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pairs:
    """Tokens of rows, no pair twice, each with its values."""

    rows_M: np.ndarray
    tokens_M: np.ndarray
    values: tuple[np.ndarray, ...] = ()

    def to(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array).to(device) for array in (self.rows_M, self.tokens_M, *self.values))


@dataclass(frozen=True)
class Edits:
    """`penalised`: values repetition [M] and subtracted [M]; `biased`: value added [M]; `allowed_NU`: bit t % 32 of word t // 32."""

    penalised: Pairs | None = None
    biased: Pairs | None = None
    banned: Pairs | None = None
    allowed_NU: np.ndarray | None = None

    def apply(self, shifted_NV: torch.Tensor, peak_N1: torch.Tensor) -> torch.Tensor:
        """Edited copy [N, V] of logits whose rows were lowered by `peak_N1`, lowered again so that each row's largest is 0."""
        scores_NV = shifted_NV.clone()
        if self.penalised is not None:
            rows_M, tokens_M, repetition_M, subtracted_M = self.penalised.to(scores_NV.device)
            peak_M = peak_N1[rows_M, 0]
            logits_M = scores_NV[rows_M, tokens_M] + peak_M
            logits_M = torch.where(logits_M > 0, logits_M / repetition_M, logits_M * repetition_M) - subtracted_M
            scores_NV[rows_M, tokens_M] = logits_M - peak_M
        if self.biased is not None:
            rows_M, tokens_M, added_M = self.biased.to(scores_NV.device)
            scores_NV[rows_M, tokens_M] += added_M
        if self.banned is not None:
            rows_M, tokens_M = self.banned.to(scores_NV.device)
            scores_NV[rows_M, tokens_M] = float("-inf")
        if self.allowed_NU is not None:
            bytes_NB = torch.from_numpy(self.allowed_NU.view(np.uint8)).to(scores_NV.device).int()
            scores_NV.add_(F.embedding(bytes_NB, _of_byte(scores_NV.device)).flatten(1)[:, : scores_NV.shape[1]])
        return scores_NV.sub_(scores_NV.amax(dim=1, keepdim=True))


@functools.cache
def _of_byte(device: torch.device) -> torch.Tensor:
    """float32 [256, 8]: 0 for a bit that is set, -inf for one that isn't."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(bits > 0, 0.0, float("-inf")).to(device)
