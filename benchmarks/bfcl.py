#!/usr/bin/env python3
"""Calling functions: a model on the Berkeley function-calling leaderboard's simple cases, before and after training on others of them.

    python benchmarks/bfcl.py --data FOLDER

FOLDER holds two files of the leaderboard, in the places that they have in its repository (gorilla, by Shishir Patil and others, folder
berkeley-function-call-leaderboard/bfcl_eval/data, Apache-2.0): BFCL_v4_simple_python.json and possible_answer/BFCL_v4_simple_python.json.
everlearn doesn't ship them: clone that repository and name its data folder.

The first 100 cases are asked, the 300 others are trained on, through the Tinker API, as conversations in the model's own tool format
(docs/guides/tools.md). The tool is strict and must be called, so that a grammar holds the call to the tool's schema: a call that
isn't valid would be a fault of the server, and ends the script with 1. With --free each question is asked without a grammar too.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import bfcl_cases
from bfcl_cases import Case
from common import arguments, model_folder, server, write_result

FIELDS = {"temperature": 0.0, "parallel_tool_calls": False}


def asked(case: Case, model: str, strict: bool, max_tokens: int) -> dict[str, Any]:
    body = {"model": model, "messages": case.messages, "max_tokens": max_tokens, **FIELDS}
    return body | ({"tools": [case.strict_tool()], "tool_choice": "required"} if strict else {"tools": [case.tool]})


async def ask_all(url: str, model: str, cases: list[Case], strict: bool, args: Any) -> list[Any]:
    """The answer to every case."""
    import openai

    room = asyncio.Semaphore(args.at_once)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="tml-benchmark", timeout=1800, max_retries=0) as client:

        async def ask(case: Case) -> Any:
            async with room:
                return (await client.chat.completions.create(**asked(case, model, strict, args.max_tokens))).choices[0]

        return await asyncio.gather(*map(ask, cases))


def judge(cases: list[Case], choices: list[Any]) -> dict[str, Any]:
    """How many answers called, how many calls were valid by the tool's schema, how many were right; and which were not valid."""
    from jsonschema import Draft202012Validator

    tally: dict[str, Any] = {"asked": len(cases), "called": 0, "valid": 0, "right": 0, "cut": 0, "invalid": [], "calls": {}}
    for case, choice in zip(cases, choices, strict=True):
        calls = choice.message.tool_calls or []
        tally["called"] += bool(calls)
        tally["cut"] += choice.finish_reason == "length"
        tally["calls"][case.id] = [[call.function.name, call.function.arguments] for call in calls] or choice.message.content
        if len(calls) != 1:
            tally["invalid"].append(case.id)
            continue
        try:
            given = json.loads(calls[0].function.arguments)
        except ValueError:
            tally["invalid"].append(case.id)
            continue
        valid = calls[0].function.name == case.name and Draft202012Validator(case.schema).is_valid(given)
        tally["valid"] += valid
        tally["right"] += bfcl_cases.right(case, calls[0].function.name, given)
        if not valid:
            tally["invalid"].append(case.id)
    return tally


def datum(words: Any, form: Any, case: Case) -> Any:
    """The conversation that ends with the right call; loss falls on the call alone."""
    import numpy as np
    from tinker import types

    from everlearn.render import template

    function = {"name": case.name, "arguments": json.dumps(case.right_call(), ensure_ascii=False)}
    answer = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    tools = [case.tool]
    prompt, said = template.turn(words, form.inject([*case.messages, answer], tools), tools if form.native else None)
    asked, spoken = words.encode(prompt), words.encode(said)
    tokens = np.array(asked + spoken)
    weights = np.array([0.0] * (len(asked) - 1) + [1.0] * len(spoken), dtype=np.float32)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights}
    )


def train(client: Any, datums: list[Any], args: Any) -> list[float]:
    """Cross entropy with a linearly falling learning rate; a step is sent before the last one is answered. Mean loss of each step."""
    from tinker import types

    rng, losses = random.Random(args.seed), []
    batches = [
        order[start : start + args.batch]
        for order in (rng.sample(datums, len(datums)) for _ in range(args.epochs))
        for start in range(0, len(order), args.batch)
    ]
    waiting: deque[tuple[float, Any, Any]] = deque()

    def collect() -> None:
        weight, gradient, update = waiting.popleft()
        losses.append(gradient.result().metrics["loss:sum"] / weight)
        update.result()
        print(f"  step {len(losses)} of {len(batches)}: loss {losses[-1]:.3f}", file=sys.stderr, flush=True)

    for number, batch in enumerate(batches):
        weight = sum(sum(one.loss_fn_inputs["weights"].data) for one in batch)
        gradient = client.forward_backward(batch, "cross_entropy")
        rate = args.learning_rate * (1 - number / len(batches))
        waiting.append((weight, gradient, client.optim_step(types.AdamParams(learning_rate=rate))))
        if len(waiting) > 1:
            collect()
    while waiting:
        collect()
    return losses


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the leaderboard's files (see above)")
    parser.add_argument("--asked", type=int, default=100, help="cases that are asked: the first ones")
    parser.add_argument("--trained", type=int, default=300, help="cases that are trained on: those after them")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--max-tokens", type=int, default=512, help="room for a strict call that repeats an item as often as it may (32)")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--free", action="store_true", help="ask without a grammar too")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(model="smollm2")
    args = parser.parse_args()
    kinds = ["strict", "free"] if args.free else ["strict"]
    cases = bfcl_cases.load(args.data)
    to_ask, to_train = cases[: args.asked], cases[args.asked : args.asked + args.trained]
    results: dict[str, Any] = {"asked": len(to_ask), "trained": len(to_train)}
    with server(args, **{"engine.micro_batch_tokens": 1024}) as live:
        import tinker

        from everlearn.render import tokenizer, tools

        words = tokenizer.load(model_folder(args.model))
        form = tools.format_for(words)

        def measure(name: str, model: str) -> None:
            results[name] = {}
            for kind in kinds:
                started = time.perf_counter()
                choices = asyncio.run(ask_all(live.url, model, to_ask, kind == "strict", args))
                one = results[name][kind] = judge(to_ask, choices) | {"seconds": time.perf_counter() - started}
                counts = f"{one['called']} called, {one['valid']} valid by the schema, {one['right']} right"
                print(f"{name} training, {kind:6}: of {one['asked']} {counts} ({one['seconds']:.0f} s)", flush=True)

        measure("before", live.model)
        started = time.perf_counter()
        service = tinker.ServiceClient(base_url=live.url)
        client = service.create_lora_training_client(base_model=live.model, rank=args.rank, seed=args.seed, train_unembed=False).result()
        datums = [datum(words, form, case) for case in to_train]
        losses = train(client, datums, args)
        path = client.save_weights_for_sampler("calls").result().path
        seconds, tokens = time.perf_counter() - started, sum(one.model_input.length for one in datums) * args.epochs
        print(f"trained on {len(datums)} cases: {tokens} tokens in {seconds:.0f} s, loss {losses[0]:.2f} -> {losses[-1]:.2f}", flush=True)
        results["training"] = {"seconds": seconds, "tokens": tokens, "losses": losses, "cpu_seconds": live.cpu_seconds()}
        measure("after", path)
    for kind in kinds:
        before, after = (100 * results[name][kind]["right"] / len(to_ask) for name in ("before", "after"))
        print(f"accuracy, {kind:6}: {before:.0f} % before, {after:.0f} % after")
    write_result(args, "bfcl", results)
    broken = sorted({case for name in ("before", "after") for case in results[name]["strict"]["invalid"]})
    if broken:
        print(f"strict calls that aren't valid: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
