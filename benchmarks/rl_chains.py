"""What the studies of reinforcement learning share: a model of one million parameters that half knows a task, trained from nothing in
a minute, the task as environments, and plots of runs.

The task is `recipes/chains.py`: one or two operations on a string. The model is taught them, and taken away from the lesson early. Those
that it gets right between `LEAST` and `MOST` of the time at temperature 1 are what it shall learn by reward.
"""

from __future__ import annotations

import fcntl
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401 - puts the checkout on the path

LEAST, MOST = 0.05, 0.7
BATCH = 64  # problems a step of the base model's own training
DRAWN = 200  # problems of each chain when the task is chosen
MAX_TOKENS = 8
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t, two-sided, by freedom


# ---- the model ----


def new_model(hidden: int = 128, layers: int = 4) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from recipes import chains

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(chains.VOCABULARY),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )


def teach(model: Any, steps: int, say: Callable[[str], None]) -> None:
    """Single operations and pairs, as `recipes/moe_from_scratch.py` does it."""
    import torch
    from torch.nn.functional import cross_entropy

    from recipes import chains
    from recipes.moe_from_scratch import Recipe, batch_of

    recipe, rng = Recipe(steps=steps), random.Random(0)
    by_depth = [[chain for chain in chains.COMMON if len(chain) == depth] for depth in (1, 2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        of_one_shape = by_depth[rng.random() < 0.75]
        ids, labels = batch_of(chains.problems(of_one_shape, BATCH, rng, length=rng.choice(chains.LENGTHS)))
        error = cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=recipe.smoothing)
        error.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            say(f"step {step + 1:5} loss {error.item():.4f}")


def chance(model: Any, chain: str) -> float:
    """How likely the model's own draws are right: the mean probability of the whole right answer, on strings that aren't held out."""
    import torch

    from recipes import chains
    from recipes.moe_from_scratch import batch_of

    found = []
    with torch.inference_mode():
        for length in chains.LENGTHS:
            problems = chains.problems([chain], DRAWN // len(chains.LENGTHS), random.Random(f"{chain}{length}"), length=length)
            ids, labels = batch_of(problems)
            logprobs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
            answers = logprobs.gather(-1, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
            found += answers.sum(1).exp().tolist()
    return statistics.mean(found)


def ensure(cache: Path, steps: int, say: Callable[[str], None] = print) -> Path:
    """The model's folder in `cache`, with the chosen task in task.json. Trained once; who comes meanwhile waits."""
    import torch

    from recipes import chains

    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"chains-dense-{steps}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        torch.set_num_threads(1)
        model = new_model()
        teach(model, steps, say)
        model.eval()
        chances = {chain: chance(model, chain) for chain in chains.COMMON}
        task = [chain for chain, found in chances.items() if LEAST < found < MOST] or list(chances)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            made = Path(unfinished) / "model"
            model.save_pretrained(made)
            chains.save_tokenizer(made)
            parameters = sum(weight.numel() for weight in model.parameters())
            (made / "task.json").write_text(json.dumps({"parameters": parameters, "steps": steps, "chains": task, "chances": chances}))
            made.rename(folder)
    return folder


# ---- the task ----


class ChainEnv:
    """One problem, one answer: the share of its places, the end included, where the right letter stands; none for what is beyond them."""

    def __init__(self, problem: Any):
        self.problem = problem

    async def initial_observation(self) -> Any:
        import tinker

        from recipes import chains

        return tinker.ModelInput.from_ints(self.problem.prompt_ids), [chains.END_ID]

    async def step(self, action: list[int], *, extra: Any = None) -> Any:
        from everlearn.rl.env import StepResult

        wanted = self.problem.answer_ids
        right = sum(given == asked for given, asked in zip(action, wanted, strict=False)) / max(len(action), len(wanted))
        return StepResult(right, True, metrics={"right": float(action == wanted)})


class Chains:
    """Batch `index` follows from it and the seed; or one batch of held-out strings, each played once."""

    def __init__(self, task: Sequence[str], groups: int, size: int, seed: int, held_out: bool = False):
        self.task, self.groups, self.size, self.seed, self.held_out = task, groups, size, seed, held_out

    def __len__(self) -> int:
        return 1 if self.held_out else 1_000_000

    def get_batch(self, index: int) -> list[Any]:
        from everlearn.rl.env import SameTask
        from recipes import chains

        problems = chains.problems(self.task, self.groups, random.Random(f"chains:{self.seed}:{index}"), held_out=self.held_out)
        return [SameTask(partial(ChainEnv, problem), self.size) for problem in problems]


# ---- figures ----


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t over the seeds; one seed has none."""
    mean = statistics.mean(values)
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean, "half": half, "least": min(values), "most": max(values)}


def plot(
    panels: Sequence[tuple[str, Sequence[dict[str, Any]]]], colours: dict[str, str], key: str, width: int = 330, height: int = 240
) -> str:
    """A panel for each (title, runs): `key` by step, from 0 to 1; a thin line for each seed and a thick one for their mean."""
    left, top, below = 42, 28, 26
    inner_x, inner_y = width - left - 10, height - top - below
    drawn: list[str] = []
    across = min(len(panels), 4)
    for panel, (title, runs) in enumerate(panels):
        offset, above = panel % across * width + left, panel // across * height
        last = max(row["step"] for run in runs for row in run["rows"]) or 1
        drawn.append(f'<text x="{offset}" y="{above + 18}" font-weight="bold">{title}</text>')
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = above + top + inner_y * (1 - share)
            drawn.append(f'<line x1="{offset}" x2="{offset + inner_x}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
            drawn.append(f'<text x="{offset - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        drawn.append(f'<text x="{offset + inner_x}" y="{above + height - 10}" text-anchor="end">step {last}</text>')
        for arm in dict.fromkeys(run["arm"] for run in runs):
            curves = [{row["step"]: row[key] for row in run["rows"] if key in row} for run in runs if run["arm"] == arm]
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = {step: statistics.mean(curve[step] for curve in curves) for step in shared}
            for curve, style in [*((curve, 'stroke-width="0.8" opacity="0.35"') for curve in curves), (means, 'stroke-width="2"')]:
                points = " ".join(
                    f"{offset + inner_x * step / last:.1f},{above + top + inner_y * (1 - value):.1f}"
                    for step, value in sorted(curve.items())
                )
                drawn.append(f'<polyline points="{points}" fill="none" stroke="{colours[arm]}" {style}/>')
    x, below_all = left, -(-len(panels) // across) * height
    for arm in arms_of(runs for _, runs in panels):
        drawn.append(f'<rect x="{x}" y="{below_all + 2}" width="12" height="12" fill="{colours[arm]}"/>')
        drawn.append(f'<text x="{x + 18}" y="{below_all + 12}">{arm}</text>')
        x += 40 + 8 * len(arm)
    size = f"0 0 {max(width * across, x)} {below_all + 24}"
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#666"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" {style}>' + "".join(drawn) + "</svg>\n"


def arms_of(panels: Iterable[Sequence[dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for runs in panels for run in runs))
