"""A tenant that trains beside what is measured, in a process of its own: its SDK must not slow down the client that measures."""

from __future__ import annotations

import multiprocessing
from typing import Any

from common import Server, as_datum, random_rows, train_step


class Neighbour:
    """`train(True)` sets it to work without a pause, `train(False)` returns when it rests. `steps` counts its optimizer steps."""

    def __init__(self, live: Server, rank: int, vocab: int):
        spawn = multiprocessing.get_context("spawn")  # a fork would share the SDK's threads and sockets
        self.wanted, self.resting, self.ended = spawn.Event(), spawn.Event(), spawn.Event()
        self.steps: Any = spawn.Value("i", 0)
        arguments = (live.url, live.model, rank, vocab, self.wanted, self.resting, self.ended, self.steps)
        self.process = spawn.Process(target=keep_training, args=arguments, daemon=True)

    def __enter__(self) -> Neighbour:
        self.process.start()
        self._rested(120)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.wanted.set()
        self.process.join(60)

    def train(self, wanted: bool) -> None:
        if wanted:
            before = self.steps.value
            self.resting.clear()
            self.wanted.set()
            while self.steps.value == before and self.process.is_alive():  # it is under way
                self.process.join(0.02)
        else:
            self.wanted.clear()
            self._rested(120)

    def _rested(self, seconds: float) -> None:
        if not self.resting.wait(seconds) or not self.process.is_alive():
            raise SystemExit("the training neighbour doesn't answer")


def keep_training(url: str, model: str, rank: int, vocab: int, wanted: Any, resting: Any, ended: Any, steps: Any) -> None:
    import tinker

    trainer = tinker.ServiceClient(base_url=url).create_lora_training_client(base_model=model, rank=rank).result()
    datums = [as_datum(row) for row in random_rows(8, 256, vocab)]
    train_step(trainer, datums)
    while not ended.is_set():
        if not wanted.is_set():
            resting.set()
            wanted.wait()
            continue
        train_step(trainer, datums)
        steps.value += 1
