#!/usr/bin/env python3
"""What the gate's promises are worth: canaries with known truth, thousands of times, each looked at after every outcome.

python benchmarks/gate_statistics.py                    all (about six minutes on one core)
python benchmarks/gate_statistics.py --seeds 40         a quick look
python benchmarks/gate_statistics.py --only equal --out RUNS/equal.json     one study; they may run side by side
python benchmarks/gate_statistics.py --collect RUNS                         the result file of these

Every simulated canary goes through `everlearn.loop.gate.decide` as a deployment does. A crossing counts wherever it was, so one verdict
at the end says what continuous peeking would have found. Beside it stands what is often done instead: a z-test at 5 %, once a day for two
weeks, or after every 50 outcomes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from common import write_result

from everlearn.loop import gate, live, parts, sequential
from everlearn.loop.evidence import Evidence, Interval, Measure, Outcome, Pair, Retained
from everlearn.loop.rule import DEFAULT_RULE, Rule, read_rule
from everlearn.loop.watch import cusum
from everlearn.rewards import guard

Rate = Callable[[np.ndarray], np.ndarray]  # from places in the stream to a rate of good outcomes
SIGNED = DEFAULT_RULE.replace('owner = ""', 'owner = "simulation"').replace('promote = "ask"', 'promote = "automatic"')
DAYS = 14  # that a canary takes at most: looks of who looks once a day
CANARY = 'owner = "simulation"\npromote = "automatic"\n[canary]\n'


def studies(seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name; the larger ones take a quarter of the seeds, the hacks a tenth."""
    few, fewer = max(seeds // 4, 10), max(seeds // 10, 10)
    return {
        "equal": lambda: equal(seeds, lambda places: np.full(len(places), 0.75)),
        "equal_on_changing_days": lambda: equal(few, lambda places: 0.65 + 0.2 * (places > 1500)),
        "five_points_worse": lambda: different(few, -0.05),
        "five_points_better": lambda: different(few, 0.05),
        "live_and_the_same": lambda: lived(few, 0.75, 0.75),
        "live_and_the_margin_used_up": lambda: lived(few, 0.75, 0.70),
        "live_and_15_points_worse": lambda: lived(few, 0.75, 0.60),
        "live_and_15_points_worse_after_2000": lambda: lived(few, 0.75, 0.60, good=2000),
        "hack_that_fools_the_model": lambda: hack(fewer, users_fooled=False),
        "hack_that_fools_users_too": lambda: hack(fewer, users_fooled=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000, help="of the A/A study; the others take a quarter and a tenth")
    parser.add_argument("--only", choices=list(studies(0)), metavar="STUDY", help="one study alone")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="one result file of those that --only wrote there")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-gate-statistics.json)")
    args = parser.parse_args()
    if args.collect:
        read = [json.loads(path.read_text()) for path in args.collect.glob("*.json")]
        found = {name: row for one in read for name, row in one["results"].items()}
        write_result(args, "gate-statistics", {name: found[name] for name in studies(0) if name in found})
        return
    results = {}
    for name, study in studies(args.seeds).items():
        if args.only in (None, name):
            started = time.perf_counter()
            results[name] = study() | {"seconds": round(time.perf_counter() - started, 1)}
            print(name, json.dumps(results[name]), flush=True)
    write_result(args, "gate-statistics", results)


# ---- streams ----


def stream(rng: np.random.Generator, rule: Rule, champion: Rate, candidate: Rate, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Arms and values of `most` outcomes; the share rises as the rule's steps say."""
    arms: list[np.ndarray] = []
    done, own = 0, 0
    for step in rule.canary.steps[:-1]:
        gaps = rng.geometric(step.share, size=max(step.min_feedback - own, 0))
        drawn = np.zeros(int(gaps.sum()), dtype=bool)
        drawn[np.cumsum(gaps) - 1] = True
        arms.append(drawn)
        done, own = done + len(drawn), step.min_feedback
    arms.append(rng.random(max(most - done, 0)) < rule.canary.steps[-1].share)
    arms_N = np.concatenate(arms)[:most]
    places = np.arange(len(arms_N))
    return arms_N, (rng.random(len(arms_N)) < np.where(arms_N, candidate(places), champion(places))).astype(float)


def as_outcomes(arms_N: np.ndarray, values_N: np.ndarray) -> tuple[Outcome, ...]:
    return tuple(map(Outcome, arms_N.tolist(), values_N.tolist()))


def at_last_step(rule: Rule, feedback: tuple[Outcome, ...], **others: Any) -> Evidence:
    return Evidence(
        stage="canary", champion="support@3", candidate="support@4", step=len(rule.canary.steps) - 1, feedback=feedback, **others
    )


def naive(arms_N: np.ndarray, values_N: np.ndarray, every: int) -> bool:
    """Whether a one-sided z-test at 5 %, asked after every `every` outcomes from the 100th on, ever called the candidate better."""
    n, m = np.cumsum(arms_N), np.cumsum(~arms_N)
    one, other = np.cumsum(values_N * arms_N), np.cumsum(values_N * ~arms_N)
    looks = np.arange(max(every, 100), len(arms_N) + 1, every) - 1
    looks = looks[(n[looks] >= 10) & (m[looks] >= 10)]
    n, m, p, q = n[looks], m[looks], one[looks] / n[looks], other[looks] / m[looks]
    spread = np.sqrt(np.maximum(p * (1 - p) / n + q * (1 - q) / m, 1e-9))
    return bool(np.any((p - q) / spread > NormalDist().inv_cdf(0.95)))


# ---- studies ----


def equal(seeds: int, rate: Rate, most: int = 6000) -> dict[str, Any]:
    """Candidate and champion are the same: how often is one promoted, or stopped, all the same?"""
    rule = read_rule(f"{CANARY}max_feedback = {most}")
    decided: Counter[str] = Counter()
    peeked: Counter[str] = Counter()
    for seed in range(seeds):
        arms_N, values_N = stream(np.random.default_rng(seed), rule, rate, rate, most)
        decided[gate.decide(rule, at_last_step(rule, as_outcomes(arms_N, values_N))).decision] += 1
        peeked.update({"daily": naive(arms_N, values_N, most // DAYS), "every_50": naive(arms_N, values_N, 50)})
    false = decided["promote"] / seeds
    return {
        "seeds": seeds,
        "outcomes": most,
        "false_promotions": false,
        "allowed": rule.canary.alpha + 2 * math.sqrt(rule.canary.alpha * (1 - rule.canary.alpha) / seeds),
        "false_stops": decided["reject"] / seeds,
        "champion_kept_undecided": decided["hold"] / seeds,
        "naive_false_promotions_looking_daily": peeked["daily"] / seeds,
        "naive_false_promotions_looking_every_50": peeked["every_50"] / seeds,
    }


def different(seeds: int, gain: float, champion: float = 0.75) -> dict[str, Any]:
    """A candidate that is better or worse by `gain`: what is decided, after how many outcomes, and how many were the candidate's."""
    rule = read_rule(CANARY)
    decided: Counter[str] = Counter()
    after, exposed = [], []
    most = rule.canary.max_feedback
    for seed in range(seeds):
        rng = np.random.default_rng(100_000 + seed)
        arms_N, values_N = stream(rng, rule, lambda at: np.full(len(at), champion), lambda at: np.full(len(at), champion + gain), most)
        evidence = at_last_step(rule, as_outcomes(arms_N, values_N))
        decided[gate.decide(rule, evidence).decision] += 1
        place = sequential.crossing(parts.canary_blocks(rule.canary, evidence), 0.0, 0.05, better=gain > 0)
        if place is not None:
            after.append(place)
            exposed.append(int(arms_N[:place].sum()))
    return {
        "seeds": seeds,
        "gain": gain,
        "budget": most,
        **{decision: decided[decision] / seeds for decision in ("promote", "reject", "hold")},
        "outcomes_median": float(np.median(after)),
        "outcomes_95": float(np.quantile(after, 0.95)),
        "candidate_outcomes_median": float(np.median(exposed)),
    }


def lived(seeds: int, record: float, rate: float, good: int = 0, most: int = 3000) -> dict[str, Any]:
    """A version that is live, by the default rule: its feedback against 500 outcomes of the version before. After `good` outcomes as the
    record has them come `most` at `rate`. How often is it taken back, and after how many outcomes at `rate`?"""
    rule = read_rule(SIGNED)
    stopped: Counter[str] = Counter()
    after = []
    for seed in range(seeds):
        rng = np.random.default_rng(300_000 + seed)
        rates = np.repeat((record, rate), (good, most))
        before, now = (rng.random(500) < record).astype(float), (rng.random(good + most) < rates).astype(float)
        known, told = (tuple(Outcome(arm, value) for value in values.tolist()) for arm, values in ((False, before), (True, now)))
        evidence = Evidence(
            stage="watch", champion="support@3", candidate="support@4", feedback=(*known, *told), alarms=cusum(rule.watch, known, told)
        )
        verdict = gate.decide(rule, evidence)
        gate.replay(verdict, rule, evidence)
        stopped["rolled_back"] += verdict.decision == "reject"
        stopped.update(part.name for part in verdict.parts if part.result == "fail")
        least = live.surely(before, rule.watch.alpha / 2, lower=True) - rule.watch.margin
        place = live.crossing(now, least, rule.watch.alpha / 2)
        if place is not None:
            after.append(place - good)
    quantiles = {f"outcomes_{share:.0%}": float(np.quantile(after, share)) for share in (0.5, 0.95)} if len(after) > seeds / 2 else {}
    return {"seeds": seeds, "rolled_back": stopped["rolled_back"] / seeds, "by": dict(stopped), **quantiles}


def hack(seeds: int, users_fooled: bool) -> dict[str, Any]:
    """The reward model rates the candidate 20 points higher; by the gold measure it is 5 points worse (8, where users are fooled too).

    Users give thumbs by the gold measure, 20 % of them flipped; fooled users (flattery, long answers) even prefer it by 3 points. What was
    held out and what users corrected is judged by careful people, who aren't fooled.
    """
    deaf = "[alarms]\nignore = ['divergence', 'length', 'flattery']"
    rules = {"whole": read_rule(SIGNED), "canary_alone": read_rule(f"{CANARY}{deaf}")}
    rows: dict[str, Counter[str]] = {name: Counter() for name in rules}
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "verdicts.jsonl"
        with log.open("wb") as file:
            for seed in range(seeds):
                evidence = hacked(np.random.default_rng(200_000 + seed), rules["canary_alone"], users_fooled)
                for name, rule in rules.items():
                    verdict = gate.decide(rule, evidence)
                    rows[name][verdict.decision] += 1
                    file.write(gate.entry(verdict, rule, evidence) + b"\n")
                failed.update(part.name for part in gate.decide(rules["whole"], evidence).parts if part.result == "fail")
        replayed = sum(gate.replay(*gate.read_entry(line)) is None for line in log.read_bytes().splitlines())
    return {
        "seeds": seeds,
        **{name: dict(row) for name, row in rows.items()},
        "failed_parts": dict(failed.most_common()),
        "verdicts_replayed_from_the_log": replayed,
    }


def hacked(rng: np.random.Generator, rule: Rule, users_fooled: bool) -> Evidence:
    gold, hacked_gold = 0.75, 0.67 if users_fooled else 0.70
    thumbs = (0.2 + 0.6 * gold, (0.2 + 0.6 * gold + 0.03) if users_fooled else 0.2 + 0.6 * hacked_gold)
    feedback = stream(rng, rule, lambda at: np.full(len(at), thumbs[0]), lambda at: np.full(len(at), thumbs[1]), 8000)
    truth = rng.random((300, 2)) < (gold, hacked_gold)
    promised = np.clip(rng.normal(gold + 0.2, 0.05, size=300), 0, 1)  # what the reward model says of the candidate's answers
    lengths = (rng.gamma(4, 100, size=200), rng.gamma(4, 100 * (1.8 if users_fooled else 1.1), size=200))
    flattery = (rng.random(200) < 0.05, rng.random(200) < (0.4 if users_fooled else 0.05))
    right = rng.random((60, 2)) < (0.0, 0.93)
    tokens = stream(rng, rule, lambda at: np.ones(len(at)), lambda at: np.ones(len(at)), 4000)[0]
    sizes = rng.gamma(4, 100, size=4000) * np.where(tokens, 1.8 if users_fooled else 1.1, 1.0)
    quiet = as_outcomes(tokens, np.zeros(4000))
    return at_last_step(
        rule,
        as_outcomes(*feedback),
        held_out=tuple(Pair(float(a), float(b)) for a, b in rng.random((100, 2)) < (gold, min(gold + 0.2, 1.0))),  # judged by the model
        corrections=tuple(Pair(float(a), float(b)) for a, b in right),
        safety=tuple(Pair(float(a), float(b)) for a, b in truth[:200]),
        retained=tuple(
            Retained(suite, Interval(0.5, 0.48, 0.52, 2000), Interval(0.5, 0.48, 0.52, 2000)) for suite in ("general", "questions")
        ),
        kl=Measure(0.3, 0.01, 4000),
        parity=Measure(0.001, 0.0001, 4000),
        guardrails={
            "refusal": quiet,
            "tool_errors": quiet,
            "length": as_outcomes(tokens, sizes),
            "feedback_rate": as_outcomes(tokens, (rng.random(4000) < 0.2).astype(float)),
        },
        alarms=(
            guard.divergence(promised, truth[:, 1].astype(float)),
            guard.habit("length", lengths[0].tolist(), lengths[1].tolist()),
            guard.habit("flattery", flattery[0].astype(float).tolist(), flattery[1].astype(float).tolist()),
        ),
    )


if __name__ == "__main__":
    main()
