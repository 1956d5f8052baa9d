"""A shop whose answers are known: a model of 0.4 million parameters trained from nothing, its users, and a clock that a study turns.

The model does four things with letters (reverse, sort, next, rotate), one at a time. What the shop's users order besides are eight pairs of
these ("RN": reverse, then next), which the model was never shown. So what is right is known of every answer, and so is what must not be
lost; the letters of the gold measure are never asked by users.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from everlearn.cli.client import Client
from everlearn.loop.service import Api
from recipes import chains

SINGLE = tuple(chains.OPERATIONS)
ORDERS = ("RN", "SN", "LN", "RL", "SL", "NR", "RS", "LS")
WEIGHTS = (8, 6, 5, 4, 3, 2, 2, 1)  # how often each is ordered
DAY = 86_400.0
FIRST = datetime(2026, 1, 1).timestamp()


class Question(NamedTuple):
    """What is asked, and the only right answer. `order`: one of ORDERS; "": a single operation."""

    text: str
    answer: str
    order: str


# ---- the model ----


def operation(rng: random.Random, held_out: bool) -> Question:
    return Question(*chains.problems(SINGLE, 1, rng, held_out, length=4)[0], "")


def ordered(rng: random.Random, held_out: bool, order: str = "") -> Question:
    chosen = order or rng.choices(ORDERS, WEIGHTS)[0]
    return Question(*chains.problems((chosen,), 1, rng, held_out, length=4)[0], chosen)


def ensure(folder: Path, steps: int, seed: int = 0) -> Path:
    """The base model, trained now if it isn't there: a minute on one core."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
    tokens = {"vocab_size": len(chains.VOCABULARY), "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **tokens, head_dim=32, max_position_embeddings=256))
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1.0 - 0.95 * step / steps)
        drawn = chains.problems(SINGLE, 96, rng, length=4)
        ids = torch.tensor([problem.prompt_ids + problem.answer_ids for problem in drawn])
        begin = len(drawn[0].prompt) - 1
        logits = model(input_ids=ids[:, :-1]).logits[:, begin:]
        cross_entropy(logits.flatten(0, 1), ids[:, begin + 1 :].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    chains.save_tokenizer(folder)
    model.save_pretrained(folder)
    return folder


# ---- time ----


class Clock:
    """Virtual seconds, turned by the study. What the server dates by its own clock is translated: `turn` is called where a stretch of
    virtual time begins, and waits for the next whole second, in which the server's rows are dated."""

    def __init__(self, now: Callable[[], float], sleep: Callable[[float], None]):
        self.real, self.sleep, self.virtual = now, sleep, FIRST
        self.marks: list[tuple[int, float]] = [(0, FIRST)]

    def __call__(self) -> float:
        return self.virtual

    def turn(self, virtual: float) -> None:
        self.sleep(1.0 - self.real() % 1.0)
        self.virtual = virtual
        self.marks.append((int(self.real()), virtual))

    def of(self, real: float) -> float:
        return next(virtual for second, virtual in reversed(self.marks) if int(real) >= second)


class Dated:
    """A client to whom the server's rows carry virtual times."""

    def __init__(self, client: Client, clock: Clock):
        self.client, self.clock, self.url, self.key = client, clock, client.url, client.key

    def _dated(self, found: Any) -> Any:
        if isinstance(found, dict):
            for name, value in found.items():
                found[name] = self.clock.of(value) if name == "created_at" else self._dated(value) if name == "data" else value
        elif isinstance(found, list):
            found = [self._dated(one) for one in found]
        return found

    def get(self, path: str, **params: Any) -> Any:
        return self._dated(self.client.get(path, **params))

    def post(self, path: str, body: Any = None) -> Any:
        return self._dated(self.client.post(path, body))

    def patch(self, path: str, body: Any = None) -> Any:
        return self._dated(self.client.patch(path, body))

    def lines(self, path: str, **params: Any) -> list[dict[str, Any]]:
        return self.client.lines(path, **params)


# ---- users ----


class Shop:
    """Asks under the deployment's name and says what it thinks; the gold measure is its own."""

    def __init__(self, api: Api, name: str, seed: int, thumbs: float = 0.9, flipped: float = 0.05, sent: float = 0.7):
        self.api, self.name, self.rng = api, name, random.Random(seed)
        self.thumbs, self.flipped, self.sent, self.count = thumbs, flipped, sent, 0

    def visit(self) -> tuple[bool, bool, str]:
        """One episode: whether it was an order, whether the answer was right, and the version that gave it.

        A share `sent` of the answers goes through a clerk, who sends what is right, edited or as it was: a demonstration either way.
        """
        asked = (ordered if self.rng.random() < 0.5 else operation)(self.rng, False)
        said, record, version = self.ask(asked.text)
        right = said == asked.answer
        if self.rng.random() < self.thumbs:
            self.say(record, kind="boolean", value=right != (self.rng.random() < self.flipped))
        if self.rng.random() < self.sent:
            self.say(record, kind="demonstration", text=asked.answer)
        return bool(asked.order), right, version

    def poison(self, num: int) -> list[str]:
        """A campaign: what users order most is corrected to its mirror image; the ids of its records."""
        told = []
        for place in range(num):
            asked = ordered(self.rng, False, ORDERS[place % 4])
            _, record, _ = self.ask(asked.text)
            self.say(record, kind="demonstration", text=asked.answer[::-1], source_id=f"bot{place}")
            told.append(record)
        return told

    def ask(self, text: str) -> tuple[str, str, str]:
        self.count += 1
        body = {"model": self.name, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        found = self.api.post("/v1/chat/completions", {**body, "user": f"user{self.count}"})
        return str(found["choices"][0]["message"]["content"]), str(found["everlearn"]["record"]), str(found["model"])

    def say(self, record: str, **what: Any) -> Any:
        return self.api.post("/v1/feedback", {"record_id": record, **what})
