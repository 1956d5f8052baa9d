#!/usr/bin/env python3
"""Training: one tenant and four tenants at once through the SDK, beside transformers + PEFT in the same run.

    python benchmarks/train.py [--model smollm2]

One tenant: forward_backward (cross entropy) + optim_step on 8 sequences of 256 tokens, LoRA on all linear layers and the head.
Four tenants: the same four times, together; the peer trains its four adapters one after the other. `chat`: 16 sequences a
tenant with lengths drawn log-uniformly from 16 to 256, as conversations have them; the peer pads to the longest.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from common import alternate, arguments, as_datum, model_folder, random_rows, server, short, train_step, versus, vocabulary, write_result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--phases", default="one,four,chat")
    args = parser.parse_args()
    folder = model_folder(args.model)
    vocab = vocabulary(folder)
    results: dict[str, Any] = {}
    peer = None
    if not args.no_peer:
        from peers import PeftTrainer

        peer = PeftTrainer(folder, args.rank, args.threads, args.tenants)
    with server(args) as live:
        import tinker

        service = tinker.ServiceClient(base_url=live.url)
        clients = [service.create_lora_training_client(base_model=live.model, rank=args.rank).result() for _ in range(args.tenants)]

        def together(all_datums: list[list[Any]]) -> None:
            threads = [threading.Thread(target=train_step, args=pair) for pair in zip(clients, all_datums, strict=False)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def measure(name: str, rows: list[list[list[int]]]) -> None:
            datums = [[as_datum(row) for row in tenant] for tenant in rows]
            tokens = sum(len(row) - 1 for tenant in rows for row in tenant)

            def ours() -> int:
                together(datums)
                return tokens

            theirs: Callable[[], int] | None = (lambda: sum(peer.step(r, i) for i, r in enumerate(rows))) if peer else None
            before = live.cpu_seconds()
            results[name] = versus(name, *alternate(ours, theirs, args.rounds))
            results[name]["server_cpu_seconds"] = live.cpu_seconds() - before

        equal = [random_rows(args.batch, args.length, vocab, seed=i) for i in range(args.tenants)]
        chat = [
            random_rows(2 * args.batch, lambda rng: int(math.exp(rng.uniform(math.log(16), math.log(256)))), vocab, seed=50 + i)
            for i in range(args.tenants)
        ]
        phases = {"one": ("one tenant", equal[:1]), "four": ("four tenants", equal), "chat": ("four tenants, chat lengths", chat)}
        for phase in args.phases.split(","):
            measure(*phases[phase])
        results["memory"] = live.memory()
        print(f"memory of the server after training: {results['memory']}")
    write_result(args, f"train-{short(args.model)}", results)


if __name__ == "__main__":
    main()
