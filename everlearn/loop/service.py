"""What the loop asks of a server beside the Tinker protocol: deployments, datasets, records, and its models' tokens. HTTP and JSON only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from everlearn.faultpoints import around

NEVER = 1e11  # no feedback is as late: a summary of none


class Api(Protocol):
    """JSON over HTTP, errors as everlearn's own: everlearn/cli/client.py, or whatever a test puts in its place."""

    url: str
    key: str

    def get(self, path: str, **params: Any) -> Any: ...
    def post(self, path: str, body: Any = None) -> Any: ...
    def patch(self, path: str, body: Any = None) -> Any: ...
    def lines(self, path: str, **params: Any) -> list[dict[str, Any]]: ...


class Deployed(msgspec.Struct, frozen=True):
    """A deployment as the server shows it. Versions are `name@number`; number 0 is the base model."""

    name: str
    base_model: str
    state: str
    champion: str
    candidate: str | None
    previous: str | None
    share: float
    shadow: float
    paused: bool
    revision: int
    description: dict[str, Any]
    cycle: dict[str, Any]
    created_at: float


def source_cap(api: Api) -> float:
    """How many labels all labels of one source are worth on this server (`feedback.source_cap`)."""
    return float(api.get("/v1/feedback/summary", since=NEVER)["source_cap"])


def route(name: str) -> str:
    return f"/v1/deployments/{quote(name, safe='')}"


def read(api: Api, name: str) -> Deployed:
    return deployed(api.get(route(name)))


def deployed(found: Any) -> Deployed:
    return msgspec.convert(found, Deployed)


def path_of(api: Api, version: str) -> str | None:
    """The tinker:// path of `support@3`; None for `support@0`, the base model."""
    name, _, number = version.partition("@")
    return None if number == "0" else str(api.get(f"/v1/adapters/{quote(name, safe='')}@{number}")["path"])


def pages(api: Api, path: str, since: float = 0.0, behind: str = "", **params: Any) -> list[dict[str, Any]]:
    """All rows of a listing that goes from the newest to the oldest, back to those made at `since`, or to the first behind the id `behind`;
    the oldest first."""
    rows: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = api.get(path, limit=500, after=after, **params)
        fresh = [row for row in page["data"] if row["created_at"] >= int(since) and (not behind or row["id"] > behind)]
        rows += fresh
        if not page["has_more"] or len(fresh) < len(page["data"]):
            return rows[::-1]
        after = page["last_id"]


class Notes:
    """Keeps what a cycle has so far with the server; `now` is the deployment behind the last note. `keep(now, cycle)` sends one."""

    def __init__(self, keep: Callable[[Deployed, dict[str, Any]], Deployed], now: Deployed):
        self.keep, self.now = keep, now

    def __call__(self, found: dict[str, Any]) -> None:
        with around("cycle.act"):
            self.now = self.keep(self.now, {**self.now.cycle, **found})


class Tokens:
    """Texts and conversations as a model's tokens, and back, by the server's own tokenizer and template. `context`: how many of them the
    model reads on this server."""

    def __init__(self, api: Api, model: str):
        self.api, self.model = api, model
        told = api.post("/v1/tokenize", {"model": model, "prompt": "", "add_special_tokens": False})
        self.end, self.context = int(told["end_token"]), int(told["room"])

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow a prompt, sampled or trained on: the last one is never read."""
        return self.context - len(prompt) + 1

    def fits(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether the model can be trained on the whole answer behind this prompt."""
        return len(answer) <= self.room(prompt)

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """What a conversation's next answer continues."""
        return list(self.api.post("/v1/tokenize", {"model": self.model, "messages": list(messages)})["tokens"])

    def answer(self, text: str) -> list[int]:
        """An answer's tokens, with the one that ends the turn."""
        ids = self.api.post("/v1/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})["tokens"]
        return [*ids, self.end]

    def text(self, ids: Sequence[int]) -> str:
        return str(self.api.post("/v1/detokenize", {"model": self.model, "tokens": list(ids)})["prompt"])
