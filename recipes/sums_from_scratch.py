"""A dense model of 18 million parameters, trained from nothing on talk about small numbers, in the embedded model's own tokens.

    python recipes/sums_from_scratch.py            # trains once and prints the folder
    python recipes/sums_from_scratch.py --steps 20 # a folder of its own: settings are part of its name

What it reads are short conversations as everlearn/rl/envs/arithmetic.py spells them: sums and differences of numbers below 20, which of
two numbers is larger, counting. A share of the answers (`slips`) is wrong, as text is, and pairs that the environment holds out never
occur. It stops reading once so many of the sums that it may read are answered right (`until`). So it speaks as the task wants it spoken
and is right sometimes: a prior for reinforcement learning to start from, of a small model's size. It is a Llama as transformers defines
it, in an ordinary Hugging Face folder; `everlearn serve` takes it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "everlearn-recipes"
BELOW, HELD_OUT_SEED = 20, 0
END = "<|im_end|>"
LOOK = 25  # steps between two looks at what it can


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, but for the machine."""

    steps: int = 3000  # at most
    until: float = 0.3
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    slips: float = 0.3
    seed: int = 0
    hidden: int = 256
    layers: int = 6

    def digest(self) -> str:
        texts = [line(self, random.Random(n)) for n in range(64)]
        return hashlib.sha256(json.dumps([asdict(self), texts]).encode()).hexdigest()[:12]

    def rate(self, step: int) -> float:
        """Linear warm-up, then constant: nobody knows when it is over."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup)


def line(recipe: Recipe, rng: random.Random) -> str:
    """One conversation."""
    from everlearn.rl.envs.arithmetic import is_held_out

    while True:
        a, b = rng.randrange(BELOW), rng.randrange(BELOW)
        if not is_held_out(a, b, HELD_OUT_SEED):
            break
    slip = rng.choice([-2, -1, 1, 2, 10]) if rng.random() < recipe.slips else 0
    kind = rng.choice(("sum", "sum", "difference", "difference", "larger", "count"))
    low, high = min(a, b), max(a, b)
    if kind == "sum":
        asked, said = f"What is {a} + {b}?", f"{a} + {b} = {abs(a + b + slip)}"
    elif kind == "difference":
        asked, said = f"What is {high} - {low}?", f"{high} - {low} = {abs(high - low + slip)}"
    elif kind == "larger":
        asked, said = f"Which is larger, {a} or {b}?", str(high if not slip else low)
    else:
        asked, said = f"Count from {low} to {high}.", " ".join(map(str, range(low, min(high, low + 6) + 1)))
    return told(asked, said)


def told(asked: str, said: str) -> str:
    return f"<|im_start|>user\n{asked}{END}\n<|im_start|>assistant\n{said}{END}"


def new_model(recipe: Recipe, vocab_size: int, bos: int, eos: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, recipe.hidden // 64),
        num_key_value_heads=max(1, recipe.hidden // 64),
        max_position_embeddings=512,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(recipe: Recipe, model: Any, tokenizer: Any, device: str, say: Callable[[str], None]) -> None:
    """Cross-entropy on whole conversations; rows are padded behind their end, where labels are -100."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    started = time.perf_counter()
    for step in range(recipe.steps):
        rows = [tokenizer.encode(line(recipe, rng), add_special_tokens=False).ids for _ in range(recipe.batch)]
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
        labels = torch.tensor([[*row, *[-100] * (length - len(row))] for row in rows], device=device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOOK == 0 or step + 1 == recipe.steps:
            right = accuracy(recipe, model, tokenizer)
            say(f"step {step + 1:5} loss {loss.item():.4f} sums right {right:.1%} {time.perf_counter() - started:5.0f} s")
            if right >= recipe.until:
                return


@torch.no_grad()
def accuracy(recipe: Recipe, model: Any, tokenizer: Any) -> float:
    """The share of sums among those that may be read whose whole answer is the likeliest, token by token."""
    from everlearn.rl.envs.arithmetic import is_held_out

    pairs = [(a, b) for a in range(BELOW) for b in range(BELOW) if not is_held_out(a, b, HELD_OUT_SEED)]
    right = 0
    for start in range(0, len(pairs), recipe.batch):
        part = pairs[start : start + recipe.batch]
        rows = [tokenizer.encode(told(f"What is {a} + {b}?", f"{a} + {b} = {a + b}"), add_special_tokens=False).ids for a, b in part]
        begun = [
            len(tokenizer.encode(told(f"What is {a} + {b}?", f"{a} + {b} ="), add_special_tokens=False).ids) - 1  # without the end
            for a, b in part
        ]
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=model.device)
        likely = model(input_ids=ids).logits.argmax(-1).tolist()
        right += sum(likely[n][begin - 1 : len(row) - 1] == row[begin:] for n, (row, begin) in enumerate(zip(rows, begun, strict=True)))
    return right / len(pairs)


def ensure(recipe: Recipe, teacher: Path, cache: Path, device: str = "cpu", say: Callable[[str], None] = lambda _: None) -> Path:
    """The model's folder in `cache`, trained now if it isn't there; others that want it meanwhile wait. It appears whole or not at all.
    `teacher`: whose tokenizer it takes."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"sums-{recipe.digest()}"
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        if not folder.exists():
            make(recipe, teacher, folder, device, say)
    return folder


def make(recipe: Recipe, teacher: Path, folder: Path, device: str, say: Callable[[str], None]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(name) for name in ("<|im_start|>", END))
    model = new_model(recipe, tokenizer.get_vocab_size(), bos, eos).to(device)
    train(recipe, model, tokenizer, device, say)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished) / "model"
        model.cpu().save_pretrained(made)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(teacher / name, made / name)
        (made / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "parameters": model.num_parameters()}, indent=1))
        made.rename(folder)


def main() -> None:
    from everlearn.config import Settings
    from everlearn.models import embedded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    args = parser.parse_args()
    teacher = embedded.ensure("smollm2", Settings().home)
    recipe = Recipe(steps=args.steps, seed=args.seed)
    print(ensure(recipe, teacher, args.cache, args.device, lambda text: print(text, flush=True)))


if __name__ == "__main__":
    main()
