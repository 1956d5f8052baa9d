#!/usr/bin/env python3
"""The streaming reward model on simulated people whose opinion is known: is it right, is it calibrated, what does a label cost, and what
becomes of a policy that is trained against it.

python benchmarks/reward_model.py --only table --seed 0 --folder parts      3 kinds of labels x 3 rates of noise, with and without a shift
python benchmarks/reward_model.py --only optimise --seed 0 --folder parts   frozen against streaming under optimisation
python benchmarks/reward_model.py --only cost --folder parts                milliseconds for a label, seconds for a re-fit
python benchmarks/reward_model.py --collect --folder parts                  the result file and its plot

`--small` makes a run of seconds. People's utility is linear in 128 features whose scales fall from 30 to 0.3, rotated; its standard
deviation is 3. Everything is compared with opinions that nobody flipped, on answers without labels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result

from everlearn.rewards import guard, links, posterior
from everlearn.rewards.calibration import auc, ece
from everlearn.rewards.labels import Label
from everlearn.rewards.stream import RewardModel, StreamSettings
from everlearn.rewards.whitening import Whitening

KINDS, FLIPS, COUNTS = ("thumb", "preference", "stars"), (0.0, 0.1, 0.25), (100, 300, 1000)
SIZE, SPREAD, SHIFT = 128, 3.0, 1.5
DIM, ROUNDS, EACH, FIRST, SAMPLES, PACE = 24, 30, 40, 300, 16, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["table", "optimise", "cost"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("reward-model-parts"), help="where single runs are written, and collected from")
    parser.add_argument("--small", action="store_true", help="a quick look: fewer labels, fewer rounds")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-reward-model.json)")
    args = parser.parse_args()
    if args.collect:
        collect(args)
        return
    runs: dict[str, Callable[[], Any]] = {
        "table": lambda: table(args.seed, COUNTS[:2] if args.small else COUNTS),
        "optimise": lambda: optimise(args.seed, 6 if args.small else ROUNDS),
        "cost": lambda: cost(300 if args.small else 4000),
    }
    for name in [args.only] if args.only else list(runs):
        started = time.perf_counter()
        row = {"part": name, "seed": args.seed, "small": args.small, "rows": runs[name](), "seconds": 0.0}
        row["seconds"] = round(time.perf_counter() - started, 1)
        args.folder.mkdir(parents=True, exist_ok=True)
        (args.folder / f"{name}-{args.seed}.json").write_text(json.dumps(row))
        print(name, args.seed, f"{row['seconds']} s", json.dumps(row["rows"][-1]))


# ---- people ----


class People:
    def __init__(self, seed: int, size: int = SIZE):
        self.rng = np.random.default_rng(seed)
        rotation, _ = np.linalg.qr(self.rng.normal(size=(size, size)))
        self.mixing = np.geomspace(30.0, 0.3, size)[:, None] * rotation
        weights = self.rng.normal(size=size)
        self.weights = weights * SPREAD / np.linalg.norm(weights)

    def answers(self, num: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and utilities [N]. A policy that was trained moves towards what people like, and somewhere else."""
        z = self.rng.normal(size=(num, len(self.weights)))
        z += shift * (self.weights / np.linalg.norm(self.weights) + np.eye(len(self.weights))[0])
        return z @ self.mixing, z @ self.weights

    def opinion(self, utilities: np.ndarray) -> np.ndarray:
        return self.rng.random(len(utilities)) < links.sigmoid(utilities)

    def labels(self, kind: str, num: int, flips: float, shift: float = 0.0, policy: str = "") -> list[Label]:
        (first, u), (second, v) = self.answers(num, shift), self.answers(num, shift)
        if kind == "stars":
            values = np.digitize(u + self.rng.logistic(size=num), [-3, -1, 1, 3])
            values = np.where(self.rng.random(num) < flips, self.rng.integers(5, size=num), values)
        else:
            values = self.opinion(u - v if kind == "preference" else u) ^ (self.rng.random(num) < flips)
        return [
            Label(
                id=f"{policy}{place}",
                kind=kind,
                value=int(values[place]),
                features=first[place],
                other=second[place] if kind == "preference" else None,
                policy=policy,
            )
            for place in range(num)
        ]


class Sgd:
    """What is often taken instead: logistic regression by stochastic gradients, one step for each label. It knows of no noise."""

    def __init__(self, white: Whitening):
        self.white, self.weights, self.seen = white, np.zeros(white.rank), 0

    def add(self, label: Label) -> None:
        row = posterior.row(label, self.white)
        self.seen += 1
        target = label.value / (4 if label.kind == "stars" else 1)
        self.weights += 0.1 / self.seen**0.25 * (target - links.sigmoid(row @ self.weights)) * row

    def chances(self, features: np.ndarray) -> np.ndarray:
        return links.sigmoid(self.white(features) @ self.weights)


# ---- the table ----


def table(seed: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for flips in FLIPS:
            rows += cell(seed, kind, flips, counts)
    return rows


def cell(seed: int, kind: str, flips: float, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """One kind of labels at one rate of noise: right and calibrated after so many labels, before and after the policy has moved."""
    people = People(1000 * seed + 10 * KINDS.index(kind) + FLIPS.index(flips))
    background, _ = people.answers(500)
    labels = people.labels(kind, max(counts), flips, policy="support@1")
    settings = StreamSettings(size=SIZE)
    tests = {"none": people.answers(4000), "shifted": people.answers(4000, SHIFT)}
    rows = []
    for num in counts:
        model = RewardModel.fit("simulation", labels[:num], settings, background)
        wide = posterior.batch(*wide_prior(labels[:num], model.state.whitening))
        sgd = Sgd(model.state.whitening)
        for label in labels[:num]:
            sgd.add(label)
        for shift, (features, utilities) in tests.items():
            truth = people.opinion(utilities).astype(float)
            found = {
                "everlearn": model.score(features).chance_N,
                "wide_prior": RewardModel("simulation", settings, wide).score(features).chance_N,
                "sgd": sgd.chances(features),
            }
            measured = {name: {"auc": auc(chances, truth), "ece": ece(chances, truth)} for name, chances in found.items()}
            rows.append({"kind": kind, "flips": flips, "labels": num, "shift": shift, **measured, "best_auc": auc(utilities, truth)})
        report = model.report()
        rows[-2] |= {"prequential": {"log_loss": report.prequential.log_loss, "ece": report.prequential.ece, "auc": report.prequential.auc}}
        rows[-2] |= {"flip_rate_found": report.flip_rates.get(kind), "earned": report.earned}
    rows[-2] |= {"online_against_batch": online(people, labels, settings, background)}
    rows[-1] |= {"after_100_labels_of_the_new_policy": moved(people, kind, flips, model, tests["shifted"])}
    return rows


def wide_prior(labels: list[Label], white: Whitening) -> tuple[Any, ...]:
    """The arguments of a batch fit with a prior that says nothing and a link without noise."""
    found = posterior.design(labels, white)
    groups = {name: posterior.Link(posterior.START[name].cuts, 1e-6) for name in found.members}
    return labels, found, white, 8, 30.0, groups, np.zeros(white.rank)


def online(people: People, labels: list[Label], settings: StreamSettings, background: np.ndarray) -> dict[str, float]:
    """Half of the labels at once and half one by one, against all at once under the same assumptions."""
    half = len(labels) // 2
    model = RewardModel.fit("simulation", labels[:half], settings, background)
    for label in labels[half:]:
        model.add(label)
    state = model.state
    found = posterior.design(labels, state.whitening)
    whole = posterior.batch(labels, found, state.whitening, 8, state.spread, state.groups, state.mean_R)
    features, utilities = people.answers(4000)
    truth = people.opinion(utilities).astype(float)
    one, other = (RewardModel("simulation", settings, given).score(features).chance_N for given in (state, whole))
    gone = [label for label in labels if label.id != labels[7].id]
    without, never = (RewardModel.fit("simulation", given[:200], settings, background) for given in (gone, [*labels[:7], *labels[8:]]))
    return {
        "mean_difference_of_chances": float(np.abs(one - other).mean()),
        "auc_online": auc(one, truth),
        "auc_batch": auc(other, truth),
        "deleted_equals_never_seen": bool(np.array_equal(without.state.mean_R, never.state.mean_R)),
    }


def moved(people: People, kind: str, flips: float, model: RewardModel, tests: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    for label in people.labels(kind, 100, flips, SHIFT, policy="support@2"):
        model.add(label)
    chances, truth = model.score(tests[0]).chance_N, people.opinion(tests[1]).astype(float)
    shifted = model.report().shifted
    return {"auc": auc(chances, truth), "ece": ece(chances, truth), "ece_of_the_first_50": shifted.ece, "num": shifted.num}


# ---- cost ----


def cost(most: int) -> list[dict[str, Any]]:
    """A label with 576 features (the embedded model's) and 8 heads, and the re-fit of all; processor time too: machines are shared."""
    rng = np.random.default_rng(0)
    settings, weights = StreamSettings(size=576), rng.normal(size=576) / 8
    features = rng.normal(size=(most, 576))
    values = rng.random(most) < links.sigmoid(features @ weights)
    labels = [Label(id=str(k), kind="thumb", value=int(values[k]), features=features[k]) for k in range(most)]
    rows = []
    for num in (most // 4, most):
        started, used = time.perf_counter(), time.process_time()
        model = RewardModel.fit("simulation", labels[:num], settings)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        took, used = [], time.process_time()
        for label in labels[:200]:
            started = time.perf_counter()
            model.add(label)
            took.append(1000 * (time.perf_counter() - started))
        add_cpu = 1000 * (time.process_time() - used) / 200
        rows.append(
            {
                "labels": num,
                "rank": model.state.whitening.rank,
                "refit_seconds": round(seconds, 2),
                "refit_cpu_seconds": round(cpu, 2),
                "add_cpu_ms": round(add_cpu, 3),
                "add_ms_median": round(float(np.median(took)), 3),
                "add_ms_95": round(float(np.quantile(took, 0.95)), 3),
            }
        )
    return rows


# ---- under optimisation ----


class Gold:
    """What people want: in most directions more is better until enough is enough; of one habit (say, length) a little more is better and
    much more is worse. No linear model can say either, and where the first policy is it needn't."""

    def __init__(self, rng: np.random.Generator):
        self.weights = rng.normal(size=DIM) * 0.25
        self.weights[0] = 0.0

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return 2.0 * np.tanh(z @ self.weights / 2.0) + z[..., 0] - 0.35 * z[..., 0] ** 2


def optimise(seed: int, rounds: int) -> list[dict[str, Any]]:
    """A policy over features, moved in each round towards the best of 16 by the reward model. The same number of labels for all: the frozen
    model has them all from the policy that came first, the streaming one gets them as the policy moves."""
    rows = []
    for name in ("frozen", "frozen_pessimistic", "streaming"):
        rng = np.random.default_rng(seed)
        gold = Gold(rng)
        streaming = name == "streaming"
        labels = drawn(rng, gold, np.zeros(DIM), FIRST if streaming else FIRST + rounds * EACH, "0")
        settings = StreamSettings(size=DIM, heads=2)
        model = RewardModel.fit("simulation", labels, settings)
        mean, course, promised, seen = np.zeros(DIM), [], [], []
        for number in range(rounds + 1):
            answers = mean + rng.normal(size=(256, SAMPLES, DIM))
            scores = model.score(answers.reshape(-1, DIM))
            proxy = scores.chance_N - scores.chance_sd_N * (name == "frozen_pessimistic")
            best = answers[np.arange(256), proxy.reshape(256, SAMPLES).argmax(axis=1)]
            audit = drawn(rng, gold, mean, EACH, f"audit{number}")  # held out: nobody learns from these
            promised += model.score(np.array([label.features for label in audit])).chance_N.tolist()
            seen += [float(label.value) for label in audit]
            course.append(
                {
                    "kl": float(mean @ mean / 2),
                    "gold": float(links.sigmoid(gold(answers)).mean()),
                    "proxy": float(scores.chance_N.mean()),
                    "alarm": guard.divergence(promised, seen).veto,
                }
            )
            mean = mean + PACE * (best.mean(axis=0) - mean)
            if streaming:
                fresh = drawn(rng, gold, mean, EACH, f"{number + 1}")
                labels += fresh
                for label in fresh:
                    model.add(label)
                if number % 3 == 2:
                    model = RewardModel.fit("simulation", labels, settings)
        rows.append({"model": name, "course": course})
    return rows


def drawn(rng: np.random.Generator, gold: Gold, mean: np.ndarray, num: int, name: str) -> list[Label]:
    """Thumbs on the policy's answers, 10 % flipped."""
    z = mean + rng.normal(size=(num, DIM))
    values = (rng.random(num) < links.sigmoid(gold(z))) ^ (rng.random(num) < 0.1)
    return [Label(id=f"{name}-{k}", kind="thumb", value=int(values[k]), features=z[k]) for k in range(num)]


# ---- all together ----


def collect(args: argparse.Namespace) -> None:
    parts = [json.loads(path.read_text()) for path in sorted(args.folder.glob("*.json"))]
    runs = {name: [part for part in parts if part["part"] == name] for name in ("table", "optimise", "cost")}
    results: dict[str, Any] = {"seeds": {name: len(found) for name, found in runs.items()}}
    results["small"] = any(part["small"] for part in parts)
    results["table"] = averaged([part["rows"] for part in runs["table"]])
    results["optimise"] = {
        name: curves([row["course"] for part in runs["optimise"] for row in part["rows"] if row["model"] == name])
        for name in ("frozen", "frozen_pessimistic", "streaming")
    }
    results["gap"] = gap(results["optimise"])
    results["cost"] = [row for part in runs["cost"] for row in part["rows"]]
    args.out = args.out or Path(__file__).parent / "results" / f"{time.strftime('%F')}-reward-model.json"
    write_result(args, "reward-model", results)
    args.out.with_suffix(".svg").write_text(plot(results["optimise"]))
    print(json.dumps(results["gap"]))


def averaged(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Row by row the mean over seeds of every number; what isn't one is that of the first seed, and must be the same in all where it is a
    yes or no."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], bool):
            return sum(values) / len(values)
        known = [value for value in values if isinstance(value, (int, float))]
        return sum(known) / len(known) if known else values[0]

    return [mean(list(rows)) for rows in zip(*tables, strict=True)]


def curves(courses: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
    """Round by round: means over seeds, the gold's standard error, and the share of seeds in which the alarm had been raised."""
    rounds = []
    for rows in zip(*courses, strict=True):
        gold = np.array([row["gold"] for row in rows])
        found = {name: float(np.mean([row[name] for row in rows])) for name in ("kl", "gold", "proxy", "alarm")}
        rounds.append(found | {"gold_error": float(gold.std(ddof=1) / len(gold) ** 0.5) if len(gold) > 1 else 0.0})
    return rounds


def gap(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, rounds in found.items():
        best = max(rounds, key=lambda row: row["gold"])
        first_alarm = next((place for place, row in enumerate(rounds) if row["alarm"] >= 0.5), None)
        told[name] = {
            "start": rounds[0]["gold"],
            "best": best["gold"],
            "best_kl": best["kl"],
            "end": rounds[-1]["gold"],
            "end_error": rounds[-1]["gold_error"],
            "end_proxy": rounds[-1]["proxy"],
            "end_kl": rounds[-1]["kl"],
            "alarm_in_half_of_the_seeds_after_round": first_alarm,
            "gold_at_that_alarm": None if first_alarm is None else rounds[first_alarm]["gold"],
        }
    told["streaming_minus_frozen_at_the_end"] = told["streaming"]["end"] - told["frozen"]["end"]
    return told


def plot(found: dict[str, list[dict[str, float]]], width: int = 640, height: int = 360) -> str:
    """Approval by the gold measure (lines) and as the reward model promises it (dashes), by round."""
    left, right, top, bottom = 52, 150, 16, 40
    colours = {"frozen": "#d1495b", "frozen_pessimistic": "#edae49", "streaming": "#2e86ab"}
    num = max(len(rounds) for rounds in found.values()) - 1

    def x(place: float) -> float:
        return left + place / num * (width - left - right)

    def y(value: float) -> float:
        return top + (1 - value) * (height - top - bottom)

    drawn = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawn.append(f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ccc" stroke-width="0.5"/>')
        drawn.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for place in range(0, num + 1, max(num // 4, 1)):
        drawn.append(f'<text x="{x(place):.1f}" y="{height - bottom + 18}" text-anchor="middle">{place}</text>')
    drawn.append(f'<text x="{x(num / 2):.1f}" y="{height - 6}" text-anchor="middle">rounds of optimisation</text>')
    for row, (name, rounds) in enumerate(found.items()):
        for figure, dash in (("gold", ""), ("proxy", ' stroke-dasharray="5 4"')):
            points = " ".join(f"{x(place):.1f},{y(round_[figure]):.1f}" for place, round_ in enumerate(rounds))
            drawn.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"{dash}/>')
        drawn.append(f'<text x="{width - right + 10}" y="{top + 20 + 22 * row}" fill="{colours[name]}">{name.replace("_", ", ")}</text>')
    drawn.append(f'<text x="{width - right + 10}" y="{top + 96}">line: people</text>')
    drawn.append(f'<text x="{width - right + 10}" y="{top + 114}">dashes: the model</text>')
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#666"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>' + "".join(drawn) + "</svg>\n"


if __name__ == "__main__":
    main()
