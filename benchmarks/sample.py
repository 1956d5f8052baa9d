#!/usr/bin/env python3
"""Sampling: 16 prompts x 64 tokens through the SDK, with and without an adapter, alone and while a tenant trains.

    python benchmarks/sample.py [--model smollm2]

Peers in the same run: transformers' `generate` on the padded batch and one by one. End tokens are switched off on both sides, so
that both draw the same number of tokens at temperature 1.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import alternate, arguments, as_datum, model_folder, random_rows, server, short, train_step, versus, vocabulary, write_result


@contextmanager
def training(client: Any, datums: list[Any]) -> Iterator[list[float]]:
    """A tenant that trains without a pause; yields the times at which its steps ended."""
    stop, ended = threading.Event(), []

    def keep_on() -> None:
        while not stop.is_set():
            train_step(client, datums)
            ended.append(time.perf_counter())

    thread = threading.Thread(target=keep_on)
    thread.start()
    time.sleep(0.3)
    try:
        yield ended
    finally:
        stop.set()
        thread.join()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    folder = model_folder(args.model)
    vocab = vocabulary(folder)
    results: dict[str, Any] = {}
    generator = None
    if not args.no_peer:
        from peers import Generator

        generator = Generator(folder, args.threads)
    with server(args) as live:
        import tinker
        from tinker import types

        service = tinker.ServiceClient(base_url=live.url)
        trainer = service.create_lora_training_client(base_model=live.model, rank=args.rank).result()
        datums = [as_datum(row) for row in random_rows(8, 256, vocab)]
        train_step(trainer, datums)
        started = time.perf_counter()
        adapter = trainer.save_weights_and_get_sampling_client(name="bench").result()
        results["save_and_get_sampler_seconds"] = time.perf_counter() - started
        base = service.create_sampling_client(base_model=live.model).result()
        seeds = iter(range(10**9))

        def prompts() -> list[list[int]]:
            """Fresh ones each time: a prefix that is served from the cache would flatter us."""
            return [row[: args.prompt_length] for row in random_rows(args.prompts, args.prompt_length, vocab, seed=next(seeds))]

        def draw(client: Any, rows: list[list[int]]) -> int:
            params = [types.SamplingParams(max_tokens=args.new, temperature=1.0, seed=next(seeds), stop=[]) for _ in rows]
            futures = [client.sample(types.ModelInput.from_ints(r), 1, p) for r, p in zip(rows, params, strict=True)]
            return sum(len(sequence.tokens) for future in futures for sequence in future.result().sequences)

        padded = (lambda: generator.run(prompts(), args.new)) if generator else None
        single = (lambda: generator.run(prompts()[:4], args.new, one_by_one=True)) if generator else None
        batch = lambda: draw(base, prompts())  # noqa: E731
        results["batch"] = versus(f"{args.prompts} prompts, base / padded", *alternate(batch, padded, args.rounds))
        results["one_by_one"] = versus(f"{args.prompts} prompts, base / one by one", *alternate(batch, single, args.rounds))
        ours, theirs = alternate(lambda: draw(adapter, prompts()), lambda: draw(base, prompts()), args.rounds)
        results["adapter"] = versus("adapter / base (both everlearn)", ours, theirs)
        results["single_stream"] = versus("single stream / generate", *alternate(lambda: draw(adapter, prompts()[:1]), single, args.rounds))

        with training(trainer, datums) as steps:
            ours, _ = alternate(lambda: draw(adapter, prompts()), None, args.rounds)
        results["while_training"] = versus("while a tenant trains", ours, []) | {"train_steps": len(steps)}
    write_result(args, f"sample-{short(args.model)}", results)


if __name__ == "__main__":
    main()
