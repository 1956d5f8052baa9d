"""What the labels say of the weights of a linear utility: an exact batch fit, and one label at a time.

The prior is normal with mean 0: one scale for all whitened directions, a wide one for the constant. The batch fit is the maximum a
posteriori by Fisher scoring and a normal around it (Laplace); its scale, the rates of noise and the cuts between stars are those under
which the labels are most probable (evidence: MacKay, 1992), for the scale decides nearly everything where labels are few. The online update
matches moments (`links.matched`) and changes mean and covariance by rank one: R^2 numbers, whatever came before.

Axes: N labels, R whitened features with the constant, M heads. Pure functions of arrays; a state is a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from everlearn.rewards import links
from everlearn.rewards.labels import Label, bagged
from everlearn.rewards.whitening import Whitening

SPREADS = (0.1, 0.2, 0.35, 0.6, 1.0, 1.6, 2.5, 4.0, 7.0)  # of utilities under the prior; a weight's scale is that divided by sqrt(R)
NOISES = (0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # shares of labels that say nothing; half of that is a thumb's flip rate
CONSTANT = 2.0  # the prior's standard deviation of the constant
ROUNDS = 2  # of choosing the spread, then each group's noise and cuts
CHOOSE_ON = 3000  # newest labels that the choice looks at
MAX_STEPS = 40


class Link(msgspec.Struct, frozen=True):
    """How one group of labels comes about: its cuts and its share of noise."""

    cuts: tuple[float, ...]
    noise: float

    @property
    def flip_rate(self) -> float:
        """How often a label of this group isn't what its giver's opinion would have been."""
        num = len(self.cuts) + 1
        return self.noise * (num - 1) / num


START = {"thumb": Link((0.0,), 0.2), "preference": Link((0.0,), 0.2), "stars": Link((-2.0, -0.7, 0.7, 2.0), 0.2)}


class State(msgspec.Struct):
    """A normal over weights, the bagged heads' means, and under what assumptions they were found."""

    mean_R: np.ndarray
    covariance_RR: np.ndarray
    heads_MR: np.ndarray
    whitening: Whitening
    spread: float
    groups: dict[str, Link]

    def link(self, label: Label) -> Link:
        return self.groups.get(label.noise_group) or START[label.kind]


class Design(msgspec.Struct, frozen=True):
    """Labels as arrays. `rows_NR`: whitened features; of a preference the difference of two, so that the constant cancels."""

    rows_NR: np.ndarray
    values_N: np.ndarray
    weights_N: np.ndarray
    members: dict[str, np.ndarray]  # group -> its rows

    def take(self, rows: np.ndarray) -> Design:
        members = {name: np.flatnonzero(np.isin(rows, member)) for name, member in self.members.items()}
        return Design(self.rows_NR[rows], self.values_N[rows], self.weights_N[rows], {k: v for k, v in members.items() if len(v)})


def row(label: Label, whitening: Whitening) -> np.ndarray:
    first_R = whitening(label.features[None])[0]
    return first_R if label.other is None else first_R - whitening(label.other[None])[0]


def design(labels: Sequence[Label], whitening: Whitening) -> Design:
    rows_NR = np.array([row(label, whitening) for label in labels]).reshape(len(labels), whitening.rank)
    groups = np.array([label.noise_group for label in labels])
    members = {name: np.flatnonzero(groups == name) for name in sorted(set(groups.tolist()))}
    values_N = np.array([label.value for label in labels], dtype=np.int64)
    return Design(rows_NR, values_N, np.array([label.weight for label in labels], dtype=np.float64), members)


def precision(rank: int, spread: float) -> np.ndarray:
    """[R] of the prior."""
    precision_R = np.full(rank, max(rank - 1, 1) / spread**2)
    precision_R[-1] = 1 / CONSTANT**2
    return precision_R


def with_flip_rate(link: Link, rate: float | None) -> Link:
    num = len(link.cuts) + 1
    return link if rate is None else Link(link.cuts, rate * num / (num - 1))


def prior(whitening: Whitening, num_heads: int, spread: float, flip_rates: Mapping[str, float]) -> State:
    """The state before any label."""
    rank = whitening.rank
    groups = {name: with_flip_rate(START[name.split(":")[0]], rate) for name, rate in flip_rates.items()}
    return State(np.zeros(rank), np.diag(1 / precision(rank, spread)), np.zeros((num_heads, rank)), whitening, spread, groups)


# ---- one label ----


def learn(state: State, label: Label) -> float:
    """Moves the state by one label, in place; the log of the label's probability before it. Costs R^2 multiplications, not N."""
    row_R, link = row(label, state.whitening), state.link(label)
    cuts = np.asarray(link.cuts)
    reach_R = state.covariance_RR @ row_R
    variance = float(row_R @ reach_R)
    if variance <= 1e-12:  # a preference between an answer and itself
        return float(np.log(links.expected(np.zeros(1), np.zeros(1), cuts, link.noise)[0, label.value]))
    mean = float(row_R @ state.mean_R)
    after, spread, told = links.matched(mean, variance, label.value, cuts, link.noise, label.weight)
    counts_M = bagged(label, len(state.heads_MR)) * label.weight
    for head, count in enumerate(counts_M):
        if count:
            own = float(row_R @ state.heads_MR[head])
            moved, _, _ = links.matched(own, variance, label.value, cuts, link.noise, count)
            state.heads_MR[head] += reach_R * ((moved - own) / variance)
    state.mean_R = state.mean_R + reach_R * ((after - mean) / variance)
    shrink = (variance - spread) / variance**2
    state.covariance_RR -= np.outer(reach_R * shrink, reach_R)
    return told


# ---- all labels ----


def objective(
    found: Design, groups: dict[str, Link], weights_R: np.ndarray, precision_R: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log posterior (without constants), its gradient [R], and the labels' curvature [N]."""
    utilities_N = found.rows_NR @ weights_R
    value, slope_N, curvature_N = 0.0, np.zeros(len(utilities_N)), np.zeros(len(utilities_N))
    for name, rows in found.members.items():
        link = groups[name]
        logs, slopes, curvatures = links.log_likelihood(utilities_N[rows], found.values_N[rows], np.asarray(link.cuts), link.noise)
        counts = found.weights_N[rows]
        value += float(counts @ logs)
        slope_N[rows], curvature_N[rows] = counts * slopes, counts * curvatures
    value -= 0.5 * float(precision_R @ weights_R**2)
    return value, found.rows_NR.T @ slope_N - precision_R * weights_R, curvature_N


def hessian(found: Design, curvature_N: np.ndarray, precision_R: np.ndarray) -> np.ndarray:
    matrix = found.rows_NR.T @ (found.rows_NR * curvature_N[:, None])
    matrix[np.diag_indices_from(matrix)] += precision_R
    return matrix


def maximise(found: Design, groups: dict[str, Link], spread: float, start_R: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Weights of highest posterior, the log evidence there (Laplace, with expected curvature), and the posterior's precision [R, R].

    Fisher scoring with halved steps; stops where the gradient, measured by the curvature, is below 1e-10.
    """
    precision_R = precision(len(start_R), spread)
    weights_R = start_R.copy()
    value, slope_R, curvature_N = objective(found, groups, weights_R, precision_R)
    for _ in range(MAX_STEPS):
        matrix = hessian(found, curvature_N, precision_R)
        step_R = np.linalg.solve(matrix, slope_R)
        if slope_R @ step_R < 1e-10:
            break
        size = 1.0
        while size > 1e-4:
            trial = objective(found, groups, weights_R + size * step_R, precision_R)
            if trial[0] > value:
                break
            size /= 2
        else:
            break
        weights_R = weights_R + size * step_R
        value, slope_R, curvature_N = trial
    matrix = hessian(found, curvature_N, precision_R)
    half_log = float(np.log(np.diag(np.linalg.cholesky(matrix))).sum())
    return weights_R, value + 0.5 * float(np.log(precision_R).sum()) - half_log, matrix


def choose(
    found: Design, kinds: dict[str, str], spread: float, groups: dict[str, Link], known: Collection[str] = ()
) -> tuple[float, dict[str, Link], np.ndarray]:
    """The spread, each group's noise and the stars' cuts under which the labels are most probable, one after the other, and the weights.

    Much noise with a wide spread and little noise with a narrow one explain the same labels nearly as well: order is learned all the same,
    but who knows the noise of a group (`known`; from labels that were given twice) knows the scale as well.
    """
    weights_R = np.zeros(found.rows_NR.shape[1])
    if len(found.values_N) > CHOOSE_ON:
        found = found.take(np.arange(len(found.values_N) - CHOOSE_ON, len(found.values_N)))
    for _ in range(ROUNDS):
        for name, rows in found.members.items():
            if kinds[name] == "stars":
                groups = groups | {name: _cut(found.rows_NR[rows] @ weights_R, found.values_N[rows], groups[name])}
        spread, weights_R = _best(partial(_with_spread, found, groups), SPREADS, spread, weights_R)
        for name in found.members:
            if name in known:
                continue
            noise, weights_R = _best(partial(_with_noise, found, groups, spread, name), NOISES, groups[name].noise, weights_R)
            groups = groups | {name: Link(groups[name].cuts, noise)}
    return spread, groups, weights_R


def _with_spread(found: Design, groups: dict[str, Link], spread: float, start_R: np.ndarray) -> tuple[float, np.ndarray]:
    weights_R, evidence, _ = maximise(found, groups, spread, start_R)
    return evidence, weights_R


def _with_noise(
    found: Design, groups: dict[str, Link], spread: float, name: str, noise: float, start_R: np.ndarray
) -> tuple[float, np.ndarray]:
    weights_R, evidence, _ = maximise(found, groups | {name: Link(groups[name].cuts, noise)}, spread, start_R)
    return evidence + math.log(noise) + 2 * math.log(1 - noise), weights_R  # Beta(2, 3): flip rates as people have them, about 0.2


def _best(
    score: Callable[[float, np.ndarray], tuple[float, np.ndarray]], grid: Sequence[float], start: float, at_R: np.ndarray
) -> tuple[float, np.ndarray]:
    """Climbs the grid from the value next to `start` to the nearest maximum."""
    place = min(range(len(grid)), key=lambda number: abs(grid[number] - start))
    known: dict[int, tuple[float, np.ndarray]] = {}

    def value(number: int) -> float:
        if number not in known:
            known[number] = score(grid[number], known[place][1] if place in known else at_R)
        return known[number][0]

    while True:
        near = max((number for number in (place, place - 1, place + 1) if 0 <= number < len(grid)), key=value)
        if near == place:
            return grid[place], known[place][1]
        place = near


def _cut(utilities_N: np.ndarray, values_N: np.ndarray, link: Link) -> Link:
    """Cuts at which each category is expected as often as it came."""
    num = len(link.cuts) + 1
    cuts: list[float] = []
    for category in range(1, num):
        share = (float((values_N >= category).sum()) + (num - category) / num) / (len(values_N) + 1)
        share = min(max((share - link.noise * (num - category) / num) / (1 - link.noise), 0.005), 0.995)
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if links.sigmoid(utilities_N - middle).mean() > share else (low, middle)
        cuts.append(max(low, cuts[-1] + 1e-3) if cuts else low)
    return Link(tuple(cuts), link.noise)


def fit(
    labels: Sequence[Label],
    whitening: Whitening,
    num_heads: int,
    spread: float = 1.0,
    flip_rates: Mapping[str, float] | None = None,
) -> State:
    """The state that these labels lead to, and nothing else: a pure function of them, so that a label that is gone was never there.

    `flip_rates` of groups where they are known; of the others they are found with the spread.
    """
    given = dict(flip_rates or {})
    if not labels:
        return prior(whitening, num_heads, spread, given)
    found = design(labels, whitening)
    kinds = {label.noise_group: label.kind for label in labels}
    groups = {name: with_flip_rate(START[kind], given.get(name)) for name, kind in kinds.items()}
    spread, groups, start_R = choose(found, dict(kinds), spread, groups, given)
    return batch(labels, found, whitening, num_heads, spread, groups, start_R)


def batch(
    labels: Sequence[Label],
    found: Design,
    whitening: Whitening,
    num_heads: int,
    spread: float,
    groups: dict[str, Link],
    start_R: np.ndarray,
) -> State:
    """The normal around the most probable weights, and the heads, under given assumptions."""
    mean_R, _, matrix = maximise(found, groups, spread, start_R)
    counts_NM = np.array([bagged(label, num_heads) for label in labels]).reshape(len(labels), num_heads)
    heads = []
    for head in range(num_heads):
        seen = np.flatnonzero(counts_NM[:, head])
        own = found.take(seen)
        own = Design(own.rows_NR, own.values_N, own.weights_N * counts_NM[seen, head], own.members)
        heads.append(maximise(own, groups, spread, mean_R)[0])
    inverse = np.linalg.inv(matrix)
    covariance_RR = np.ascontiguousarray((inverse + inverse.T) / 2)  # in the order in which it comes back from the disk: sums round alike
    return State(mean_R, covariance_RR, np.array(heads).reshape(num_heads, -1), whitening, spread, groups)
