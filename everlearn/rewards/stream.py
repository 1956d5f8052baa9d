"""A reward model that learns from every label as it comes, and says how far it may be trusted.

Features are pooled hidden states of the frozen base model, so they never move under it; what learns is a Bayesian linear head over them. It
belongs to one tenant. `add` takes one label in milliseconds; `fit` makes the same from all labels that there are, and from nothing else: a
label that was deleted is not in them, and was never there. It knows nothing of where labels are kept: whoever keeps them calls `fit` when
`due`, and after each deletion.

Every label is predicted before it is learned from; these predictions are the calibration that is published. Held-out labels are never
learned from, so each version predicts all of them itself. A model isn't a reward before it has earned that (`earned`), and answers of which
it is too unsure belong before a person (`Scores.review_N`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from msgspec.structs import replace

from everlearn.errors import InvalidRequest
from everlearn.rewards import links, posterior, whitening
from everlearn.rewards.calibration import Calibration, calibration, reliability
from everlearn.rewards.labels import CATEGORIES, MOST_FLIPPED, Label, check
from everlearn.rewards.reward import Part

EARLY = 50  # labels of a policy that count as coming from a new one
FIRST_FIT = 32  # labels; then at 64, 128, ...: where a stream would have been fitted again
ENOUGH_LABELS, ENOUGH_AUC, LEAST_HELD_OUT = 300.0, 0.70, 50


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`size`: numbers of a feature vector. `rank`: principal directions that are kept. `heads`: bagged heads. `refit_every`: labels until
    `due`. `review_sd`: standard deviation of the chance of approval above which an answer goes to a person. `flip_rates`: how often labels
    of a group are wrong, where that is known ("thumb" or "thumb:implicit"; see `labels.flip_rate`)."""

    size: int
    rank: int = 256
    heads: int = 8
    refit_every: int = 200
    review_sd: float = 0.2
    flip_rates: dict[str, float] = {}

    def __post_init__(self) -> None:
        for name, rate in self.flip_rates.items():
            if name.split(":")[0] not in CATEGORIES or not 0 <= rate <= MOST_FLIPPED:
                rule = f"names begin with {', '.join(CATEGORIES)}, and rates lie from 0 to {MOST_FLIPPED}"
                raise InvalidRequest(f"flip_rates has {name!r}: {rate:g}; {rule}", param="flip_rates")


class Prediction(msgspec.Struct, frozen=True, array_like=True):
    """What was said of a label that wasn't learned from yet. `chance` and `event` are of the label being a good one."""

    chance: float
    event: bool
    log_probability: float
    shifted: bool
    held_out: bool


class Scores(msgspec.Struct, frozen=True):
    """Of N answers: `utility_N` with its `sd_N`; `chance_N`: that a person who makes no mistake approves, with its `chance_sd_N`;
    `disagreement_N`: standard deviation of the heads' chances; `review_N`: too unsure to be a reward."""

    utility_N: np.ndarray
    sd_N: np.ndarray
    chance_N: np.ndarray
    chance_sd_N: np.ndarray
    disagreement_N: np.ndarray
    review_N: np.ndarray


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What is published with a version. `shifted`: only labels of policies that were new when they came."""

    version: int
    labels: int
    effective_labels: float
    spread: float
    flip_rates: dict[str, float]
    prequential: Calibration
    shifted: Calibration
    held_out: Calibration
    reliability: list[tuple[float, float, int]]
    earned: bool
    why: str


class RewardModel:
    """One tenant's streaming reward model. `add` changes it; everything else only reads."""

    def __init__(self, tenant: str, settings: StreamSettings, state: posterior.State, version: int = 0):
        self.tenant, self.settings, self.state, self.version = tenant, settings, state, version
        self.predictions: list[Prediction] = []
        self.policies: Counter[str] = Counter()
        self.weight = 0.0  # of the labels learned from
        self.since_fit = 0

    @classmethod
    def fit(
        cls, tenant: str, labels: Sequence[Label], settings: StreamSettings, background_ND: np.ndarray | None = None, version: int = 0
    ) -> RewardModel:
        """From all labels, in order of arrival, and features of answers without labels (they only help to whiten).

        A pure function of its arguments: bit for bit the same for the same, on one machine. Plays the stream again label by label, with
        batch fits where the number of labels doubled, so that every prediction is of a model that had seen only earlier labels; ends
        with a batch fit on all, which predicts the held-out labels anew. Raises InvalidRequest for labels that don't fit.
        """
        for label in labels:
            check(label, settings.size)
        learned = [label for label in labels if not label.held_out]
        model = cls(tenant, settings, _fitted([], settings, background_ND, None), version)
        seen, next_fit = 0, FIRST_FIT
        for label in labels:
            model.add(label)
            seen += not label.held_out
            if seen == next_fit:
                model.state = _fitted(learned[:seen], settings, background_ND, model.state)
                next_fit *= 2
        if seen * 2 != next_fit or seen < FIRST_FIT:
            model.state = _fitted(learned, settings, background_ND, model.state)
        model._predict_held_out(labels)
        model.since_fit = 0
        return model

    @property
    def due(self) -> bool:
        """Whether it is time for `fit`: after `refit_every` labels, and while there are few, whenever they doubled."""
        total = len(self.predictions)
        return self.since_fit >= self.settings.refit_every or 0 < total <= 2 * self.since_fit

    def add(self, label: Label) -> Prediction:
        """Predicts the label, then learns from it (unless it is held out). Raises InvalidRequest for a label that doesn't fit."""
        check(label, self.settings.size)
        made = self.predict(label)
        self.predictions.append(made)
        self.since_fit += 1
        if label.policy:
            self.policies[label.policy] += 1
        if not label.held_out:
            posterior.learn(self.state, label)
            self.weight += label.weight
        return made

    def _predict_held_out(self, labels: Sequence[Label]) -> None:
        """Its own predictions of `labels` that are held out in place of those by the younger models that it was."""
        for place, label in enumerate(labels):
            if label.held_out:
                self.predictions[place] = replace(self.predict(label), shifted=self.predictions[place].shifted)

    def predict(self, label: Label) -> Prediction:
        row_R, link = posterior.row(label, self.state.whitening), self.state.link(label)
        mean, variance = row_R @ self.state.mean_R, row_R @ self.state.covariance_RR @ row_R
        chances_K = links.expected(np.array([mean]), np.array([max(variance, 0.0)]), np.asarray(link.cuts), link.noise)[0]
        good = -(-CATEGORIES[label.kind] // 2)  # thumb up, first preferred, four or five stars
        chance, event = float(chances_K[good:].sum()), label.value >= good
        if label.turned:
            chance, event = 1 - chance, not event
        new = bool(label.policy) and len(self.policies) > (label.policy in self.policies) and self.policies[label.policy] < EARLY
        return Prediction(chance, event, float(np.log(max(chances_K[label.value], 1e-300))), new, label.held_out)

    def score(self, features_ND: np.ndarray) -> Scores:
        """What answers are worth. Raises InvalidRequest for features of another size."""
        if features_ND.ndim != 2 or features_ND.shape[1] != self.settings.size:
            rule = f"this reward model takes [N, {self.settings.size}]"
            raise InvalidRequest(f"features have the shape {features_ND.shape}; {rule}", param="features")
        rows_NR = self.state.whitening(features_ND)
        utility_N = rows_NR @ self.state.mean_R
        sd_N = np.sqrt(np.maximum(np.einsum("nr,rs,ns->n", rows_NR, self.state.covariance_RR, rows_NR, optimize=True), 0.0))
        points_NQ = links.sigmoid(utility_N[:, None] + sd_N[:, None] * links.NODES_Q)
        chance_N = points_NQ @ links.WEIGHTS_Q
        chance_sd_N = np.sqrt(np.maximum(points_NQ**2 @ links.WEIGHTS_Q - chance_N**2, 0.0))
        disagreement_N = links.sigmoid(rows_NR @ self.state.heads_MR.T).std(axis=1)
        return Scores(utility_N, sd_N, chance_N, chance_sd_N, disagreement_N, chance_sd_N > self.settings.review_sd)

    def reward(self, features_D: np.ndarray) -> Part:
        """`approval`: the chance of approval. Raises InvalidRequest before the model has earned it."""
        allowed, why = self.earned()
        if not allowed:
            raise InvalidRequest(f"this reward model isn't a reward yet: {why}; collect more labels", param="reward_model")
        scores = self.score(features_D[None])
        told = f"{scores.chance_N[0]:.2f} ± {scores.chance_sd_N[0]:.2f} that a person approves (version {self.version})"
        return Part("approval", float(scores.chance_N[0]), told + ("; too unsure, let a person look" if scores.review_N[0] else ""))

    # ---- what is published ----

    def earned(self) -> tuple[bool, str]:
        """Whether it may be a reward, and why: 300 effective labels and predictions that beat chance, or an area under the curve of 0.70.

        It is judged by at least 50 labels that it hadn't seen: held-out ones where there are enough, else those predicted before they were
        learned."""
        held_out, before = self._of(held_out=True), self._of(held_out=False)
        judged = held_out if held_out.num >= LEAST_HELD_OUT else before
        which = "held-out" if judged is held_out else "prequential"
        area = "no AUC yet" if judged.auc is None else f"{which} AUC {judged.auc:.2f} on {judged.num}"
        figures = f"{self.weight:.0f} effective labels, {area}"
        if judged.auc is None or judged.num < LEAST_HELD_OUT:
            return False, f"{figures}: fewer than {LEAST_HELD_OUT} labels to judge it by"
        if judged.auc >= ENOUGH_AUC:
            return True, f"{figures}: at least {ENOUGH_AUC:g}"
        beats = judged.auc - 1.645 * (judged.auc_error or 0.0) > 0.5
        if self.weight >= ENOUGH_LABELS and beats:
            return True, f"{figures}: at least {ENOUGH_LABELS:.0f} labels, and better than chance"
        missing = f"{ENOUGH_LABELS:.0f} labels" if self.weight < ENOUGH_LABELS else "to be better than chance"
        return False, f"{figures}: needs {missing}, or an AUC of {ENOUGH_AUC:g}"

    def report(self) -> Report:
        allowed, why = self.earned()
        learned = [made for made in self.predictions if not made.held_out]
        return Report(
            version=self.version,
            labels=len(learned),
            effective_labels=self.weight,
            spread=self.state.spread,
            flip_rates={name: link.flip_rate for name, link in sorted(self.state.groups.items())},
            prequential=self._of(held_out=False),
            shifted=self._of(held_out=False, shifted=True),
            held_out=self._of(held_out=True),
            reliability=reliability(np.array([made.chance for made in learned]), np.array([made.event for made in learned], dtype=float)),
            earned=allowed,
            why=why,
        )

    def _of(self, held_out: bool, shifted: bool = False) -> Calibration:
        return of(made for made in self.predictions if made.held_out == held_out and (made.shifted or not shifted))


def of(predictions: Iterable[Prediction]) -> Calibration:
    made = list(predictions)
    return calibration(
        np.array([one.chance for one in made]),
        np.array([one.event for one in made], dtype=np.float64),
        np.array([one.log_probability for one in made]),
    )


def _fitted(
    labels: Sequence[Label], settings: StreamSettings, background_ND: np.ndarray | None, before: posterior.State | None
) -> posterior.State:
    """Whitening and head from these labels; the state before gives only where the search for the spread begins."""
    features = [label.features for label in labels] + [label.other for label in labels if label.other is not None]
    rows = [np.asarray(features, dtype=np.float64).reshape(-1, settings.size)]
    if background_ND is not None:
        rows.append(np.asarray(background_ND, dtype=np.float64))
    found = whitening.fit(np.concatenate(rows), settings.rank)
    return posterior.fit(labels, found, settings.heads, before.spread if before is not None else 1.0, settings.flip_rates)
