#!/usr/bin/env python3
"""Reinforcement learning with tools: the shop of everlearn/rl/envs/shop.py on the embedded model, before and after.

    python benchmarks/rl_tools.py --smoke                    # one short run, to see that it works
    python benchmarks/rl_tools.py --list                     # every run of the study as a command of its own
    python benchmarks/rl_tools.py --only rl --seed 0         # one run, one file in --runs
    python benchmarks/rl_tools.py --collect                  # the result file and its plot, from all files there

Each run: the base model is evaluated (at temperature 1, as in training, on tasks whose pairs of item and count are held out), then shown
finished conversations, just until some of its episodes end right (it never calls a tool by itself, and what is never done earns no reward;
shown more of them, it needs no reward any more), evaluated again, and then plays and learns. Agents are ordinary code on the `openai`
client; tools are strict, so calls are decoded by grammar. Each evaluation is made a second time with tools that aren't strict.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import ROOT, Server, arguments, origin, server

SEEDS = (0, 1, 2)
KEY = "tml-benchmark"


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(model="smollm2")
    parser.add_argument("--only", choices=["rl"], help="make one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/rl-tools"), help="folder of the runs' files")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="two steps of little")
    parser.add_argument("--traces", type=int, default=48, help="conversations of the warm start, at most; each is seen once")
    parser.add_argument("--until", type=float, default=0.15, help="the share of right episodes at which the warm start is over")
    parser.add_argument("--warm-learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--groups", type=int, default=4, help="tasks of a step")
    parser.add_argument("--group-size", type=int, default=8, help="episodes of a task")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--evaluated", type=int, default=48, help="held-out tasks of an evaluation")
    parser.add_argument("--evaluate-every", type=int, default=4)
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"python benchmarks/rl_tools.py --only rl --seed {seed} --threads {args.threads}" for seed in SEEDS))
    elif args.collect:
        collect(args)
    else:
        if args.smoke:
            args.traces, args.steps, args.groups, args.group_size, args.evaluated = 4, 1, 2, 4, 4
        row = run(args)
        args.runs.mkdir(parents=True, exist_ok=True)
        file = args.runs / f"{'smoke' if args.smoke else 'rl'}-{args.seed}.json"
        file.write_text(json.dumps(origin("rl-tools") | {"run": row}, indent=1) + "\n")
        print(f"written to {file}")


# ---- one run ----


def run(args: argparse.Namespace) -> dict[str, Any]:
    import tinker

    started = time.perf_counter()
    with server(args, **{"engine.kv_tokens": 32768}) as live:
        client = tinker.ServiceClient(base_url=live.url).create_lora_training_client(live.model, rank=16, seed=args.seed).result()
        learner = Learner(live, client, args)
        row: dict[str, Any] = {"seed": args.seed, "base": learner.both(live.model)}
        row |= {"warm_start": learner.warm_start(), "warm": learner.both(learner.saved("warm"))}
        print(f"seed {args.seed}: base {row['base']['strict']['right']:.3f}, warm {row['warm']['strict']['right']:.3f}", flush=True)
        row["steps"] = [learner.step(number) for number in range(args.steps)]
        row["end"] = learner.both(learner.saved("end"))
        row["seconds"] = round(time.perf_counter() - started, 1)
    print(f"seed {args.seed}: end {row['end']['strict']['right']:.3f} in {row['seconds'] / 60:.1f} min", flush=True)
    return row


class Learner:
    """A training client and what plays for it."""

    def __init__(self, live: Server, client: Any, args: argparse.Namespace):
        from everlearn.rl.envs.shop import Shop

        self.live, self.client, self.args = live, client, args
        self.train = Shop(args.seed, batches=1_000_000, groups_per_batch=args.groups, group_size=args.group_size)
        self.test = Shop(args.seed, "test", groups_per_batch=args.evaluated, group_size=1)
        self.loose = Shop(args.seed, "test", groups_per_batch=args.evaluated, group_size=1, strict=False)

    def saved(self, name: str) -> str:
        return str(self.client.save_weights_for_sampler(name, ttl_seconds=7200).result().path)

    def play(self, dataset: Any, index: int, model: str) -> list[Any]:
        from everlearn.rl.agents import AgentServer
        from everlearn.rl.policy import seed_of
        from everlearn.rl.rollouts import Limits, play_now

        who = AgentServer(self.live.url + "/v1", KEY, model)
        return play_now(dataset.get_batch(index), who, Limits(episodes_at_once=24), seed_of(self.args.seed, index))

    def both(self, model: str) -> dict[str, Any]:
        """Conversations about held-out tasks, with strict tools and with others. Drawn at temperature 1: the likeliest ones are right long
        before most are."""
        found = {}
        for name, dataset in (("strict", self.test), ("free", self.loose)):
            groups = self.play(dataset, 0, model)
            found[name] = measured(groups) | {"episode": conversation(groups[0].trajectories_G[0])}
        return found

    def warm_start(self) -> dict[str, Any]:
        """Finished conversations, about tasks of the training split that RL doesn't see, four for each optimizer step, until a share of
        `--until` of the episodes ends right (at temperature 1, as in training): how many tokens the model was to say, its loss on them
        (nats a token) before each step, and the share after each step that was looked at."""
        import tinker
        from common import model_folder

        tokens, losses, rights = 0, [], []
        for number in range(self.args.traces // 4):
            batch, said = [], 0
            for place in range(4):
                ids, weights = trace(model_folder(self.args.model), self.train.task(10_000_000 + 4 * number + place))
                inputs = {"target_tokens": ids[1:], "weights": weights[1:]}
                batch.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs))
                said += int(sum(weights))
            gradient = self.client.forward_backward(batch, "cross_entropy")
            self.client.optim_step(tinker.AdamParams(learning_rate=self.args.warm_learning_rate)).result()
            losses.append(round(float(gradient.result().metrics["loss:sum"]) / said, 4))
            tokens += said
            if number < 2:
                continue  # never yet right, and playing takes its time
            after = self.play(self.train, 100_000 + number, self.saved(f"warm-{number}"))
            rights.append(round(measured(after)["right"], 4))
            print(f"warm start: loss {losses[-1]}, then right {rights[-1]}", flush=True)
            if rights[-1] >= self.args.until:
                break
        return {"traces": 4 * len(losses), "tokens": tokens, "losses": losses, "right_after": rights}

    def step(self, number: int) -> dict[str, float]:
        import tinker

        from everlearn.rl.advantages import advantages_of
        from everlearn.rl.agents import agent_metrics
        from everlearn.rl.datums import datums_of

        started = time.perf_counter()
        groups = self.play(self.train, number, self.saved(f"step-{number}"))
        played = time.perf_counter()
        data = [
            datum
            for group in groups
            for one, own in zip(group.trajectories_G, advantages_of(group), strict=True)
            if any(own)
            for datum in datums_of(one, own)
        ]
        row = measured(groups) | agent_metrics([one for group in groups for one in group.trajectories_G])
        row |= {"step": number, "datums": len(data), "trained_tokens": sum(datum.model_input.length for datum in data)}
        if data:
            losses = self.client.forward_backward(data, "importance_sampling")
            self.client.optim_step(tinker.AdamParams(learning_rate=self.args.learning_rate)).result()
            losses.result()
        row |= {"seconds_playing": played - started, "seconds_training": time.perf_counter() - played}
        if (number + 1) % self.args.evaluate_every == 0 and number + 1 < self.args.steps:
            after = self.play(self.test, 0, self.saved(f"evaluated-{number}"))
            row["held_out"] = measured(after)["right"]
        print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
        return row


def measured(groups: list[Any]) -> dict[str, float]:
    """Means over episodes; `valid` is the share of all calls that named a tool and fitted its schema."""
    episodes = [one for group in groups for one in group.trajectories_G]
    done = [one for one in episodes if one.failure is None]
    last = [one.transitions[-1].metrics for one in done]
    calls = sum(own["tools/calls"] for own in last)
    valid = sum(own["tools/valid"] * own["tools/calls"] for own in last)
    turns = [turn for one in done for turn in one.transitions]
    return {
        "episodes": len(episodes),
        "failed": len(episodes) - len(done),
        "right": statistics.fmean(own["right"] for own in last) if last else 0.0,
        "answered": statistics.fmean(own["ended"] for own in last) if last else 0.0,
        "calls": calls / max(len(last), 1),
        "valid": valid / calls if calls else 1.0,
        "cut_off": sum(turn.action.stop_reason == "length" for turn in turns) / max(len(turns), 1),
        "tokens": sum(len(turn.action.tokens) for turn in turns) / max(len(done), 1),
    }


def conversation(one: Any) -> list[Any]:
    return [turn.logs.get("answer") for turn in one.transitions]


def trace(folder: Path, task: Any) -> tuple[list[int], list[float]]:
    """A conversation that ends right, as the server would have shown it: token ids, and 1 for those that the model is to say."""
    from everlearn.render import template, tokenizer, tools
    from everlearn.rl.envs.shop import toolbox

    words = tokenizer.load(folder)
    form, schemas = tools.format_for(words), toolbox(task).schemas
    price = task.prices[task.item]
    steps = [("price", {"item": task.item}, price), ("calculate", {"expression": f"{task.count} * {price}"}, task.answer)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": task.question}]
    ids, weights, before = [], [], ""

    def say(message: dict[str, Any]) -> None:
        nonlocal before
        messages.append(message)
        prompt, answer = template.turn(words, form.inject(messages, schemas), schemas if form.native else None)
        for text, weight in ((prompt[len(before) :], 0.0), (answer, 1.0)):
            new = words.encode(text)
            ids.extend(new)
            weights.extend([weight] * len(new))
        before = prompt + answer

    for number, (name, given, result) in enumerate(steps):
        call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        say({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(result)})
    say({"role": "assistant", "content": f"{task.count} {task.item}s cost {task.answer} euros."})
    return ids, weights


# ---- all runs ----


def collect(args: argparse.Namespace) -> None:
    files = sorted(args.runs.glob("rl-*.json"))
    if not files:
        raise SystemExit(f"{args.runs} has no runs; make them with the commands of --list")
    made = [json.loads(file.read_text()) for file in files]
    runs = [one["run"] for one in made]
    first = {name: value for name, value in made[0].items() if name != "run"}
    first["command"] = "; ".join(one["command"] for one in made)
    first["load_average"] = [one["load_average"] for one in made]
    summary = {
        f"{stage}_{kind}_{what}": [round(one[stage][kind][what], 4) for one in runs]
        for stage in ("base", "warm", "end")
        for kind in ("strict", "free")
        for what in ("right", "valid", "calls")
    }
    out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-rl-tools.json"
    out.write_text(json.dumps(first | {"results": {"summary": summary, "runs": runs}}, indent=1) + "\n")
    out.with_suffix(".svg").write_text(plot(runs))
    print(json.dumps(summary, indent=1))
    print(f"written to {out} and {out.with_suffix('.svg').name}")


def plot(runs: list[dict[str, Any]]) -> str:
    """Held-out success over steps, a line for each seed, as SVG."""
    width, height, left, top = 640, 360, 56, 28
    last = max(len(one["steps"]) for one in runs)

    def at(step: float, share: float) -> str:
        return f"{left + (width - left - 20) * step / last:.1f},{top + (height - top - 44) * (1 - share):.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16">held-out purchases answered right (temperature 1, strict tools), by steps of training</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(0, share).split(",")
        lines.append(f'<line x1="{x}" y1="{y}" x2="{width - 20}" y2="{y}" stroke="#ddd"/><text x="20" y="{y}">{share:.2f}</text>')
    for step in range(0, last + 1, max(last // 8, 1)):
        lines.append(f'<text x="{at(step, 0).split(",")[0]}" y="{height - 20}" text-anchor="middle">{step}</text>')
    for place, (one, colour) in enumerate(zip(runs, ("#1d4ed8", "#0d9488", "#dc2626", "#7c3aed", "#f59e0b"), strict=False)):
        points = [at(0, one["warm"]["strict"]["right"])]
        points += [at(row["step"] + 1, row["held_out"]) for row in one["steps"] if "held_out" in row]
        points.append(at(len(one["steps"]), one["end"]["strict"]["right"]))
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{left + 8 + 80 * place}" y="{height - 4}" fill="{colour}">seed {one["seed"]}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
