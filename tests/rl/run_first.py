"""A run on its own, to be killed: `python -m tests.rl.run_first URL FOLDER [ESTIMATOR]`. Rewards answers whose first token is small."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import tinker

from everlearn.rl.env import SameTask, StepResult
from everlearn.rl.rollouts import Limits
from everlearn.rl.settings import Settings
from everlearn.rl.train import train

SETTINGS = Settings(
    "tiny",
    steps=6,
    rank=4,
    learning_rate=3e-2,
    loss="ppo",
    substeps=2,
    max_tokens=4,
    limits=Limits(episodes_at_once=1),
    seed=5,
    evaluate_every=2,
    save_every=2,
)


class First:
    def __init__(self, start: int):
        self.start = start

    async def initial_observation(self) -> tuple[tinker.ModelInput, None]:
        return tinker.ModelInput.from_ints([20, self.start]), None

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        return StepResult(1.0 - action[0] / 512, True, metrics={"first": float(action[0])})


class Starts:
    def __init__(self, first: int, groups: int, size: int):
        self.first, self.groups, self.size = first, groups, size

    def __len__(self) -> int:
        return 1

    def get_batch(self, index: int) -> list[SameTask]:
        starts = range(self.first, self.first + self.groups)
        return [SameTask(lambda start=start: First(start), self.size) for start in starts]


def run(service: tinker.ServiceClient, folder: Path, settings: Settings = SETTINGS, **options: Any) -> list[dict[str, float]]:
    return train(service, settings, Starts(30, 4, 6), folder, held_out=Starts(60, 4, 1), **options)


if __name__ == "__main__":
    with tinker.ServiceClient(base_url=sys.argv[1], api_key="tml-test") as opened:
        run(opened, Path(sys.argv[2]), msgspec.structs.replace(SETTINGS, estimator=(sys.argv[3:] or [SETTINGS.estimator])[0]))
