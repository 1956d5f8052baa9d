"""A sink that tells the server of a run's steps, so that its dashboard draws their curves and shows what was played.

It reads what the run's folder holds (everlearn/rl/runfolder.py), from the beginning: a run that went on after it was killed is shown whole.
While the server doesn't answer, the run goes on and everything is told later. A group that the server can't keep stays in the folder.

    with Sinks([Terminal(), ServerSink(folder, "http://127.0.0.1:8000")]) as sinks:
        train(service, settings, dataset, folder, on_step=sinks)
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from everlearn.errors import Unavailable

AT_ONCE = 500  # steps of one request
MAX_LINE = 2 * 2**20  # bytes; the server keeps no larger group
REFUSED = (400, 413)  # what a group may be answered whose text the server can't store, or that is too large
MAX_FAILURES = 100  # in a row; then the sink raises, and is switched off


class Tail:
    """The lines that a file has got since the last look. A line that isn't finished is left for the next."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each with the offset behind it; set `offset` to that once it is dealt with."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            at = file.seek(self.offset)
            for line in file:
                at += len(line)
                if line.endswith(b"\n"):
                    yield at, line.decode("utf-8")


class ServerSink:
    """`folder` is the run's own, `url` the server's address, `key` one with the scope train (any, where the server has none)."""

    def __init__(self, folder: Path, url: str, key: str = "tml-local", timeout: float = 30.0):
        self.folder = folder
        self.client = httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=timeout)
        self.steps, self.groups = Tail(folder / "metrics.jsonl"), Tail(folder / "rollouts.jsonl")
        self.numbers: dict[int, int] = {}  # groups of each step that were told
        self.failures, self.skipped, self.described = 0, 0, ""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells what is new in the folder. Raises Unavailable when the server hasn't answered for very long, and httpx.HTTPStatusError for
        what it refuses, but for single groups."""
        try:
            self._tell()
            self.failures = 0
        except (httpx.TransportError, Unavailable) as error:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                raise Unavailable(f"{self.client.base_url} hasn't answered {self.failures} times in a row: {error}") from error

    def close(self) -> None:
        try:
            self.write(0, {})
        finally:
            self.client.close()

    def _tell(self) -> None:
        run = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        address = f"/v1/runs/{run['run_id']}"
        if self.described != run["run_id"]:
            self._post(f"{address}/steps", {"settings": run["settings"]})
            self.described = run["run_id"]
        while batch := list(zip(self.steps.lines(), range(AT_ONCE), strict=False)):
            rows = [json.loads(line) for (_, line), _ in batch]
            self._post(f"{address}/steps", {"steps": [{"step": int(row["step"]), "metrics": _finite(row)} for row in rows]})
            self.steps.offset = batch[-1][0][0]
        for at, line in self.groups.lines():
            if (size := len(line.encode())) <= MAX_LINE:
                self._group(address, json.loads(line))
            else:
                self._skip(f"a group of {size:,} bytes is too large for the server's pages")
            self.groups.offset = at

    def _group(self, address: str, record: dict[str, Any]) -> None:
        step = int(record.pop("step", 0))
        number = self.numbers.get(step, 0)
        try:
            self._post(f"{address}/rollouts", {"step": step, "groups": [{"number": number, "record": record}]})
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in REFUSED:
                raise
            self._skip(f"the server refuses a group of step {step} ({error.response.text[:300]})")
        else:
            self.numbers[step] = number + 1

    def _skip(self, why: str) -> None:
        """Leaves one group out; the first is told of."""
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(f"{why}; it stays in the folder, as others may after it", stacklevel=5)

    def _post(self, path: str, body: dict[str, Any]) -> None:
        reply = self.client.post(path, json=body)
        if reply.status_code == 429 or reply.status_code >= 500:
            raise Unavailable(f"the server answers {reply.status_code}: {reply.text[:200]}")
        reply.raise_for_status()


def _finite(row: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "step" and math.isfinite(value)}
