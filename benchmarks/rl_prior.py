#!/usr/bin/env python3
"""The prior-limited study: at equal cost, is it better to tune a small model in full or a larger one a little?

    python benchmarks/rl_prior.py --list                              # every run as a command of its own
    python benchmarks/rl_prior.py --only large-lora --seed 0          # one run, one file in --runs
    python benchmarks/rl_prior.py --collect                           # the result file and the plot, from all files there

The arms, all on the same sums below 20 + 20, with the same number of interactions (episodes) and the same reward:

    large-lora        SmolLM2 (135 M parameters), LoRA of rank 8, each batch gone through once
    small-full        18 M parameters (recipes/sums_from_scratch.py), all of them trained (recipes/full_tuning.py), each batch gone
                      through as often as makes the floating-point operations of reinforcement learning equal to those of large-lora
    small-lora        the same model and as many passes, with LoRA of rank 8: what is the size's doing, and what full tuning's
    small-full-once   small-full with one pass: as many interactions, a seventh of the operations

Operations are counted by the usual rule: 2 N for each token of an episode that is sampled, 6 N for each that is trained on in a pass,
with N all parameters. (An adapter's backward pass is really 4 N, since no weight's gradient is made; the rule favours the small model.)
Measured are the headroom-normalised gains, (after - before) / (1 - before), on held-out sums and, as transfer, on held-out differences,
of which reinforcement learning sees none. The first number of the likeliest answer counts: learning to stop there, which the reward asks
for too, is no gain in arithmetic (`_alone` counts it). Each arm is shown at the best of its learning rates.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import curves

ARMS: dict[str, dict[str, Any]] = {
    "large-lora": {"model": "large", "passes": "one", "tuning": "lora", "rates": (4e-4, 8e-4)},
    "small-full": {"model": "small", "passes": "equal", "tuning": "full", "rates": (1e-4, 3e-5, 3e-4)},
    "small-full-once": {"model": "small", "passes": "one", "tuning": "full", "rates": (3e-4, 1e-4)},
    "small-lora": {"model": "small", "passes": "equal", "tuning": "lora", "rates": (4e-4, 1.6e-3)},
}
RIGHT = "held_out/env/right"
RANK, BELOW, DATA_SEED = 8, 20, 0
SCORES = [f"{test}{kind}" for test in ("task", "transfer") for kind in ("", "_alone")]
MEASURED = ("parameters", "passes", "interactions", "operations", "seconds", *SCORES, *(f"{name}_gain" for name in SCORES))
KEPT = ("step", RIGHT, "reward/total", "entropy", "kl/k3", "ratio/max", "groups/collapsed", "tokens/mean", "loss/clip_fraction:mean")


def commands(seeds: int) -> list[str]:
    runs = [(arm, rate) for arm, options in ARMS.items() for rate in options["rates"]]
    each = [(seed, arm, rate) for seed in range(seeds) for arm, rate in runs]
    return [f"python benchmarks/rl_prior.py --only {arm} --learning-rate {rate:g} --seed {seed}" for seed, arm, rate in each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ARMS), help="one run")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the small model's own training; tasks are the same")
    parser.add_argument("--learning-rate", type=float, help="default: the first of the arm's")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=80, help="tasks in an evaluation")
    parser.add_argument("--passes", type=int, help="in place of what makes operations equal")
    parser.add_argument("--small-steps", type=int, default=3000, help="most steps of the small model's own training")
    parser.add_argument("--small-until", type=float, default=0.3, help="the share of sums that it is to have right when it begins")
    parser.add_argument("--small-hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", help="of the small model (default: a GPU where there is one)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "everlearn-rl-prior", help="for small models")
    parser.add_argument("--runs", type=Path, default=Path("runs/rl-prior"), help="folder of one file for each run")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seeds", type=int, default=3, help="for --list")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-rl-prior.json)")
    args = parser.parse_args()
    if args.list:
        print(*commands(args.seeds), sep="\n")
    elif args.collect:
        collect(args)
    elif args.only:
        one_run(args)
    else:
        parser.error("say --only NAME, --list or --collect")


# ---- one run ----


def chat_of(folder: Path) -> Any:
    from tokenizers import Tokenizer

    from everlearn.rl.prompts import ChatMl

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)


def differences(chat: Any, **options: Any) -> Any:
    """Held-out pairs as "What is 17 - 5?", the larger first: the transfer."""
    from everlearn.rl.env import SameTask
    from everlearn.rl.envs.arithmetic import SumEnv, Sums

    class DifferenceEnv(SumEnv):
        async def initial_observation(self) -> Any:
            asked = f"{self.a} - {-self.b}"
            return self.chat.ask(f"What is {asked}?", begun=f"{asked} ="), self.chat.stop

    class Differences(Sums):
        def group(self, number: int) -> Any:
            high, low = sorted(self.task(number), reverse=True)
            return SameTask(lambda: DifferenceEnv(high, -low, self.chat, self.rewards), self.group_size, ["differences"])

    return Differences(chat, DATA_SEED, "test", BELOW, **options)


@contextlib.contextmanager
def opened(args: argparse.Namespace, folder: Path, tuning: str, home: Path) -> Iterator[Any]:
    """A service client: of a server on the folder, or full tuning in this process."""
    import tinker
    import torch

    from recipes.full_tuning import FullService

    if tuning == "full":
        torch.set_num_threads(args.threads)
        yield FullService(folder, home / "states", args.device)
        return
    live = argparse.Namespace(model=str(folder), base_url=None, base_model=None, threads=args.threads)
    with common.server(live) as server:
        service = tinker.ServiceClient(base_url=server.url)
        yield service
        service.close("success").result()


def parameters(folder: Path) -> int:
    """N: all of the folder's, a head that is the embedding counted once."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def subject(args: argparse.Namespace, arm: dict[str, Any]) -> tuple[Path, int]:
    """The arm's model, made now if need be, and how often each batch is gone through."""
    from recipes import sums_from_scratch

    folder = large = common.model_folder("smollm2")
    if arm["model"] == "small":
        recipe = sums_from_scratch.Recipe(args.small_steps, args.small_until, seed=args.seed, hidden=args.small_hidden)
        folder = sums_from_scratch.ensure(recipe, large, args.cache, args.device, lambda text: print(text, flush=True))
    if arm["passes"] == "one":
        return folder, 1
    return folder, args.passes or max(1, round((8 * parameters(large) / parameters(folder) - 2) / 6))


def one_run(args: argparse.Namespace) -> None:
    import torch

    from everlearn.rl.envs.arithmetic import Sums
    from everlearn.rl.rollouts import Limits
    from everlearn.rl.settings import Settings
    from everlearn.rl.train import train

    arm = ARMS[args.only]
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder, passes = subject(args, arm)
    rate, chat = args.learning_rate or arm["rates"][0], chat_of(folder)
    settings = Settings(
        "bench",
        steps=args.steps,
        rank=RANK,
        learning_rate=rate,
        loss="ppo",
        epochs=passes,
        max_tokens=6,
        limits=Limits(episodes_at_once=64),
        seed=args.seed,
        evaluate_every=max(1, args.steps // 8),
        save_every=args.steps,
    )
    dealt = {"batches": 1, "groups_per_batch": args.held_out, "group_size": 1}
    held_out = Sums(chat, DATA_SEED, "test", BELOW, **dealt)
    tests = {"task": held_out, "transfer": differences(chat, **dealt)}
    dataset = Sums(chat, DATA_SEED, "train", BELOW, args.steps, args.groups, args.group_size)
    with tempfile.TemporaryDirectory() as home, opened(args, folder, arm["tuning"], Path(home)) as service:
        started = time.perf_counter()
        before = scores(service, settings, tests, None)
        rows = train(service, settings, dataset, Path(home) / "run", held_out)
        after = scores(service, settings, tests, json.loads((Path(home) / "run" / "state.json").read_text())["path"])
        seconds = time.perf_counter() - started
    steps = [row for row in rows if "reward/total" in row]
    run = {"arm": args.only, "seed": args.seed, "learning_rate": rate, "parameters": parameters(folder), "passes": passes}
    run |= {"interactions": int(sum(row["episodes"] for row in steps)), "device": args.device, "seconds": seconds}
    run["operations"] = operations(steps, parameters(folder), passes, prompt_tokens(dataset, args))
    for name in before:
        run |= {name: [before[name], after[name]], f"{name}_gain": gain(before[name], after[name])}
    run["rows"] = [{name: row[name] for name in KEPT if name in row} for row in rows]
    args.runs.mkdir(parents=True, exist_ok=True)
    (args.runs / f"{args.only}-{rate:g}-{args.seed}.json").write_text(json.dumps(common.origin("rl-prior") | {"run": run}, indent=1) + "\n")
    told = ", ".join(f"{name} {before[name]:.1%} -> {after[name]:.1%}" for name in before)
    print(f"{args.only:16} rate {rate:g} seed {args.seed}: {told}, {run['operations']:.3g} operations, {seconds:.0f} s", flush=True)


def scores(service: Any, settings: Any, tests: dict[str, Any], state: str | None) -> dict[str, float]:
    """By the base model or by a state, of each test the share of likeliest answers that begin with the right number, and (`_alone`)
    that are it and nothing else."""
    from everlearn.rl import measures
    from everlearn.rl.policy import TinkerPolicy
    from everlearn.rl.rollouts import play_now

    if state is None:
        client = service.create_lora_training_client(settings.base_model, rank=settings.rank).result()
    else:
        client = service.create_training_client_from_state_with_optimizer(state).result()
    policy = TinkerPolicy(client.save_weights_and_get_sampling_client().result(), settings.max_tokens, 0.0)
    found = {}
    for name, tasks in tests.items():
        groups = play_now(tasks.get_batch(0), policy, settings.limits, 0)
        logs = [group.trajectories_G[0].transitions[0].logs for group in groups]
        found[name] = statistics.mean(begins_right(log["sum"], log["answer"]) for log in logs)
        found[f"{name}_alone"] = float(measures.of_rollouts(groups)["env/right"])
    return found


def begins_right(asked: str, answer: str) -> bool:
    """Whether the first number of the answer is the sum that was asked for ("17 + -5"); what follows it doesn't count."""
    first = re.match(r"\s*(-?\d+)", answer)
    return first is not None and int(first.group(1)) == sum(map(int, asked.split(" + ")))


def prompt_tokens(dataset: Any, args: argparse.Namespace) -> float:
    """The mean length of a prompt."""
    import asyncio

    async def length(number: int) -> int:
        observation, _ = await dataset.group(number).make().initial_observation()
        return int(observation.length)

    async def all_of_them() -> list[int]:
        return [await length(number) for number in range(args.steps * args.groups)]

    return statistics.mean(asyncio.run(all_of_them()))


def operations(steps: list[dict[str, float]], size: int, passes: int, prompt: float) -> float:
    """Floating-point operations of sampling and training, by the rule above. All episodes count as trained on: those of groups in which all
    earned the same are left out of the updates, in each arm as its luck has it."""
    tokens = sum(row["episodes"] * (prompt + row["tokens/mean"]) for row in steps)
    return tokens * size * (2.0 + 6.0 * passes)


def gain(before: float, after: float) -> float:
    """Headroom-normalised; 0 where nothing was left to gain."""
    return (after - before) / (1 - before) if before < 1 else 0.0


# ---- all runs ----


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm and learning rate, best rate of an arm first: with a figure for each seed."""
    table = []
    for arm in ARMS:
        rows = []
        for rate in sorted({run["learning_rate"] for run in runs if run["arm"] == arm}):
            own = [run for run in runs if (run["arm"], run["learning_rate"]) == (arm, rate)]
            row: dict[str, Any] = {"arm": arm, "learning_rate": rate, "seeds": [run["seed"] for run in own]}
            for name in MEASURED:
                row[name] = [run[name] for run in own]
            rows.append(row)
        rows.sort(key=lambda row: -statistics.mean(row["task_gain"]))
        table += rows
        for row in rows:
            task, other = (statistics.mean(row[name]) for name in ("task_gain", "transfer_gain"))
            cost = f"{row['passes'][0]} passes, {statistics.mean(row['operations']):.2g} operations"
            what = f"{arm:16} rate {row['learning_rate']:<7g} {len(row['seeds'])} seeds"
            print(f"{what}: gain {task:6.3f} on the task, {other:6.3f} in transfer; {cost}")
    return table


def collect(args: argparse.Namespace) -> None:
    files = [json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))]
    if not files:
        raise SystemExit(f"{args.runs} holds no runs; make some first, or say --runs")
    runs = [file["run"] for file in files]
    table = summary(runs)
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for arm in ARMS:
        best = next((row["learning_rate"] for row in table if row["arm"] == arm), None)
        own = [run for run in runs if (run["arm"], run["learning_rate"]) == (arm, best)]
        if own:
            lines[arm] = [[(row["step"], row[RIGHT]) for row in run["rows"] if RIGHT in row] for run in own]
    out = args.out or common.ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-rl-prior.json"
    first = {key: files[0][key] for key in ("commit", "hardware", "versions")}  # of the runs, wherever they are collected
    per_run = [{key: file[key] for key in ("command", "when", "load_average")} | file["run"] for file in files]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(common.origin("rl-prior") | first | {"results": {"table": table, "runs": per_run}}, indent=1) + "\n")
    out.with_suffix(".svg").write_text(curves.svg({"held-out sums": lines}, "steps", "right"))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
