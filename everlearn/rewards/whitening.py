"""Features on a common scale: centred, rotated to their principal directions, and divided by their spread there.

A prior of one scale then means the same in every direction. Without it the few directions in which hidden states are huge decide all.
"""

from __future__ import annotations

import msgspec
import numpy as np

SHRINKAGE = 0.1  # of the mean variance, added to each: small directions aren't blown up to the size of large ones


class Whitening(msgspec.Struct, frozen=True):
    """x -> [(x - mean) @ projection, 1]: R whitened numbers and a constant, from D features."""

    mean_D: np.ndarray
    projection_DR: np.ndarray

    @property
    def size(self) -> int:
        return len(self.mean_D)

    @property
    def rank(self) -> int:
        """With the constant."""
        return int(self.projection_DR.shape[1]) + 1

    def __call__(self, features_ND: np.ndarray) -> np.ndarray:
        """[N, R + 1]"""
        white = (features_ND - self.mean_D) @ self.projection_DR
        return np.concatenate([white, np.ones((len(white), 1))], axis=1)


def fit(features_ND: np.ndarray, most: int) -> Whitening:
    """The `most` directions of largest variance, at most as many as the data have; nothing but the constant without data."""
    num, size = features_ND.shape
    if num < 2:
        return Whitening(features_ND.mean(axis=0) if num else np.zeros(size), np.zeros((size, 0)))
    mean_D = features_ND.mean(axis=0)
    centred = features_ND - mean_D
    covariance = centred.T @ centred / (num - 1)
    variances, directions = np.linalg.eigh(covariance)
    keep = np.argsort(variances)[::-1][: min(most, num - 1, size)]
    keep = keep[variances[keep] > 1e-10 * max(float(variances[-1]), 1e-300)]
    signs = np.sign(directions[np.abs(directions[:, keep]).argmax(axis=0), keep])  # an eigenvector's sign is the library's whim
    projection_DR = directions[:, keep] * signs / np.sqrt(variances[keep] + SHRINKAGE * variances.mean())
    return Whitening(mean_D, np.ascontiguousarray(projection_DR))
