#!/usr/bin/env python3
"""Reinforcement learning off policy: what staleness and a sampler that disagrees do to plain objectives, and to corrected ones.

The subject is the embedded model and sums below 20 + 20 (`--subject sums`); `--subject chains` is a model of one million parameters that
is trained here first, for a look at the machinery in a minute.

    python benchmarks/rl_staleness.py --list                                  # every run as a command of its own
    python benchmarks/rl_staleness.py --only stale-8-plain --seed 0           # one run, one file in --runs
    python benchmarks/rl_staleness.py --collect                               # the result file and its plots, from all files there

Staleness is exact here: the batch of step s is played by the weights of step s - k (of step 0 in the first k steps), so runs can be
repeated. The disturbed sampler is a copy of the adapter, made anew for each step and pushed once along the gradient of random targets
with random signs, by an Adam step whose learning rate is the strength of the noise. It reports the log-probabilities of what it is, as
an engine with errors of its own would. Held-out answers come from the undisturbed newest weights.

Objectives, all with one optimizer step a batch unless --substeps says otherwise:

    decoupled   ppo with old_logprobs, the drift weighs in full
    tis         the same, weights cut down to 2 (tis_token)
    icepop      the same, tokens whose weight leaves [0.5, 5] are masked
    plain       the drift is ignored: REINFORCE as if the weights that are trained had sampled
    plain-ppo   ppo with one ratio to what sampled, which staleness uses up
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import common
import rl_chains

ARMS: dict[str, dict[str, Any]] = {
    "decoupled": {"loss": "ppo", "decoupled": True},
    "tis": {"loss": "ppo", "decoupled": True, "loss_config": {"importance_weight": "tis_token"}},
    "icepop": {"loss": "ppo", "decoupled": True, "loss_config": {"importance_weight": "icepop"}},
    "plain": {"loss": "importance_sampling", "decoupled": True, "loss_config": {"importance_weight": "none"}},
    "plain-ppo": {"loss": "ppo"},
}
COLOURS = {"decoupled": "#1d4ed8", "tis": "#0d9488", "icepop": "#7c3aed", "plain": "#dc2626", "plain-ppo": "#f59e0b"}
LAGS = (1, 4, 8)
STRENGTHS = (4e-3,)
RATE, STEPS = 1e-4, 64
NOISY = ((4e-4, 48), (RATE, STEPS))  # rates and steps of the runs with a disturbed sampler
LAST = 3  # evaluations whose mean is what a run came to; one alone, of 64 problems, is off by 4 points (standard error)
MEASURED = "held_out/env/right"  # the share of held-out problems whose likeliest answer is right
KEPT = (
    "step",
    "held_out/reward/total",
    "held_out/env/right",
    "reward/total",
    "entropy",
    "kl/k1",
    "kl/k3",
    "ratio/max",
    "ess",
    "groups/collapsed",
    "seconds/step",
)
KEPT_OF_LOSS = ("loss/logprob_diff_abs:mean", "loss/mask_fraction:mean", "loss/truncated_fraction:mean", "loss/clip_fraction:mean")


def commands(seeds: int) -> list[str]:
    """Every run of the study. At lag 0 all objectives are one, so there is one run of it."""
    stale = [*(f"stale-{lag}-{arm}" for lag in reversed(LAGS) for arm in ("decoupled", "plain")), "stale-0-plain"]
    noise = [f"noise-{strength}-{arm}" for strength in STRENGTHS for arm in ("plain", "tis", "icepop")]
    run = "python benchmarks/rl_staleness.py --only {} --seed {} --steps {} --learning-rate {:g}"
    return [
        run.format(name, seed, steps, rate)
        for seed in range(seeds)
        for names, rate, steps in (*((noise, *own) for own in NOISY), (stale, RATE, STEPS))
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one run: stale-LAG-OBJECTIVE or noise-STRENGTH-OBJECTIVE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", choices=["sums", "chains"], default="sums")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--substeps", type=int, default=1)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="held-out problems in an evaluation")
    parser.add_argument("--base-steps", type=int, default=300, help="steps of the base model's own training")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "everlearn-rl-chains", help="where the base model is kept"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/rl-staleness"), help="folder of one file for each run")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seeds", type=int, default=3, help="for --list")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-rl-staleness.json)")
    args = parser.parse_args()
    if args.list:
        print(*commands(args.seeds), sep="\n")
    elif args.collect:
        collect(args)
    elif args.only:
        one_run(args)
    else:
        parser.error("say --only NAME, --list or --collect")


class Lagged:
    """Plays with the weights of `lag` steps ago."""

    def __init__(self, lag: int):
        self.samplers: deque[Any] = deque(maxlen=lag + 1)

    def __call__(self, client: Any, step: int) -> Any:
        self.samplers.append(client.save_weights_and_get_sampling_client().result())
        return self.samplers[0]


class Disturbed:
    """Plays with the newest weights and noise on top: see the head of this file."""

    def __init__(self, service: Any, strength: float, seed: int, subject: Any):
        self.service, self.strength, self.seed, self.subject = service, strength, seed, subject
        self.rest = service.create_rest_client()
        self.copy: Any = None  # one for all steps: each that is open takes the engine's memory

    def __call__(self, client: Any, step: int) -> Any:
        import numpy as np
        import tinker

        path = client.save_state(f"disturbed-{step}", ttl_seconds=3600).result().path
        if self.copy is None:
            self.copy = self.service.create_training_client_from_state(path).result()
        else:
            self.copy.load_state(path).result()  # and a fresh optimizer
        self.rest.delete_checkpoint_from_tinker_path(path).result()  # a hundred of them would fill the disk
        rng = np.random.default_rng((self.seed, step))
        self.copy.forward_backward([self.random_targets(rng, prompt) for prompt in self.subject.prompts(step)], "cross_entropy").result()
        self.copy.optim_step(tinker.AdamParams(learning_rate=self.strength)).result()
        return self.copy.save_weights_and_get_sampling_client().result()

    def random_targets(self, rng: Any, prompt: list[int]) -> Any:
        """For each position of a prompt a token that is wanted there, or, as often, unwanted."""
        import numpy as np
        import tinker
        from tinker import types

        targets = rng.integers(0, self.subject.vocabulary, len(prompt))
        weights = rng.choice([-1.0, 1.0], len(prompt)).astype(np.float32)
        inputs = {"target_tokens": types.TensorData.from_numpy(targets), "weights": types.TensorData.from_numpy(weights)}
        return tinker.Datum(model_input=tinker.ModelInput.from_ints(prompt), loss_fn_inputs=inputs)


class SumsSubject:
    """The embedded model, sums of two numbers below 20; pairs are held out."""

    rank, max_tokens = 16, 6

    def __init__(self, args: argparse.Namespace):
        from tokenizers import Tokenizer

        from everlearn.rl.prompts import ChatMl

        self.args, self.model = args, common.model_folder("smollm2")
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        self.chat = ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)
        self.vocabulary = common.vocabulary(self.model)

    def sums(self, **options: Any) -> Any:
        from everlearn.rl.envs.arithmetic import Sums

        return Sums(self.chat, below=20, **options)

    def dataset(self) -> Any:
        return self.sums(seed=self.args.seed, groups_per_batch=self.args.groups, group_size=self.args.group_size)

    def held_out(self) -> Any:
        return self.sums(seed=self.args.seed, split="test", batches=1, groups_per_batch=self.args.held_out, group_size=1)

    def prompts(self, step: int) -> list[list[int]]:
        tasks = [self.dataset().task(step * self.args.groups + place) for place in range(self.args.groups)]
        return [self.chat.encode(f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n{a} + {b} =") for a, b in tasks]


class ChainsSubject:
    """A model of one million parameters and operations on strings."""

    rank, max_tokens = 8, rl_chains.MAX_TOKENS

    def __init__(self, args: argparse.Namespace):
        from recipes import chains

        self.args, self.model = args, rl_chains.ensure(args.cache, args.base_steps)
        self.task = json.loads((self.model / "task.json").read_text())["chains"]
        self.vocabulary = len(chains.VOCABULARY)

    def dataset(self) -> Any:
        return rl_chains.Chains(self.task, self.args.groups, self.args.group_size, self.args.seed)

    def held_out(self) -> Any:
        return rl_chains.Chains(self.task, self.args.held_out, 1, 0, held_out=True)

    def prompts(self, step: int) -> list[list[int]]:
        from recipes import chains

        problems = chains.problems(self.task, self.args.groups, random.Random(f"{self.args.seed}:{step}"))
        return [problem.prompt_ids + problem.answer_ids for problem in problems]


SUBJECTS = {"sums": SumsSubject, "chains": ChainsSubject}


def one_run(args: argparse.Namespace) -> None:
    import tinker

    from everlearn.rl.rollouts import Limits
    from everlearn.rl.settings import Settings
    from everlearn.rl.train import train

    kind, amount, arm = args.only.split("-", 2)
    subject = SUBJECTS[args.subject](args)
    live = argparse.Namespace(model=str(subject.model), base_url=None, base_model=None, threads=1)
    settings = Settings(
        "bench",
        steps=args.steps,
        rank=subject.rank,
        learning_rate=args.learning_rate,
        substeps=args.substeps,
        max_tokens=subject.max_tokens,
        limits=Limits(episodes_at_once=64),
        seed=args.seed,
        evaluate_every=max(1, args.steps // 8),
        save_every=args.steps,
        **ARMS[arm],
    )
    run = {"subject": args.subject, "kind": kind, "amount": float(amount), "rate": args.learning_rate, "steps": args.steps}
    run |= {"arm": arm, "seed": args.seed}
    path = args.runs / f"{args.only}-rate{args.learning_rate:g}-steps{args.steps}-seed{args.seed}.json"
    args.runs.mkdir(parents=True, exist_ok=True)
    started, origin = time.perf_counter(), common.origin("rl-staleness")
    with common.server(live) as server, tempfile.TemporaryDirectory() as out:
        service = tinker.ServiceClient(base_url=server.url)
        player = Lagged(int(amount)) if kind == "stale" else Disturbed(service, float(amount), args.seed, subject)
        rows: list[dict[str, Any]] = []

        def noted(row: dict[str, Any]) -> None:
            rows.append({name: row[name] for name in (*KEPT, *KEPT_OF_LOSS) if name in row})
            if MEASURED in row:  # written at each evaluation: a run that is cut short has not run in vain
                seconds = time.perf_counter() - started
                text = json.dumps(origin | {"memory": server.memory(), "run": run | {"seconds": seconds, "rows": rows}}, indent=1)
                path.write_text(text + "\n")

        train(service, settings, subject.dataset(), Path(out), subject.held_out(), on_step=noted, sampler_of=player)
        service.close("success").result()
    run |= {"seconds": time.perf_counter() - started, "rows": rows}
    learned = f"{first(run):.1%} -> {final(run):.1%} (best {best(run):.1%})"
    print(f"{args.only:20} rate {args.learning_rate:g} seed {args.seed}  {learned} in {run['seconds']:.0f} s", flush=True)


def measured(run: dict[str, Any]) -> list[float]:
    return [row[MEASURED] for row in run["rows"] if MEASURED in row]


def first(run: dict[str, Any]) -> float:
    return measured(run)[0]


def best(run: dict[str, Any]) -> float:
    return max(measured(run))


def final(run: dict[str, Any]) -> float:
    return statistics.fmean(measured(run)[-LAST:])


def played(run: dict[str, Any]) -> float:
    """The mean reward of the last quarter's batches, as the stale or disturbed sampler earned it."""
    rewards = [row["reward/total"] for row in run["rows"] if "reward/total" in row]
    return statistics.fmean(rewards[-max(1, len(rewards) // 4) :])


def place(run: dict[str, Any]) -> tuple[str, float, int, float]:
    """What a plot's panel has in common."""
    return run["kind"], run["rate"], run["steps"], run["amount"]


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind, rate, steps, amount and objective: held-out accuracy over the last evaluations and at its best, and the reward that
    was played last, with intervals over the seeds; and the mean distance of the policy that is trained from the one that sampled."""
    table = []
    for where, arm in dict.fromkeys((place(run), run["arm"]) for run in runs):
        members = [run for run in runs if (place(run), run["arm"]) == (where, arm)]
        drift = [row["kl/k3"] for run in members for row in run["rows"] if "kl/k3" in row]
        row = dict(zip(("kind", "rate", "steps", "amount"), where, strict=True)) | {"arm": arm, "seeds": len(members)}
        row["made"] = min(run["rows"][-1]["step"] for run in members)  # less than `steps` where a run was cut short
        row |= {"final": rl_chains.interval(list(map(final, members))), "best": rl_chains.interval(list(map(best, members)))}
        row["played"] = rl_chains.interval(list(map(played, members)))
        row["kl_k3"] = sum(drift) / max(len(drift), 1)
        table.append(row)
        end = row["final"]
        what = f"{row['kind']} {row['amount']:<6g} rate {row['rate']:<6g} {arm:10}"
        half = "      " if end["half"] is None else f"{end['half']:6.1%}"
        rest = f"step {row['made']:3}  played {row['played']['mean']:.2f}  KL {row['kl_k3']:.3g}"
        print(f"{what} {end['mean']:6.1%} +- {half}  ({end['least']:.1%} to {end['most']:.1%})  {rest}")
    return table


def collect(args: argparse.Namespace) -> None:
    files = [json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))]
    runs = sorted((file["run"] for file in files), key=lambda run: (place(run), list(ARMS).index(run["arm"]), run["seed"]))
    if not runs:
        raise SystemExit(f"there are no runs in {args.runs}")
    args.out = args.out or common.ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-rl-staleness.json"
    origins = {json.dumps({name: file[name] for name in ("commit", "hardware", "versions")}, sort_keys=True) for file in files}
    results = {"summary": summary(runs), "made_by": list(map(json.loads, sorted(origins)))}
    results |= {"commands": [file["command"] for file in files], "runs": runs}
    common.write_result(args, "rl-staleness", results)
    for kind, title in (("stale", "{:g} versions old, rate {:g}"), ("noise", "noise {:g}, rate {:g}")):
        panels = [
            (title.format(where[3], where[1]), [run for run in runs if place(run) == where])
            for where in dict.fromkeys(map(place, runs))
            if where[0] == kind
        ]
        if panels:
            path = args.out.with_name(f"{args.out.stem}{'' if kind == 'stale' else '-noise'}.svg")
            path.write_text(rl_chains.plot(panels, COLOURS, MEASURED))


if __name__ == "__main__":
    main()
