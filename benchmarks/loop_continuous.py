"""Learning without nights against learning at night, on the same traffic: how soon a correction is answered right, what is forgotten, what
it costs.

    python benchmarks/loop_continuous.py --smoke --only continuous            # two short days, to see that it runs
    python benchmarks/loop_continuous.py --only nightly --seed 0              # one arm, one seed, one file
    python benchmarks/loop_continuous.py --collect RUNS/*.json                # the result file and its plot, from such files

The subject is a small model that is trained here first, for a minute, on what is true of 40 people (where they work, what their room is).
Then the world moves: each day some of it changes. Users ask about all of it, one question an hour or oftener, each in an episode of its
own, and correct what is wrong. Time is virtual; of what the machine does only learning is counted into a delay, at its real pace. Arms:

    nightly            at 03:00 a version learns all corrections, from the base model
    nightly-champion   the same, from the version that serves
    continuous         weights move with every episode; the gate is asked every so many steps

All learn what was corrected, and with it what was called good, so that it stays. All have the same gate: what was corrected has to be
right again. `delay`: hours from the first correction of a changed fact to the first version that answers it right. `gold`: share of all
questions that the serving version answers right by what is true now; `kept`: of those whose answer never changed. Each is asked whenever
another version serves. `worst_fall`: the largest share of right answers that a new version lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
import continuous_told as told
import curves
import tinker

from everlearn.cli.client import Client
from everlearn.loop.moving import moving_of
from everlearn.loop.runner import Runner
from everlearn.loop.service import read

NAMES = [a + b for a in ("an", "bo", "ca", "de", "el") for b in ("ra", "lin", "mo", "ver", "sta", "do", "ki", "nu")]
CITIES = ("paris", "rome", "oslo", "bern", "lima", "cairo", "tokyo", "delhi", "quito", "accra", "minsk", "riga")
KINDS = {"city": ("where does {} work?", "tell me where {} works."), "room": ("which room has {}?", "what is the room of {}?")}
ARMS = ("nightly", "nightly-champion", "continuous")
NIGHT = 3.0  # o'clock
GATE = {"owner": "study", "promote": "automatic", "corrections": {"min_right": 0.9, "max_broken": 0.1}}
UPDATE = {"rank": 16, "batch": 16, "paraphrases": 1, "rehearsed": 4}


class World:
    """What is true, and how it changes. A fact is (name, kind)."""

    def __init__(self, seed: int, people: int):
        self.rng = random.Random(f"world:{seed}")
        self.people = NAMES[:people]
        self.truth = {(name, kind): self.value(kind) for name in self.people for kind in KINDS}
        self.changed: dict[tuple[str, str], float] = {}

    def value(self, kind: str) -> str:
        return self.rng.choice(CITIES) if kind == "city" else f"room {self.rng.randrange(10, 60)}"

    def move(self, number: int, hour: float) -> None:
        """So many facts that were never changed get another value."""
        for fact in self.rng.sample(sorted(set(self.truth) - set(self.changed)), number):
            before = self.truth[fact]
            while self.truth[fact] == before:
                self.truth[fact] = self.value(fact[1])
            self.changed[fact] = hour


def question(fact: tuple[str, str], wording: int = 0) -> str:
    return KINDS[fact[1]][wording].format(fact[0])


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path, world: World, steps: int) -> float:
    """A model of about 1 M parameters that knows what is true at first; the share of right answers in training's last batches."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [question(fact, wording) + " " + value for fact, value in world.truth.items() for wording in (0, 1)]
    texts += [f" {city}" for city in CITIES] + ["user assistant\n" * 3]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 3, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[1], "eos_token": special[2], "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, "chat_template": TEMPLATE}))
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **shape, **ends))
    rows = []
    for fact, value in world.truth.items():
        for wording in (0, 1):
            prompt = f"<|im_start|>user\n{question(fact, wording)}<|im_end|>\n<|im_start|>assistant\n"
            ids, answer = tokenizer.encode(prompt).ids, tokenizer.encode(f"{value}<|im_end|>").ids
            rows.append((ids + answer, len(ids)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rng, right = random.Random(0), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        chosen = rng.sample(rows, min(48, len(rows)))
        width = max(len(ids) for ids, _ in chosen)
        inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([[-100] * shown + ids[shown:] + [-100] * (width - len(ids)) for ids, shown in chosen])
        made = model(input_ids=inputs, labels=labels)
        made.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        same = (made.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
        right.append(same.all(dim=1).float().mean().item())
    model.save_pretrained(folder)
    return statistics.fmean(right[-5:])


class Study:
    """One arm on one server."""

    def __init__(self, live: Any, service: Any, world: World, args: argparse.Namespace):
        self.api, self.service, self.world, self.args = Client(live.url, timeout=600.0), service, world, args
        self.arm, self.hour, self.count = args.only, 0.0, 0
        self.rng = random.Random(f"users:{args.seed}")
        update = {
            **UPDATE,
            "epochs": args.epochs,
            "learning_rate": args.learning_rate,
            "start": "champion" if self.arm == "nightly-champion" else "base",
        }
        described: dict[str, Any] = {"base": live.model, "settle": 0.0, "update": update, "gate": GATE}
        described |= {"reward": {"learn": False}, "filters": {"good": True}}
        if self.arm == "continuous":
            moves = {"steps": args.steps, "gate_every": args.gate_every, "staleness": 10 * args.gate_every, "quiet": 0.0, "rewards": False}
            update |= {"learning_rate": args.moving_rate, "start": "champion"}
            described |= {"triggers": {"continuous": True}, "continuous": moves}
        self.api.post("/v1/deployments", {"name": "desk", "description": described})
        self.runner = Runner(self.api, service, "desk", lambda line: None)
        self.seconds, self.served = 0.0, ""
        self.corrected: dict[tuple[str, str], float] = {}
        self.delays: dict[tuple[str, str], float] = {}
        self.right: dict[tuple[str, str], bool] = {}
        self.curve: list[tuple[float, float, float]] = []
        self.drops: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        args = self.args
        per_hour = args.asks / 24.0
        self.look()
        for day in range(args.days):
            self.hour = 24.0 * day
            self.world.move(args.changes, self.hour)
            self.look(force=True)
            slept = False
            for number in range(args.asks):
                self.hour = 24.0 * day + number / per_hour
                if self.arm != "continuous" and not slept and self.hour >= 24.0 * day + NIGHT:
                    slept = True
                    self.learn(night=True)
                self.ask()
                if self.arm == "continuous":
                    self.learn(night=False)
            print(f"{self.arm} day {day + 1}: gold {self.curve[-1][1]:.2f}, kept {self.curve[-1][2]:.2f}, {self.seconds:.0f} s", flush=True)
        self.hour = 24.0 * args.days
        self.curve.append((self.hour, *self.curve[-1][1:]))
        return self.found()

    def ask(self) -> None:
        """A user asks something and says what is wrong with the answer."""
        fact = self.rng.choice(sorted(self.world.truth))
        self.count += 1
        body = {"model": "desk", "messages": [{"role": "user", "content": question(fact)}], "temperature": 0, "max_tokens": 8}
        found = self.api.post("/v1/chat/completions", {**body, "user": f"user-{self.count}"})
        text, record = str(found["choices"][0]["message"]["content"]), str(found["everlearn"]["record"])
        good = text.strip() == self.world.truth[fact]
        self.api.post("/v1/feedback", {"record_id": record, "kind": "boolean", "value": good})
        if not good:
            self.api.post("/v1/feedback", {"record_id": record, "kind": "demonstration", "text": self.world.truth[fact]})
            if fact in self.world.changed:
                self.corrected.setdefault(fact, self.hour)

    def learn(self, night: bool) -> None:
        began = time.monotonic()
        if night and self.corrected:
            self.runner.begin("it is night")
        if not night or self.corrected:
            self.runner.run()
        took = time.monotonic() - began
        self.seconds += took
        self.look(took=took)

    def look(self, force: bool = False, took: float = 0.0) -> None:
        """Asks everything, where another version serves. `took`: seconds of learning that are counted into its delay."""
        champion = read(self.api, "desk").champion
        if champion == self.served and not force:
            return
        facts = sorted(self.world.truth)
        before, self.right = self.right, {}
        for fact in facts:
            body = {"model": champion if not champion.endswith("@0") else self.runner_base(), "temperature": 0, "max_tokens": 8}
            asked = {**body, "messages": [{"role": "user", "content": question(fact)}], "store": False}
            text = str(self.api.post("/v1/chat/completions", asked)["choices"][0]["message"]["content"])
            self.right[fact] = text.strip() == self.world.truth[fact]
            if self.right[fact] and fact in self.corrected and fact not in self.delays:
                self.delays[fact] = self.hour + took / 3600.0 - self.corrected[fact]
        gold = statistics.fmean(self.right.values())
        kept = statistics.fmean(self.right[fact] for fact in facts if fact not in self.world.changed)
        if self.served and champion != self.served:
            broken = [fact for fact in facts if before.get(fact) and not self.right[fact]]
            self.drops.append({"hour": self.hour, "to": champion, "gold": gold, "kept": kept, "broken": len(broken)})
        if self.curve:
            self.curve.append((self.hour, *self.curve[-1][1:]))
        self.curve.append((self.hour, gold, kept))
        self.served = champion

    def runner_base(self) -> str:
        return str(read(self.api, "desk").base_model)

    def found(self) -> dict[str, Any]:
        events: list[dict[str, Any]] = self.api.all("/v1/deployments/desk/history", 100_000)
        kinds = [event["kind"] for event in events]
        now = read(self.api, "desk")
        tokens = sum(int(event["evidence"].get("update", {}).get("tokens", 0)) for event in events)
        if self.arm == "continuous":
            tokens = moving_of(now).total
        delays = sorted(self.delays.values())
        waiting = [fact for fact in self.corrected if fact not in self.delays]
        falls = [one["broken"] / len(self.right) for one in self.drops]
        return {
            "arm": self.arm,
            "asked": self.count,
            "changed": len(self.world.changed),
            "corrected": len(self.corrected),
            "learned": len(delays),
            "waiting": len(waiting),
            "delay_hours": {"median": statistics.median(delays) if delays else None, "all": delays},
            "gold": {"mean": mean_over_time(self.curve, 1), "last": self.curve[-1][1]},
            "kept": {"least": min(point[2] for point in self.curve), "last": self.curve[-1][2]},
            "worst_fall": max(falls, default=0.0),
            "versions": kinds.count("promoted"),
            "rejected": kinds.count("rejected"),
            "learning_seconds": round(self.seconds, 1),
            "training_tokens": tokens,
            "curve": self.curve,
            "changes_of_version": self.drops,
            "rejections": [event["reason"] for event in events if event["kind"] == "rejected"],
        }


def mean_over_time(curve: list[tuple[float, float, float]], place: int) -> float:
    area = sum((after[0] - before[0]) * before[place] for before, after in itertools.pairwise(curve))
    return area / max(curve[-1][0] - curve[0][0], 1e-9)


def collect(args: argparse.Namespace) -> None:
    """The dated result file of all runs, the plot, and what is told of each arm as a table. A result file's own runs will do as well."""
    read_files = [json.loads(path.read_text()) for path in args.collect]
    runs = [run for one in read_files for run in one["results"].get("runs", [one])]
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for run in runs:
        arms[run["results"]["arm"]].append(run["results"])
    arms = {arm: found for arm, found in arms.items() if found}
    shown = {arm: told.summed(found) for arm, found in arms.items()}
    days = max(run["results"]["settings"]["days"] for run in runs)
    hours = [24.0 * days * step / 160 for step in range(161)]
    panels = {
        f"{title}, over days": {
            arm: [[(hour / 24.0, at(one["curve"], hour, place)) for hour in hours] for one in found] for arm, found in arms.items()
        }
        for title, place in (("right by what is true now", 1), ("right of what never changed", 2))
    }
    waited = [told.FOLLOWED * step / 160 for step in range(161)]
    panels["corrections answered right, over hours since"] = {
        arm: [[(hour, told.within(one, hour)) for hour in waited] for one in found] for arm, found in arms.items()
    }
    common.write_result(args, "loop-continuous", {"arms": shown, "what": told.WHAT, "runs": runs})
    out = args.out or common.ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-loop-continuous.json"
    out.with_suffix(".svg").write_text(curves.svg(panels, "time", "share"))
    print(told.table(shown))


def at(curve: list[list[float]], hour: float, place: int) -> float:
    return next((point[place] for point in reversed(curve) if point[0] <= hour), curve[0][place])


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--only", choices=ARMS, default="continuous")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--asks", type=int, default=72, help="questions of a day")
    parser.add_argument("--changes", type=int, default=4, help="facts that change each day")
    parser.add_argument("--people", type=int, default=len(NAMES))
    parser.add_argument("--pretraining", type=int, default=500, help="steps that make the model")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of a night")
    parser.add_argument("--epochs", type=int, default=30, help="of a night")
    parser.add_argument("--moving-rate", type=float, default=1e-3, help="of a move")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gate-every", type=int, default=24)
    parser.add_argument(
        "--collect",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="makes the result file of runs (or of a result file's), and measures nothing",
    )
    args = parser.parse_args()
    if args.collect:
        collect(args)
        return
    if args.smoke:
        args.days, args.asks, args.people, args.pretraining, args.changes = 2, 24, 8, 200, 3
    logging.getLogger("tinker").setLevel(logging.ERROR)
    world = World(args.seed, args.people)
    with tempfile.TemporaryDirectory(prefix="everlearn-continuous-") as made:
        folder, began = Path(made) / "subject", time.monotonic()
        known = make_model(folder, world, args.pretraining)
        print(f"the subject knows {known:.2f} of it, made in {time.monotonic() - began:.0f} s", flush=True)
        args.model = str(folder)
        with common.server(args, **{"engine.kv_tokens": 16384}) as live, tinker.ServiceClient(
            base_url=live.url, api_key="tml-benchmark"
        ) as service:  # fmt: skip
            results = Study(live, service, world, args).run()
    results |= {
        "seed": args.seed,
        "known_at_first": known,
        "settings": {**UPDATE, "days": args.days, "asks": args.asks, "changes": args.changes},
    }
    results["settings"] |= {"epochs": args.epochs, "learning_rate": args.learning_rate, "moving_rate": args.moving_rate}
    results["settings"] |= {"steps": args.steps, "gate_every": args.gate_every}
    print(json.dumps({key: value for key, value in results.items() if key not in ("curve", "changes_of_version", "rejections")}, indent=1))
    common.write_result(args, f"loop-continuous-{args.only}-{args.seed}", results)


if __name__ == "__main__":
    main()
