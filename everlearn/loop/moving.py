"""Where weights stand that move with every finished episode: what everlearn/loop/continuous.py notes in the deployment's cycle."""

from __future__ import annotations

import msgspec

from everlearn.loop.description import Description
from everlearn.loop.service import Deployed


class Moving(msgspec.Struct, frozen=True):
    """Where the moving weights stand. `path`: their state, "" before the first move. `behind`: the last feedback that is in them.
    `steps`: which of the versions that served had how many; `owed`: steps that what was said last is still to get.
    `tried`: the step of the last candidate; `spent`, `began`: training tokens since, and when. `dataset` and `fresh`: what they learned
    from, frozen, and since; `past`: what they learned from too, which the last dataset hasn't because it counts no longer. `base`: they are
    to begin with the base model, because something was deleted. `changes`: the last change of feedback that was looked at, -1 before the
    first look; `heard`: pieces of it that were read when later ones were there already, up to which (everlearn/loop/changed.py)."""

    path: str = ""
    step: int = 0
    behind: str = ""
    steps: dict[str, int] = {}
    serving: str = ""
    owed: int = 0
    tried: int = 0
    spent: int = 0
    began: float = 0.0
    total: int = 0
    dataset: str = ""
    fresh: list[str] = []
    past: list[str] = []
    base: bool = False
    changes: int = -1
    heard: dict[str, int] = {}

    @property
    def ahead(self) -> int:
        """Optimizer steps since the version that serves."""
        return self.step - self.steps.get(self.serving, 0)

    @property
    def followed(self) -> set[str]:
        """The feedback that they learned from and no dataset of theirs has: nothing but its changes tells that it is deleted."""
        return {*self.fresh, *self.past}


def moving_of(now: Deployed) -> Moving:
    return msgspec.convert(now.cycle.get("moving", {}), Moving)


def used_up(moving: Moving, described: Description, clock: float) -> bool:
    """Whether what a cycle may cost is spent since the last candidate."""
    budget = described.budget
    return bool(budget.tokens and moving.spent >= budget.tokens) or bool(
        budget.seconds and moving.began and moving.step > moving.tried and clock - moving.began >= budget.seconds
    )
