"""The folder of a run: `metrics.jsonl` has a line for each step, `rollouts.jsonl` shows some of what was played, `state.json` says where
the run can be continued, `run.json` which training run it is on the server. What was not saved is made again, so lines of later steps are
removed when a run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from everlearn.errors import InvalidRequest

T = TypeVar("T")


def read_state(folder: Path, type_: type[T]) -> T | None:
    """What `write_state` wrote, or None. Raises InvalidRequest for a file that can't be read."""
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (msgspec.DecodeError, OSError) as error:
        raise InvalidRequest(f"{path} can't be read ({error}); continue from another folder, or remove it", param="folder") from None


def write_state(folder: Path, state: Any) -> None:
    """Whole or not at all: who is killed meanwhile continues from what was there before."""
    note(folder, "state.json", state)


def note(folder: Path, name: str, what: Any) -> None:
    """A JSON file, whole or not at all."""
    new = folder / f"{name}.new"
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(what), indent=1))
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / name)


def noted(folder: Path, name: str) -> dict[str, Any]:
    """What `note` wrote beside the state, or nothing where the folder has no state to go on from."""
    path = folder / name
    if not path.exists() or not (folder / "state.json").exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, OSError) as error:
        raise InvalidRequest(f"{path} can't be read ({error}); continue from another folder, or remove it", param="folder") from None


def note_run(folder: Path, run_id: str, settings: Any) -> None:
    """Which training run the folder's steps are of, and what it was told to do; another each time that it goes on."""
    (folder / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode({"run_id": run_id, "settings": settings}), indent=1))


def cut_back(folder: Path, step: int) -> list[dict[str, float]]:
    """The metrics of the steps before `step`. Lines of later ones, which are about to be made again, are removed."""
    kept = {name: cut_file(folder / name, step) for name in ("metrics.jsonl", "rollouts.jsonl")}
    return [json.loads(line) for line in kept["metrics.jsonl"]]


def cut_file(path: Path, step: int) -> list[str]:
    """The lines of the steps before `step`; those of later ones are removed from the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) < step]
    new = path.with_suffix(".new")
    new.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    new.replace(path)
    return kept


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    """A line that was cut short by a kill belongs to no step that was completed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
