#!/usr/bin/env python3
"""Serving chats: against padded `generate`, and what prefixes, adapters, schemas, a training neighbour and overload cost.

    python benchmarks/serve.py [--phases equal,mixed] [--model smollm2]

equal      16 and 32 streamed chats at once, prompts and answers of one length; peer: transformers' `generate` on the padded batch
mixed      the same with prompts and answers of 16 to 256 tokens, log-uniform as in conversations; tokens that a chat asked for count
prefix     time to first token of a second request that shares 512 tokens with the first
adapters   32 chats on 8 adapters in one batch against 32 on one
schema     chats held to a JSON schema against free ones
training   latency of 8 chats at once, with a training run beside them and without
overload   requests at three times the rate that can be answered: what is answered still, and whether everybody hears something

Whatever is compared alternates in the same run. End tokens are switched off, so that both sides draw the same number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chats import Answer, Talk, all_ok, arriving, closed, percentile, tokens
from common import (
    Server,
    alternate,
    arguments,
    as_datum,
    model_folder,
    random_rows,
    server,
    short,
    train_step,
    versus,
    vocabulary,
    write_result,
)

PHASES = ("equal", "mixed", "prefix", "adapters", "schema", "training", "overload")
ROW = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "pattern": "^[a-z]{2,12}@[a-z]{2,12}[.](com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["new", "open", "closed", "urgent"]}, "maxItems": 3},
        "open": {"type": "boolean"},
    },
    "required": ["name", "age", "mail", "tags", "open"],
    "additionalProperties": False,
}
# So many rows that an answer is cut where a free one is.
SCHEMA = {
    "type": "object",
    "properties": {"rows": {"type": "array", "items": ROW, "minItems": 200}},
    "required": ["rows"],
    "additionalProperties": False,
}


def chat_folder(name: str) -> Path:
    """The model's folder; one without a tokenizer (the random one) gets the embedded model's, which has the same vocabulary."""
    folder = model_folder(name)
    if not (folder / "tokenizer.json").exists():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_folder("smollm2") / file, folder / file)
    return folder


class Bench:
    """The server under test, the peer, and where results go."""

    def __init__(self, args: argparse.Namespace, live: Server, folder: Path):
        self.args, self.live, self.folder = args, live, folder
        self.talk = Talk(live.model, stream=not args.whole)
        self.results: dict[str, Any] = {}
        self.generator: Any = None

    def run(self, bodies: Sequence[dict[str, Any]], at_once: int) -> list[Answer]:
        return all_ok(asyncio.run(closed(self.live.url, bodies, at_once)))

    def compare(self, name: str, ours: Callable[[], int], theirs: Callable[[], int] | None, **more: Any) -> None:
        self.results[name] = versus(name, *alternate(ours, theirs, self.args.rounds)) | more

    def padded(self, bodies: Sequence[dict[str, Any]], at_once: int) -> int:
        """The same chats by padded batches of `at_once`; only the tokens that each chat asked for count."""
        from everlearn.render import template, tokenizer

        words = tokenizer.load(self.folder)
        for first in range(0, len(bodies), at_once):
            batch = bodies[first : first + at_once]
            prompts = [words.encode(template.render(words, body["messages"], None)) for body in batch]
            self.generator.run(prompts, max(body["max_tokens"] for body in batch))
        return sum(body["max_tokens"] for body in bodies)

    def adapters(self, num: int, rank: int) -> list[str]:
        """Paths of `num` different adapters: the versions of one run, a training step apart."""
        import tinker

        service = tinker.ServiceClient(base_url=self.live.url)
        trainer = service.create_lora_training_client(base_model=self.live.model, rank=rank).result()
        datums, paths = [as_datum(row) for row in random_rows(2, 64, vocabulary(self.folder))], []
        for number in range(num):
            train_step(trainer, datums, learning_rate=1e-3)
            paths.append(trainer.save_weights_for_sampler(f"bench-{number}").result().path)
        return paths


# ---- phases ----


def equal(bench: Bench) -> None:
    against_padded(bench, "equal lengths", lambda: (bench.args.words, bench.args.new))


def mixed(bench: Bench) -> None:
    against_padded(bench, "16 to 256", lambda: (bench.talk.length(16, 256), bench.talk.length(16, 256)))


def against_padded(bench: Bench, what: str, lengths: Callable[[], tuple[int, int]]) -> None:
    if bench.generator is None and not bench.args.no_peer:
        from peers import Generator

        bench.generator = Generator(bench.folder, bench.args.threads)
    for at_once in bench.args.at_once:
        load = [lengths() for _ in range(at_once * bench.args.turns)]

        def bodies(load: list[tuple[int, int]] = load) -> list[dict[str, Any]]:
            return [bench.talk.body(words, new) for words, new in load]

        def ours(at_once: int = at_once, bodies: Callable[[], Any] = bodies) -> int:
            return tokens(bench.run(bodies(), at_once))

        def theirs(at_once: int = at_once, bodies: Callable[[], Any] = bodies) -> int:
            return bench.padded(bodies(), at_once)

        bench.compare(f"{at_once} chats, {what} / padded", ours, theirs if bench.generator else None)


def prefix(bench: Bench) -> None:
    """A long system message that both requests begin with, and a short question; nothing else runs."""
    first, second = [], []
    for number in range(bench.args.rounds + 1):
        system = {"role": "system", "content": bench.talk.words(500)}  # the template and the words make it 512 tokens and a few
        seen = []
        for _ in range(2):
            body = bench.talk.body(8, 4)
            body["messages"] = [system, *body["messages"]]
            seen += bench.run([body], 1)
        if number:
            first.append(1000 * seen[0].first)
            second.append(1000 * seen[1].first)
    row = {"first_ms": first, "second_ms": second, "prompt_tokens": seen[1].prompt_tokens, "cached_tokens": seen[1].cached_tokens}
    row["ratio"] = statistics.median(first) / statistics.median(second)
    print(
        f"shared prefix of {row['cached_tokens']} tokens: first text after {statistics.median(first):.1f} ms, then "
        f"{statistics.median(second):.1f} ms   ratio {row['ratio']:.2f}",
        flush=True,
    )
    bench.results["prefix"] = row


def adapters(bench: Bench) -> None:
    paths = bench.adapters(8, bench.args.rank)

    def draw(models: list[str]) -> int:
        bodies = [bench.talk.body(bench.args.words, bench.args.new, model=models[i % len(models)]) for i in range(32 * bench.args.turns)]
        return tokens(bench.run(bodies, 32))

    bench.compare("32 chats, 8 adapters / one", lambda: draw(paths), lambda: draw(paths[:1]))
    cost(bench, "32 chats, 8 adapters / one")


def schema(bench: Bench) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "people", "schema": SCHEMA, "strict": True}}

    def draw(**fields: Any) -> int:
        return tokens(bench.run([bench.talk.body(bench.args.words, bench.args.new, **fields) for _ in range(32 * bench.args.turns)], 32))

    bench.compare("32 chats, json_schema / free", lambda: draw(response_format=form), draw)
    cost(bench, "32 chats, json_schema / free")


def cost(bench: Bench, name: str) -> None:
    """The time that the same tokens take more, in per cent."""
    row = bench.results[name]
    row["cost_percent"] = 100 * (1 / row["ratio"] - 1)
    print(f"{'':34} the same tokens take {row['cost_percent']:.1f} % more time", flush=True)


def training(bench: Bench) -> None:
    from neighbour import Neighbour

    seen: dict[str, list[Answer]] = {"without": [], "with": []}
    with Neighbour(bench.live, bench.args.rank, vocabulary(bench.folder)) as neighbour:
        for number in range(bench.args.rounds + 1):
            for which in seen:
                neighbour.train(which == "with")
                load = [bench.talk.body(bench.args.words, bench.args.new) for _ in range(8 * bench.args.turns * 2)]
                answers = bench.run(load, 8)
                seen[which] += answers if number else []
        neighbour.train(False)
        steps = neighbour.steps.value
    row: dict[str, Any] = {"train_steps": steps}
    for name, values in (
        ("chat", lambda answer: [answer.seconds]),
        ("first text", lambda answer: [answer.first]),
        ("between texts", lambda answer: answer.gaps),
    ):
        figures = {which: [1000 * value for answer in answers for value in values(answer)] for which, answers in seen.items()}
        row[name] = {
            which: {"p50_ms": percentile(found, 0.5), "p99_ms": percentile(found, 0.99), "n": len(found)}
            for which, found in figures.items()
        }
        for share in ("p50", "p99"):
            without, beside = (row[name][which][f"{share}_ms"] for which in seen)
            ratio = row[name][f"ratio_{share}"] = beside / max(without, 1e-9)
            print(f"{name:14} {share} {without:8.1f} ms alone, {beside:8.1f} ms beside training   ratio {ratio:.2f}")
    print(f"{'':14} {steps} training steps meanwhile", flush=True)
    bench.results["training"] = row


def answered_per_second(bench: Bench) -> float:
    best = 0.0
    for at_once in (16, 32, 64):
        load = [bench.talk.body(bench.args.words, bench.args.new) for _ in range(at_once * bench.args.turns)]
        started = time.perf_counter()
        bench.run(load, at_once)
        best = max(best, len(load) / (time.perf_counter() - started))
    return best


def overload(bench: Bench) -> None:
    """The peak: the best of 16, 32 and 64 clients that never rest, in the mean of before and after: other machines' load on this one
    comes and goes. In between, requests arrive three times as fast, at random moments."""
    args = bench.args
    bench.run([bench.talk.body(args.words, args.new) for _ in range(16)], 16)
    before = answered_per_second(bench)
    rate = 3 * before
    bodies = [bench.talk.body(args.words, args.new) for _ in range(int(rate * args.seconds))]
    started = time.perf_counter()
    answers = asyncio.run(arriving(bench.live.url, bodies, rate))
    seconds = time.perf_counter() - started
    after = answered_per_second(bench)
    peak = (before + after) / 2
    good = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status == 429 and answer.retry_after]
    row = {
        "peak_per_second": [before, after],
        "offered_per_second": rate,
        "offered": len(answers),
        "answered": len(good),
        "refused_with_retry_after": len(refused),
        "others": [answer.error for answer in answers if not answer.ok and not (answer.status == 429 and answer.retry_after)][:20],
        "seconds": seconds,
        "answered_per_second": len(good) / seconds,
        "ratio": len(good) / seconds / peak,
        "first_text_p50_seconds": percentile([answer.first for answer in good], 0.5),
        "first_text_p99_seconds": percentile([answer.first for answer in good], 0.99),
        "refusal_p99_seconds": percentile([answer.seconds for answer in refused], 0.99),
    }
    print(
        f"3x overload: {row['offered']} requests in {seconds:.0f} s, {len(good)} answered, {len(refused)} refused with Retry-After, "
        f"{len(answers) - len(good) - len(refused)} others\n"
        f"{'':13}{row['answered_per_second']:.1f} answered a second, {peak:.1f} at the peak   ratio {row['ratio']:.2f}   "
        f"first text p50 {row['first_text_p50_seconds']:.1f} s",
        flush=True,
    )
    bench.results["overload"] = row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--phases", default=",".join(PHASES), help=f"which of {', '.join(PHASES)} (default: all)")
    parser.add_argument("--at-once", type=lambda text: [int(part) for part in text.split(",")], default=[16, 32], help="chats at once")
    parser.add_argument("--turns", type=int, default=2, help="requests of each chat in a round")
    parser.add_argument("--words", type=int, default=32, help="words of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40, help="how long too much is asked")
    parser.add_argument("--whole", action="store_true", help="answers in one piece instead of streams")
    args = parser.parse_args()
    chosen = args.phases.split(",")
    if unknown := set(chosen) - set(PHASES):
        raise SystemExit(f"unknown phase {', '.join(unknown)}; there are {', '.join(PHASES)}")
    folder = chat_folder(args.model)
    results: dict[str, Any] = {}
    with server(args) as live:
        bench = Bench(args, live, folder)
        for phase in chosen:
            started = time.perf_counter()
            {f.__name__: f for f in (equal, mixed, prefix, adapters, schema, training, overload)}[phase](bench)
            bench.results.setdefault("phase_seconds", {})[phase] = time.perf_counter() - started
        results = bench.results | {"memory": live.memory()}
    kind = "" if len(chosen) == len(PHASES) else f"{'-'.join(chosen)}-"
    write_result(args, f"serve-{kind}{short(args.model)}", results)


if __name__ == "__main__":
    main()
