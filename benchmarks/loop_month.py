#!/usr/bin/env python3
"""Thirty days of a deployment: users ask and correct, versions are trained and tried; two bad days are planted.

    python benchmarks/loop_month.py --seed 0 --into RUNS     # one month; runs with different seeds may run side by side
    python benchmarks/loop_month.py --collect RUNS           # the result file and its plot, of all months there
    python benchmarks/loop_month.py --smoke                  # six short days, to see that it works

Everything is real but the users and the clock: a server, its feedback and datasets, updates through the Tinker API, the gate, the canary,
and the watch. Users are simulated, so what is right is known of each answer (benchmarks/month_shop.py): a new user in each visit; half
order what the base model was never shown, the others ask for what it knows; 90 % give a thumb, 5 % of thumbs are wrong, and 70 % of
answers go through a clerk, who sends the right one. On one day a campaign corrects what is ordered most to its mirror image. Some days
later somebody promotes, by hand and past the gate, the version that had learned from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import ROOT, origin, server, write_result
from curves import svg
from month_shop import DAY, FIRST, ORDERS, WEIGHTS, Clock, Dated, Shop, ensure, operation, ordered

sys.path.insert(0, str(ROOT))
import random

import msgspec
import tinker

from everlearn.cli.client import Client
from everlearn.loop import gate, lesson, measure
from everlearn.loop.evidence import Evidence
from everlearn.loop.rule import Rule
from everlearn.loop.runner import Runner
from everlearn.loop.service import Tokens, read

NAME = "shop"
DAYS, VISITS, LOOKS = 30, 160, 5
POISONED, OVERRULED = 9, 18  # days, from 0 on
OVERRULING = "somebody thinks that the gate was wrong"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 12: 2.201, 16: 2.131}
DESCRIPTION: dict[str, Any] = {
    "settle": 0.0,
    "triggers": {"labels": 200},
    "update": {"rank": 8, "learning_rate": 3e-3, "epochs": 12, "batch": 40, "paraphrases": 0, "rehearsed": 0, "replay": 400},
    "gate": {
        "owner": "the shop",
        "promote": "automatic",
        "corrections": {"min_right": 0.6, "max_broken": 0.1},
        "canary": {
            "steps": [{"share": 0.3, "min_feedback": 6}, {"share": 0.5, "min_feedback": 30}],
            "gain": -0.12, "alpha": 0.1, "tolerated_loss": 0.0, "alpha_stop": 0.05, "max_hours": 64.0,
        },
        "guardrails": {"feedback_rate": {"worse": "both", "margin": 0.2}, "length": {"worse": "both", "margin": 0.3, "limit": 8.0}},
        "watch": {"margin": 0.1, "alpha": 0.02, "min_record": 60, "record_hours": 168.0},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help="folder for this month's file")
    parser.add_argument("--collect", type=Path, metavar="RUNS")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--days", type=int, default=DAYS)
    parser.add_argument("--visits", type=int, default=VISITS, help="of a day")
    parser.add_argument("--steps", type=int, default=900, help="of the base model's training")
    parser.add_argument("--base", type=Path, help="folder of the base model, which is trained there if it isn't yet")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("tinker").setLevel(logging.ERROR)
    if args.collect:
        collect(args)
        return
    if args.smoke:
        args.days, args.visits = 6, 60
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args.model = str(ensure(args.base or Path(folder) / "shop", args.steps))
        args.base_url, args.threads = None, 1
        with server(args) as live, tinker.ServiceClient(base_url=live.url, api_key="tml-benchmark") as service:
            found = month(args, live.url, live.model, service)
    found |= {"seed": args.seed, "visits": args.visits, "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps({name: found[name] for name in ("rollbacks", "rejected", "promoted", "replayed", "seconds")}), flush=True)
    if args.into:
        args.into.mkdir(parents=True, exist_ok=True)
        (args.into / f"month-{args.seed}.json").write_text(json.dumps(origin("loop-month") | {"run": found}) + "\n")


def month(args: argparse.Namespace, url: str, model: str, service: Any) -> dict[str, Any]:
    clock = Clock(time.time, time.sleep)
    client = Client(url, timeout=600.0)
    api = Dated(client, clock)
    clock.turn(FIRST + 5 * 3600)
    shop = Shop(api, NAME, args.seed)
    api.post("/v1/deployments", {"name": NAME, "description": {"base": model, **DESCRIPTION}})
    runner = Runner(api, service, NAME, lambda line: None if line.startswith("step") else print(f"  {line[:200]}", flush=True), clock)
    scale = args.days / DAYS
    poisoned, overruled = round(POISONED * scale), round(OVERRULED * scale)
    gold = Gold(api, service)
    days: list[dict[str, Any]] = []
    campaign: list[str] = []
    before, served = 0, f"{NAME}@0"
    bad: int | None = None
    for day in range(args.days):
        if day == overruled and bad is not None and read(api, NAME).champion != f"{NAME}@{bad}":
            api.post(f"/v1/deployments/{NAME}/promote", {"number": bad, "reason": OVERRULING})
        visits = []
        for part in range(LOOKS):
            clock.turn(FIRST + day * DAY + (8 + 3 * part) * 3600)
            visits += [shop.visit() for _ in range(args.visits // LOOKS)]
            runner.run()
        if day == poisoned:
            before, served = _newest(api), read(api, NAME).champion
            campaign = shop.poison(args.visits * 3 // 2)
        if campaign and bad is None and (stopped := _stopped(api, before)) is not None:
            bad = stopped
            for record in campaign:  # the owner reads why, and throws the campaign out: what it asked, and what it said
                client.delete(f"/v1/records/{record}")
            if _number(read(api, NAME).champion) < _number(served):  # the campaign's complaints had made the watch go back
                again = {"number": _number(served), "reason": "what was said against it was a campaign"}
                api.post(f"/v1/deployments/{NAME}/promote", again)
        clock.turn(FIRST + (day + 1) * DAY + 3.1 * 3600)
        runner.run()
        days.append(told(day, visits, gold.of(read(api, NAME).champion)))
        print(json.dumps(days[-1]), flush=True)
    events = api.get(f"/v1/deployments/{NAME}/history", limit=1000)["data"][::-1]
    client.close()
    kinds = [event["kind"] for event in events]
    marks = [{"day": (event["created_at"] - FIRST) / DAY, **{k: event[k] for k in ("kind", "champion", "candidate", "reason")}}
             for event in events if event["kind"] in ("promoted", "rejected", "rolled_back", "ended")]  # fmt: skip
    counted = {f"{kind}": kinds.count(kind) for kind in ("promoted", "rejected", "ended")}
    automatic = [mark for mark in marks if mark["kind"] == "rolled_back"]
    return {"days": days, "events": marks, **counted, "rollbacks": len(automatic), "replayed": replayed(events), "bad_version": bad,
            "planted": {"poisoned": poisoned, "overruled": overruled}}  # fmt: skip


def _newest(api: Any) -> int:
    """The number of the newest version that was tried; 0: none was."""
    tried = [event["candidate"] for event in api.get(f"/v1/deployments/{NAME}/history", limit=1000)["data"] if event["candidate"]]
    return max(map(_number, tried), default=0)


def _number(version: str) -> int:
    return int(version.rpartition("@")[2])


def _stopped(api: Any, before: int) -> int | None:
    """The first version after number `before` that didn't come to serve, or had to go, once there is one."""
    for event in api.get(f"/v1/deployments/{NAME}/history", limit=20)["data"][::-1]:
        judged = (event["evidence"] or {}).get("evidence")
        if event["kind"] in ("rejected", "rolled_back") and judged is not None:
            number = _number(str(judged["candidate"]))
            if number > before:
                return number
    return None


def told(day: int, visits: list[tuple[bool, bool, str]], version: dict[str, float]) -> dict[str, Any]:
    orders, operations = ([right for order, right, _ in visits if order is wanted] for wanted in (True, False))
    answered = {name: sum(said == name for _, _, said in visits) for name in sorted({said for _, _, said in visits})}
    return {"day": day, "orders": fmean(orders), "operations": fmean(operations), "answered": answered, "champion": version}


class Gold:
    """What a version is worth, measured over the Tinker API, where nothing counts as an answer to anybody: 40 of each order, weighted by
    how often it comes, and 200 operations, all on letters that no user asks."""

    def __init__(self, api: Any, service: Any):
        self.api, self.service, self.known = api, service, {}
        rng = random.Random(99)
        self.orders = [ordered(rng, True, order) for order in ORDERS for _ in range(40)]
        self.operations = [operation(rng, held_out=True) for _ in range(200)]

    def of(self, version: str) -> dict[str, Any]:
        if version not in self.known:
            now = read(self.api, NAME)
            tokens, one = Tokens(self.api, now.base_model), measure.sampler(self.api, self.service, now, version)
            asked = [*self.orders, *self.operations]
            prompts = [tokens.prompt([{"role": "user", "content": question.text}]) for question in asked]
            said = [tokens.text(answer.tokens) for answer in lesson.ask(one, prompts, [tokens.end], 8)]
            right = [float(text == question.answer) for text, question in zip(said, asked, strict=True)]
            shares = [fmean(right[40 * place : 40 * place + 40]) for place in range(len(ORDERS))]
            orders = sum(weight * share for weight, share in zip(WEIGHTS, shares, strict=True)) / sum(WEIGHTS)
            self.known[version] = {"version": version, "orders": orders, "operations": fmean(right[len(self.orders) :])}
        return self.known[version]


def replayed(events: list[dict[str, Any]]) -> int:
    """How many verdicts of the log were derived again; raises where one differs."""
    count = 0
    for event in events:
        kept = event["evidence"]
        if "verdict" in kept:
            verdict, rule = msgspec.convert(kept["verdict"], gate.Verdict), msgspec.convert(kept["rule"], Rule)
            gate.replay(verdict, rule, msgspec.convert(kept["evidence"], Evidence))
            count += 1
    return count


def collect(args: argparse.Namespace) -> None:
    files = [json.loads(path.read_text()) for path in sorted(args.collect.glob("month-*.json"))]
    runs = [file["run"] for file in files]
    series = {name: [[day[name] for day in run["days"]] for run in runs] for name in ("orders", "operations")}
    daily = {name: [interval([values[day] for values in found]) for day in range(len(found[0]))] for name, found in series.items()}
    lost = [[day["champion"]["operations"] for day in run["days"]] for run in runs]
    change = interval([fmean(run[-5:]) - run[0] for run in lost])
    results = {
        "months": len(runs), "when": [file["when"] for file in files], "daily": daily,
        "orders_first_three_days": interval([fmean(run[:3]) for run in series["orders"]]),
        "orders_last_three_days": interval([fmean(run[-3:]) for run in series["orders"]]),
        "operations_of_the_champion_last_five_days_less_first": change,
        "rollbacks": [run["rollbacks"] for run in runs],
        "hours_from_the_overruling_to_the_rollback": [hours(run) for run in runs],
        **{name: [run[name] for run in runs] for name in ("promoted", "rejected", "ended", "replayed", "seconds")},
        "runs": runs,
    }  # fmt: skip
    args.out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-loop-month.json"
    write_result(args, "loop-month", results)
    panels = {
        title: {arm: [[(day + 1, value) for day, value in enumerate(run)] for run in found] for arm, found in shown.items()}
        for title, shown in {
            "what users got": {"orders": series["orders"], "operations (known before)": series["operations"]},
            "the version that serves": {
                "orders": [[day["champion"]["orders"] for day in run["days"]] for run in runs],
                "operations (known before)": lost,
            },
        }.items()
    }
    args.out.with_suffix(".svg").write_text(svg(panels, "days", "share of right answers"), encoding="utf-8")
    print({name: value for name, value in results.items() if name not in ("daily", "runs")})


def interval(values: list[float]) -> dict[str, float]:
    """The mean over months, and Student's 95 % interval."""
    num, mean = len(values), fmean(values)
    margin = STUDENT.get(num, 2.0) * stdev(values) / num**0.5 if num > 1 else float("nan")
    return {"mean": mean, "low": mean - margin, "high": mean + margin}


def hours(run: dict[str, Any]) -> float | None:
    """Of virtual time, in which the bad version answered everybody."""
    begun = next((event["day"] for event in run["events"] if event["reason"] == OVERRULING), None)
    back = next((event["day"] for event in run["events"] if event["kind"] == "rolled_back" and event["day"] >= (begun or 0)), None)
    return None if begun is None or back is None else round((back - begun) * 24, 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
