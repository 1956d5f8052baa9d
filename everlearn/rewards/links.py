"""How a label comes about: from what an answer is worth to what a person says of it.

One link serves all kinds. A label is one of K categories in order (thumb: down, up; preference: the second, the first; stars: 1 to 5), and
its probability given the utility u (of a preference: the difference of two utilities) is

    p[k] = (1 - noise) (sigma(u - c[k]) - sigma(u - c[k + 1])) + noise / K        c[0] = -inf, c[K] = inf

the cumulative logit (McCullagh, 1980), of which K = 2 is the logistic and, for differences, the Bradley-Terry model, with a share `noise`
of labels that say nothing. A thumb is then wrong with probability noise / 2: its flip rate. Without that term a few wrong labels on clear
answers pull the whole model (they are infinitely surprising); with it their pull is bounded.

Axes: N labels, K categories. Everything is float64, without tensors.
"""

from __future__ import annotations

import numpy as np

NODES_Q, WEIGHTS_Q = np.polynomial.hermite_e.hermegauss(32)  # for expectations over a standard normal
WEIGHTS_Q = WEIGHTS_Q / WEIGHTS_Q.sum()


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * values))


def probabilities(utilities_N: np.ndarray, cuts: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] p and its derivative by the utility. `cuts` [K - 1] rise."""
    above_NC = sigmoid(utilities_N[:, None] - cuts)
    edges = ((0, 0), (1, 1))
    survival = np.pad(above_NC, edges, constant_values=((0, 0), (1, 0)))
    slopes = np.pad(above_NC * (1 - above_NC), edges)
    num = len(cuts) + 1
    p_NK = (1 - noise) * np.maximum(survival[:, :-1] - survival[:, 1:], 0.0) + noise / num
    return p_NK, (1 - noise) * (slopes[:, :-1] - slopes[:, 1:])


def log_likelihood(utilities_N: np.ndarray, values_N: np.ndarray, cuts: np.ndarray, noise: float) -> tuple[np.ndarray, ...]:
    """[N] log p of the given categories, its derivative, and the expected curvature (Fisher information, at least 0)."""
    p_NK, slope_NK = probabilities(utilities_N, cuts, noise)
    p_NK = np.maximum(p_NK, 1e-12)
    rows = np.arange(len(values_N))
    own, slope = p_NK[rows, values_N], slope_NK[rows, values_N]
    return np.log(own), slope / own, (slope_NK**2 / p_NK).sum(axis=1)


def expected(means_N: np.ndarray, variances_N: np.ndarray, cuts: np.ndarray, noise: float) -> np.ndarray:
    """[N, K] probabilities where the utility isn't known but normal, by Gauss-Hermite quadrature."""
    points = means_N[:, None] + np.sqrt(variances_N)[:, None] * NODES_Q
    p, _ = probabilities(points.ravel(), cuts, noise)
    return np.einsum("nqk,q->nk", p.reshape(*points.shape, -1), WEIGHTS_Q)


def matched(mean: float, variance: float, value: int, cuts: np.ndarray, noise: float, weight: float) -> tuple[float, float, float]:
    """Mean and variance of the utility after one label, and the log of the label's probability before it: assumed-density filtering (Opper,
    1998; Minka, 2001), the moments of normal times likelihood. `weight` is the likelihood's power.

    The variance never rises: a label of which the model is sure that it is wrong teaches nothing, instead of unsettling what is known.
    """
    points = mean + np.sqrt(variance) * NODES_Q
    likelihood, _ = probabilities(points, cuts, noise)
    likely = np.maximum(likelihood[:, value], 1e-300)
    mass = WEIGHTS_Q * likely**weight
    total = mass.sum()
    after = float(mass @ points / total)
    spread = float(mass @ (points - after) ** 2 / total)
    return after, min(max(spread, 1e-12), variance), float(np.log(WEIGHTS_Q @ likely))
