"""The same work by plain transformers + PEFT, in this process: what a user has without everlearn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftTrainer:
    """One model with `num_adapters` LoRA adapters; a step trains one of them on a padded batch."""

    def __init__(self, folder: Path, rank: int, threads: int, num_adapters: int = 1, unembed: bool = True):
        import peft
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        targets = [*TARGETS, "lm_head"] if unembed else TARGETS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules=targets)
            self.model: Any = peft.get_peft_model(model, config, adapter_name="a0")
            for i in range(1, num_adapters):
                self.model.add_adapter(f"a{i}", config)
        self.optimizers = {}
        for i in range(num_adapters):
            mine = [p for name, p in self.model.named_parameters() if f".a{i}." in name]
            self.optimizers[i] = torch.optim.AdamW([p.requires_grad_() for p in mine], lr=1e-4)

    def step(self, rows: list[list[int]], adapter: int = 0) -> int:
        """Forward, backward and AdamW on rows padded to the longest; returns the tokens that count (padding does not)."""
        self.model.set_adapter(f"a{adapter}")
        longest = max(len(row) for row in rows) - 1
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            num = len(row) - 1
            ids[i, :num], labels[i, :num], mask[i, :num] = torch.tensor(row[:-1]), torch.tensor(row[1:]), 1
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        (losses * mask.flatten()).sum().backward()
        self.optimizers[adapter].step()
        self.optimizers[adapter].zero_grad()
        return int(mask.sum())


class Generator:
    """transformers' `generate`, padded or one by one, drawing at temperature 1 with the end token switched off."""

    def __init__(self, folder: Path, threads: int):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, prompts: list[list[int]], new_tokens: int, one_by_one: bool = False) -> int:
        groups = [[prompt] for prompt in prompts] if one_by_one else [prompts]
        total = 0
        for group in groups:
            longest = max(len(prompt) for prompt in group)
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in group])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group])
            with torch.inference_mode():
                out = self.model.generate(
                    ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=0
                )
            total += (out.shape[1] - longest) * len(group)
        return total
