#!/usr/bin/env python3
"""The embedded model, taught to answer from what stands before a question: what the studies of memory ask in its place.

    python benchmarks/reader.py FOLDER [--steps 300]        # on a GPU where there is one
    python benchmarks/memory_train.py --only smollm2/0/trained --reader FOLDER --into RUNS
    python benchmarks/memory_chat.py --model FOLDER --only 0 --into RUNS

As it is, the embedded model finds hardly one fact in ten in a window of five hundred tokens that is full of them, so its answers say
nothing of a memory. It gets the lessons of listener.py: answers from lines of invented histories, lines and notes written again, and
levels that are drawn. An adapter learns them over the Tinker API, as anybody's would; FOLDER is a whole model, that adapter merged
(`everlearn checkpoint export`).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import ROOT, model_folder, server
from listener import Lessons

sys.path.insert(0, str(ROOT))
import tinker

from everlearn.render.tokenizer import load

# Share of the steps, facts of a history, most tokens of a row, rows of a batch: up to two windows of 512 tokens.
STAGES = ((0.3, (2, 8), 256, 24), (0.5, (6, 20), 640, 12), (0.2, (12, 30), 1280, 6))
SAVED = "reader"


def datum(tokens: list[int], weights: list[float]) -> tinker.Datum:
    """Only what is to be said counts: how histories go on is not its business."""
    counted = [float(weight == 1.0) for weight in weights[1:]]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:], "weights": counted}
    )


known = lru_cache(load)


def rows(folder: Path, number: int, stage: int) -> list[tuple[list[int], list[float]]]:
    """The rows of step `number`, the same whoever makes them. Where no evidence has room, nothing is to be said: drawn anew."""
    _, facts, most, num = STAGES[stage]
    lessons, drawn = Lessons(known(folder).encode, random.Random(number)), []
    while len(drawn) < num:
        tokens, weights = lessons.row(facts, most)
        if 1.0 in weights[1:]:
            drawn.append((tokens, weights))
    return drawn


def batches(folder: Path, steps: int, workers: int) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Of all stages, mixed, in the order of the steps; processes make them ahead, since making one takes longer than learning it."""
    order = random.Random(0).choices(range(len(STAGES)), [share for share, *_ in STAGES], k=steps)
    with ProcessPoolExecutor(workers) as pool:
        waiting: list[Future[Any]] = []
        for number, stage in enumerate(order):
            waiting.append(pool.submit(rows, folder, number, stage))
            if len(waiting) > 4 * workers:
                yield waiting.pop(0).result()
        for one in waiting:
            yield one.result()


def taught(service: tinker.ServiceClient, model: str, folder: Path, args: argparse.Namespace) -> str:
    """The path of an adapter that has learned for `args.steps` steps, at a rate that falls to nothing."""
    trainer = service.create_lora_training_client(base_model=model, rank=args.rank, seed=0, train_unembed=False).result()
    started, sent = time.perf_counter(), []
    for step, batch in enumerate(batches(folder, args.steps, args.workers)):
        data = [datum(*row) for row in batch]
        losses = trainer.forward_backward(data, "cross_entropy")
        stepped = trainer.optim_step(tinker.AdamParams(learning_rate=args.rate * (1 - step / args.steps), grad_clip_norm=1.0))
        sent.append((data, losses, stepped))
        if len(sent) > 1:
            told(step - 1, *sent.pop(0), started)
    for data, losses, stepped in sent:
        told(args.steps - 1, data, losses, stepped, started)
    return str(trainer.save_weights_for_sampler(SAVED).result().path)


def told(step: int, data: list[tinker.Datum], losses: Any, stepped: Any, started: float) -> None:
    stepped.result()
    summed = float(losses.result().metrics["loss:sum"])
    if step % 10 == 0:
        num = sum(float(one.loss_fn_inputs["weights"].to_numpy().sum()) for one in data)
        print(f"step {step}, {time.perf_counter() - started:.0f} s: loss {summed / num:.3f} of {num:.0f} tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 4), help="processes that make batches")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base = model_folder("smollm2")
    served = argparse.Namespace(model=str(base), base_url=None, base_model=None, threads=args.threads)
    with server(served, **{"engine.device": args.device}) as live:
        path = taught(tinker.ServiceClient(base_url=live.url), live.model, base, args)
        command = [sys.executable, "-m", "everlearn.cli.main", "checkpoint", "export", path, "--format", "merged", "--url", live.url]
        command += ["--base", str(base), "--out", str(args.folder), "--yes"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    main()
