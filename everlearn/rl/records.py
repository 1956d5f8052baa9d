"""Rollouts as JSON that a viewer, or a person, can read: everything that was seen, done and earned, with the reasons.

A turn shows what is new since the turn before (`continues`: true) or the whole prompt. Tokens and log-probabilities stand beside the text,
which is only for reading: it is never turned back into tokens.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tinker import types

from everlearn.rewards.reward import Reward
from everlearn.rl.datums import elements_of
from everlearn.rl.trajectory import Trajectory, TrajectoryGroup

Decode = Callable[[list[int]], str]
MAX_TEXT = 20_000  # characters of one value among logs


def record_of(group: TrajectoryGroup, decode: Decode | None = None, advantages_G: Sequence[float | None] = ()) -> dict[str, Any]:
    """One group. `decode` turns token ids into text; `advantages_G` are shown with the members, if given."""
    members = []
    for index, trajectory in enumerate(group.trajectories_G):
        member: dict[str, Any] = {
            "failure": msgspec.to_builtins(trajectory.failure),
            "reward": _reward(group.reward(index)) if trajectory.failure is None else None,
            "seconds": round(trajectory.seconds, 4),
            "turns": _turns(trajectory, decode),
        }
        if index < len(group.metrics_G):
            member["metrics"] = _plain(group.metrics_G[index])
        if index < len(advantages_G):
            member["advantage"] = advantages_G[index]
        members.append(member)
    return {"tags": list(group.tags), "failures": msgspec.to_builtins(group.failures), "members": members}


def write_records(path: Path, groups: Iterable[TrajectoryGroup], decode: Decode | None = None, **context: Any) -> None:
    """Appends one line of JSON for each group, with `context` (a step, say) in front."""
    lines = [json.dumps({**_plain(context), **record_of(group, decode)}, ensure_ascii=False, allow_nan=False) for group in groups]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


def _turns(trajectory: Trajectory, decode: Decode | None) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    before: list[Any] = []
    for transition in trajectory.transitions:
        seen, action = elements_of(transition.observation), transition.action
        continues = bool(before) and seen[: len(before)] == before
        turns.append(
            {
                "continues": continues,
                "prompt": _shown(seen[len(before) :] if continues else seen, decode),
                "action": {
                    "tokens": action.tokens,
                    "logprobs": action.logprobs,
                    "text": decode(action.tokens) if decode else None,
                    "stop_reason": action.stop_reason,
                    **({"versions": action.versions} if action.versions else {}),
                },
                "reward": _reward(transition.reward),
                "metrics": _plain(transition.metrics),
                "logs": _plain(transition.logs),
            }
        )
        before = [*seen, *action.tokens]
    return turns


def _shown(elements: Sequence[Any], decode: Decode | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for element in elements:
        if not isinstance(element, int):
            parts.append(_image(element))
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["tokens"].append(element)
        else:
            parts.append({"type": "text", "tokens": [element]})
    for part in parts:
        if part["type"] == "text":
            part["text"] = decode(part["tokens"]) if decode else None
    return parts


def _image(chunk: Any) -> dict[str, Any]:
    if isinstance(chunk, types.ImageChunk):
        where = {"data": base64.b64encode(chunk.data).decode()}
    else:
        where = {"location": chunk.location}
    return {"type": "image", "format": chunk.format, "num_tokens": chunk.expected_tokens, **where}


def _reward(reward: Reward) -> dict[str, Any]:
    return {"total": reward.total, "parts": msgspec.to_builtins(reward.parts)}


def _plain(value: Any) -> Any:
    """Whatever an environment logs, as JSON takes it."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)[:MAX_TEXT]
