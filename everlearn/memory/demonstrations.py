"""What a run imitated so far, in a file of its folder. Each warm step adds to it, and learns from all of it again (the aggregated set of
DAgger, Ross et al., arXiv 1011.0686): a policy that goes over one step's windows several times learns those by heart, and of the few chunks
in them that matter too little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker import types

from everlearn.errors import Conflict
from everlearn.rl.datums import elements_of, weighted
from everlearn.rl.policy import seed_of
from everlearn.rl.runfolder import append, cut_file

FILE = "imitated.jsonl"


class Demonstrations:
    """Datums for `cross_entropy`, of text only."""

    def __init__(self, path: Path, data: list[types.Datum]):
        self.path, self.data = path, data

    @classmethod
    def open(cls, folder: Path, before: int) -> Demonstrations:
        """Of a run whose next step is `before`: what it imitated in that step and later is about to be made again, and is removed. Raises
        Conflict where steps were made and the file is gone."""
        path = folder / FILE
        if before and not path.exists():
            raise Conflict(
                f"{folder} holds a run of {before} steps without its {FILE}, from which the next ones learn; begin it again in another "
                "folder, or bring the file back",
                param="folder",
            )
        rows = [row for line in cut_file(path, before) for row in json.loads(line)["data"]]
        return cls(path, [weighted(row["tokens"], row["target_tokens"], row["weights"]) for row in rows])

    def add(self, step: int, data: Sequence[types.Datum]) -> None:
        append(self.path, {"step": step, "data": [_row(datum) for datum in data]})
        self.data += data

    def drawn(self, num: int, *seed: Any) -> list[types.Datum]:
        """At most `num` of all, by lot: the same for the same seed."""
        return random.Random(seed_of("demonstrations", *seed)).sample(self.data, min(num, len(self.data)))


def _row(datum: types.Datum) -> dict[str, Any]:
    inputs = {name: data.to_numpy().tolist() for name, data in datum.loss_fn_inputs.items()}
    return {"tokens": elements_of(datum.model_input), **inputs}
