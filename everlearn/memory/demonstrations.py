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

import numpy as np
from tinker import types

from everlearn.rl.datums import elements_of
from everlearn.rl.policy import seed_of
from everlearn.rl.runfolder import append, lines_before

FILE = "imitated.jsonl"


class Demonstrations:
    """Datums for `cross_entropy`, of text only. `before`: those of this step and later are about to be made again, and are forgotten."""

    def __init__(self, folder: Path, before: int):
        self.path = folder / FILE
        self.data = [_datum(row) for line in lines_before(self.path, before) for row in json.loads(line)["data"]]

    def add(self, step: int, data: Sequence[types.Datum]) -> None:
        append(self.path, {"step": step, "data": [_row(datum) for datum in data]})
        self.data += data

    def drawn(self, num: int, *seed: Any) -> list[types.Datum]:
        """At most `num` of all, by lot: the same for the same seed."""
        return random.Random(seed_of("demonstrations", *seed)).sample(self.data, min(num, len(self.data)))


def _row(datum: types.Datum) -> dict[str, Any]:
    inputs = {name: data.to_numpy().tolist() for name, data in datum.loss_fn_inputs.items()}
    return {"tokens": elements_of(datum.model_input), **inputs}


def _datum(row: dict[str, Any]) -> types.Datum:
    inputs = {
        "target_tokens": types.TensorData.from_numpy(np.array(row["target_tokens"], dtype=np.int64)),
        "weights": types.TensorData.from_numpy(np.array(row["weights"], dtype=np.float32)),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(row["tokens"]), loss_fn_inputs=inputs)
