"""Reinforcement learning in one page: sums, group-mean advantages, importance sampling. Nothing but the Tinker SDK and numpy.

    everlearn serve &                                     # or any other server of the Tinker API
    export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local
    python recipes/rl_loop.py --model smollm2 --steps 40 --out runs/sums

Each step asks 16 sums, 8 answers each, rewards them, and takes one optimizer step. One pair of numbers in five is held out and only
evaluated on. metrics.jsonl gets a line for each step; the same command continues a run from what it saved last. everlearn/rl/train.py is
the same loop with environments, limits, failures and more measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import tinker
from tinker import types

END = "<|im_end|>"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn sums by reward.")
    parser.add_argument("--model", default="smollm2", help="a base model of the server that speaks ChatML")
    parser.add_argument("--out", type=Path, default=Path("runs/sums"), help="folder of metrics.jsonl and state.json")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--below", type=int, default=20, help="sums of two numbers below this")
    parser.add_argument("--groups", type=int, default=16, help="sums in a batch")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each")
    parser.add_argument("--loss", choices=["importance_sampling", "ppo", "cispo"], default="importance_sampling")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=6)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("--evaluated", type=int, default=64, help="held-out sums in an evaluation, at most")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ---- the task ----


def pairs(below: int, seed: int, held_out: bool) -> list[tuple[int, int]]:
    """All pairs of one split, decided by a digest, so that none is in both."""

    def fifth(a: int, b: int) -> bool:
        return hashlib.blake2b(f"{seed}:{a}:{b}".encode(), digest_size=8).digest()[0] % 5 == 0

    return [(a, b) for a in range(below) for b in range(below) if fifth(a, b) == held_out]


def prompt_of(tokenizer, a: int, b: int) -> types.ModelInput:
    """The answer is begun for the policy: a small model that is only asked explains instead, and what is never done earns no reward."""
    text = f"<|im_start|>user\nWhat is {a} + {b}?{END}\n<|im_start|>assistant\n{a} + {b} ="
    return types.ModelInput.from_ints(tokenizer.encode(text, add_special_tokens=False))


def reward_of(text: str, a: int, b: int) -> float:
    """1 for the sum, 0 for another number, -0.1 for anything else."""
    said = re.fullmatch(r"\s*(-?[0-9]{1,9})\s*", text)
    return -0.1 if said is None else float(int(said[1]) == a + b)


# ---- one step ----


def play(sampler, tokenizer, batch: list[tuple[int, int]], args: argparse.Namespace, step: int):
    """For each sum: its prompt, the sampled sequences, their rewards. All are asked at once; the server batches them."""
    prompts = [prompt_of(tokenizer, a, b) for a, b in batch]
    futures = []
    for place, prompt in enumerate(prompts):
        params = types.SamplingParams(max_tokens=args.max_tokens, stop=[END], seed=(args.seed * 1_000_003 + step) * 1000 + place)
        futures.append(sampler.sample(prompt, args.group_size, params))
    for (a, b), prompt, future in zip(batch, prompts, futures, strict=True):
        sequences = future.result().sequences
        texts = [tokenizer.decode(sequence.tokens, skip_special_tokens=True) for sequence in sequences]
        yield prompt, sequences, np.array([reward_of(text, a, b) for text in texts])


def datum_of(prompt: types.ModelInput, sequence, advantage: float) -> types.Datum:
    """The sampled tokens as they are: position i predicts token i + 1, and only sampled targets have an advantage."""
    before, count = prompt.length - 1, len(sequence.tokens)
    tokens = prompt.to_ints() + list(sequence.tokens)
    inputs = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "logprobs": np.array([0.0] * before + list(sequence.logprobs), np.float32),
        "advantages": np.array([0.0] * before + [advantage] * count, np.float32),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={name: types.TensorData.from_numpy(value) for name, value in inputs.items()},
    )


def train(client, data: list[types.Datum], args: argparse.Namespace) -> dict[str, float]:
    """One gradient, one optimizer step, and how far the policy is from the one that sampled."""
    losses = client.forward_backward(data, args.loss)
    stepped = client.optim_step(types.AdamParams(learning_rate=args.learning_rate))
    outputs = losses.result().loss_fn_outputs
    stepped.result()
    gaps = []
    for datum, output in zip(data, outputs, strict=True):
        recorded = datum.loss_fn_inputs["logprobs"].to_numpy()
        gaps.append((output["logprobs"].to_numpy() - recorded)[recorded != 0])
    gap = np.concatenate(gaps).astype(np.float64)
    ratio = np.exp(gap)
    ess = ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
    return {"kl_k3": float((ratio - 1 - gap).mean()), "ratio_max": float(ratio.max()), "ess": float(ess)}


def evaluate(sampler, tokenizer, held_out: list[tuple[int, int]], args: argparse.Namespace) -> float:
    """The share of held-out sums whose likeliest answer is right."""
    params = types.SamplingParams(max_tokens=args.max_tokens, temperature=0.0, stop=[END])
    futures = [sampler.sample(prompt_of(tokenizer, a, b), 1, params) for a, b in held_out]
    texts = [tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True) for future in futures]
    return float(np.mean([reward_of(text, a, b) == 1.0 for text, (a, b) in zip(texts, held_out, strict=True)]))


# ---- the run ----


def keep(file: Path, state: dict) -> None:
    """Whole or not at all: who is killed while writing continues from what was there before."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(state))
    new.replace(file)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, service = args.out / "state.json", tinker.ServiceClient()
    if state_file.exists():
        state = json.loads(state_file.read_text())
        first = state["step"]
        client = service.create_training_client_from_state_with_optimizer(state["path"]).result()
    else:
        first = 0
        client = service.create_lora_training_client(args.model, rank=args.rank, seed=args.seed).result()
    tokenizer = client.get_tokenizer()
    train_pairs, held_out = (pairs(args.below, args.seed, split) for split in (False, True))
    held_out = random.Random(args.seed).sample(held_out, min(args.evaluated, len(held_out)))

    def write(row: dict[str, float]) -> None:
        line = json.dumps({name: round(value, 6) for name, value in row.items()})
        print(line, flush=True)
        with (args.out / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")

    for step in range(first, args.steps + 1):
        started = time.monotonic()
        sampler = client.save_weights_and_get_sampling_client().result()
        row: dict[str, float] = {"step": step}
        if step % args.evaluate_every == 0 or step == args.steps:
            row["held_out"] = evaluate(sampler, tokenizer, held_out, args)
        if step == args.steps:
            write(row)
            break
        batch = random.Random(f"{args.seed}:{step}").sample(train_pairs, args.groups)
        groups = list(play(sampler, tokenizer, batch, args, step))
        data = [
            datum_of(prompt, sequence, advantage)
            for prompt, sequences, rewards in groups
            for sequence, advantage in zip(sequences, rewards - rewards.mean(), strict=True)
            if np.ptp(rewards) > 0  # a group that agrees says nothing about what is better
        ]
        rewards = np.concatenate([rewards for _, _, rewards in groups])
        sampled = [sequence for _, sequences, _ in groups for sequence in sequences]
        row |= {"reward": float(rewards.mean()), "right": float((rewards == 1).mean()), "number": float((rewards >= 0).mean())}
        row["collapsed"] = float(np.mean([np.ptp(rewards) == 0 for _, _, rewards in groups]))
        row["entropy"] = -float(np.mean([logprob for sequence in sampled for logprob in sequence.logprobs]))
        row["tokens"] = float(sum(len(sequence.tokens) for sequence in sampled))
        if data:
            row |= train(client, data, args)
        write(row | {"seconds": time.monotonic() - started})
        if (step + 1) % args.save_every == 0:
            path = client.save_state(f"step-{step + 1:06}").result().path
            keep(state_file, {"step": step + 1, "path": path})


if __name__ == "__main__":
    main()
