"""How near sampler, trainer and transformers' own float32 come to float64, on the model of recipes/moe_from_scratch.py.

    python benchmarks/moe_rounding.py

The claim: where sampler and trainer differ, it's by float32's rounding, which transformers' forward pass has as well. Answers to the
shifted task are drawn at temperature 1, scored by the trainer with a new adapter (which changes nothing), and by transformers twice.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import common
import numpy as np


def main() -> None:
    import tinker
    import torch

    from recipes import chains, moe_expert_lora
    from recipes.moe_from_scratch import CACHE, Recipe, ensure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="problems, each answered eight times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-moe-rounding.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = ensure(Recipe(), CACHE, lambda line: print(line, flush=True))
    args.model, args.base_url, args.base_model = str(folder), None, None
    with common.server(args) as server:
        service = tinker.ServiceClient(base_url=server.url)
        training = moe_expert_lora.open_training(service, server.model, "experts", moe_expert_lora.SFT)
        sampler = training.save_weights_and_get_sampling_client().result()
        problems = chains.problems(chains.SHIFTED, args.problems, random.Random(11), held_out=True)
        groups = moe_expert_lora.draw(sampler, problems, 8, 1.0, 17)
        drawn = [(problem.prompt_ids, sequence) for problem, group in zip(problems, groups, strict=True) for sequence in group]
        rows = [(prompt, list(sequence.tokens)) for prompt, sequence in drawn]
        datums = [moe_expert_lora.as_datum(prompt, answer, weights=[1.0] * len(answer)) for prompt, answer in rows]
        outputs = training.forward(datums, "cross_entropy").result().loss_fn_outputs
        service.close("success").result()
    by_sampler = np.concatenate([sequence.logprobs for _, sequence in drawn])
    by_trainer = np.concatenate([output["logprobs"].data[-len(answer) :] for output, (_, answer) in zip(outputs, rows, strict=True)])
    exact, plain = (transformers_logprobs(folder, rows, dtype) for dtype in (torch.float64, torch.float32))
    results = {
        "tokens": len(exact),
        "sampler - trainer": spread(by_sampler - by_trainer),
        "sampler - float64": spread(by_sampler - exact),
        "trainer - float64": spread(by_trainer - exact),
        "transformers float32 - float64": spread(plain - exact),
    }
    for name, row in results.items():
        print(name, row)
    common.write_result(args, "moe-rounding", results)


def transformers_logprobs(folder: Path, rows: list[tuple[list[int], list[int]]], dtype: Any) -> np.ndarray:
    """Log-probabilities of every answer token [sum of answers], in the rows' order, by transformers' own forward pass in `dtype`.

    Its norms would compute in float32 whatever the model's type; torch's own take their place in float64. The routers' softmax stays.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    if dtype == torch.float64:
        for path, norm in list(model.named_modules()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=dtype)
                exact.weight = norm.weight
                model.set_submodule(path, exact)
    by_length: dict[int, list[int]] = {}
    for place, (prompt, answer) in enumerate(rows):
        by_length.setdefault(len(prompt + answer), []).append(place)
    found: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for places in by_length.values():
            ids = torch.tensor([rows[place][0] + rows[place][1] for place in places])
            logprobs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double().numpy()
            found |= {place: row[-len(rows[place][1]) :] for place, row in zip(places, logprobs, strict=True)}
    return np.concatenate([found[place] for place in range(len(rows))])


def spread(differences: np.ndarray) -> dict[str, float]:
    sizes = np.abs(differences)
    return {
        "max": float(sizes.max()),
        "p99.9": float(np.quantile(sizes, 0.999)),
        "p99": float(np.quantile(sizes, 0.99)),
        "mean": float(sizes.mean()),
        "over 1e-5": int((sizes > 1e-5).sum()),
    }


if __name__ == "__main__":
    main()
