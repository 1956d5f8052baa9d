"""A mixture of experts of nine million parameters, trained from nothing in ten minutes on one CPU core.

    python recipes/moe_from_scratch.py            # trains once, prints the folder and what the model can do
    python recipes/moe_from_scratch.py --steps 20 # a folder of its own: settings are part of its name

It is Qwen3-MoE as transformers defines it: four layers of 16 experts, two of them for each token. Its vocabulary has 18 tokens, so
98 % of the parameters are experts. The task is `chains.py`. The folder is an ordinary Hugging Face folder; `everlearn serve` takes it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn.functional import cross_entropy

from recipes import chains

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "everlearn-recipes"


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, but for the machine. `batch` is examples a step, all of one length: nothing is padded."""

    steps: int = 600
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    balance: float = 0.01  # weight of the loss that spreads tokens over the experts
    smoothing: float = 0.01  # never quite certain: logits stay small, so float32's rounding isn't magnified, and samples differ
    seed: int = 0
    hidden: int = 128
    layers: int = 4
    experts: int = 16
    experts_per_token: int = 2
    expert_width: int = 352

    def digest(self) -> str:
        """Twelve hex digits over the settings, the vocabulary and some problems with answers: a changed task is another model."""
        task = chains.problems(chains.COMMON, 64, random.Random(self.seed))
        return hashlib.sha256(json.dumps([asdict(self), chains.VOCABULARY, task]).encode()).hexdigest()[:12]

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def new_model(recipe: Recipe) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=len(chains.VOCABULARY),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        moe_intermediate_size=recipe.expert_width,
        intermediate_size=recipe.expert_width,  # of layers without experts, of which there are none
        norm_topk_prob=True,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(recipe.seed)
    return Qwen3MoeForCausalLM(config)


def batch_of(problems: Sequence[chains.Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, T] and labels [N, T] of problems whose lengths are equal: -100 on the prompt, which nobody can predict."""
    ids = torch.tensor([problem.prompt_ids + problem.answer_ids for problem in problems])
    labels = ids.clone()
    labels[:, : len(problems[0].prompt)] = -100
    return ids, labels


def train(recipe: Recipe, model: Any, say: Callable[[str], None]) -> None:
    rng = random.Random(recipe.seed)
    by_depth = [[chain for chain in chains.COMMON if len(chain) == depth] for depth in (1, 2)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    started, tokens = time.perf_counter(), 0
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        of_one_shape = by_depth[rng.random() < 0.75]
        ids, labels = batch_of(chains.problems(of_one_shape, recipe.batch, rng, length=rng.choice(chains.LENGTHS)))
        output = model(input_ids=ids[:, :-1], output_router_logits=True)
        error = cross_entropy(output.logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=recipe.smoothing)
        (error + recipe.balance * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            seconds = time.perf_counter() - started
            right = "".join(f" {name} {share:6.1%}" for name, share in report(model, chains.TASKS).items())
            say(f"step {step + 1:5} loss {error.item():.4f}{right} {seconds:5.0f} s {tokens / seconds:6.0f} tok/s")


@torch.inference_mode()
def accuracy(model: Any, problems: Sequence[chains.Problem]) -> float:
    """The share of problems whose whole answer, end included, is the most likely one token by token."""
    right = 0
    for shape in {(len(problem.prompt), len(problem.answer)) for problem in problems}:
        ids, labels = batch_of([problem for problem in problems if (len(problem.prompt), len(problem.answer)) == shape])
        likely = model(input_ids=ids[:, :-1]).logits.argmax(-1)
        right += int(((likely == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum())
    return right / len(problems)


def report(model: Any, tasks: Mapping[str, Sequence[str]], num: int = 200) -> dict[str, float]:
    """Accuracy of each task's chains on `num` held-out strings."""
    return {name: accuracy(model, chains.problems(of, num, random.Random(1), held_out=True)) for name, of in tasks.items()}


def ensure(recipe: Recipe, cache: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The model's folder in `cache`, trained now if it isn't there. It appears whole or not at all."""
    folder = cache / f"chains-moe-{recipe.digest()}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    model = new_model(recipe)
    train(recipe, model, say)
    model.eval()
    every = {**chains.TASKS, **{chain: (chain,) for chain in (*chains.COMMON, *chains.SHIFTED, *chains.UNSEEN)}}
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        made = Path(unfinished) / "model"
        model.save_pretrained(made)
        chains.save_tokenizer(made)
        (made / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "accuracy": report(model, every)}, indent=1))
        try:
            made.rename(folder)
        except OSError:  # another process was faster; its folder is as good
            if not folder.exists():
                raise
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = ensure(Recipe(steps=args.steps, seed=args.seed), args.cache, lambda line: print(line, flush=True))
    for name, share in json.loads((folder / "recipe.json").read_text())["accuracy"].items():
        print(f"{name:8} {share:6.1%}")
    print(folder)


if __name__ == "__main__":
    main()
