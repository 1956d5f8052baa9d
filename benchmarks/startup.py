#!/usr/bin/env python3
"""Start: seconds from `everlearn serve` to each first answer, and the memory of an idle server.

python benchmarks/startup.py [--model smollm2]
"""

from __future__ import annotations

import time
from typing import Any

from common import answers, arguments, as_datum, model_folder, random_rows, server, short, until, vocabulary, write_result


def main() -> None:
    args = arguments(__doc__).parse_args()
    vocab = vocabulary(model_folder(args.model))
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        with server(args, wait=False) as live:
            seconds: dict[str, Any] = {}

            def mark(name: str, live: Any = live, seconds: dict[str, Any] = seconds) -> None:
                seconds[name] = round(time.perf_counter() - live.started, 2)

            until(lambda live=live: answers(live.url + "/api/v1/healthz"))
            mark("healthz")
            import tinker
            from tinker import types

            service = tinker.ServiceClient(base_url=live.url)
            client = service.create_lora_training_client(base_model=live.model, rank=8).result()
            mark("create_model")
            datums = [as_datum(row) for row in random_rows(1, 64, vocab)]
            client.forward_backward(datums, "cross_entropy").result()
            mark("first_training_answer")
            sampler = service.create_sampling_client(base_model=live.model).result()
            sampler.sample(types.ModelInput.from_ints([5, 6, 7]), 1, types.SamplingParams(max_tokens=1)).result()
            mark("first_sample")
            until(lambda live=live: answers(live.url + "/readyz"))
        with server(args) as live:
            time.sleep(1)
            seconds["idle"] = live.memory()
        rounds.append(seconds)
        print(seconds, flush=True)
    write_result(args, f"startup-{short(args.model)}", {"rounds": rounds})


if __name__ == "__main__":
    main()
