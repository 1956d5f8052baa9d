"""Feedback from a program that has an `openai` client already.

    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="...")
    feedback = Feedback(client)

    answer = client.chat.completions.create(model="support", messages=[...])
    feedback.thumb(answer, up=False, reason="wrong address")
    feedback.correct(answer, "We open at seven.")

Everything goes through that client: its address, its key, its retries. Nothing of `openai` is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C")
HEADER = "x-everlearn-episode"
PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "msg_")


def record_of(answer: Any) -> str:
    """The id of the record of an answer: an answer of the client (streamed ones too), or the id of one. Raises ValueError where there is
    none."""
    ours = (getattr(answer, "model_extra", None) or {}).get("everlearn")
    if isinstance(ours, Mapping) and ours.get("record"):
        return str(ours["record"])
    found = answer if isinstance(answer, str) else getattr(answer, "id", None)
    if isinstance(found, str):
        if found.startswith("rec_"):
            return found
        for prefix in PREFIXES:
            if found.startswith(prefix):
                return "rec_" + found.removeprefix(prefix)
    raise ValueError(f"{answer!r:.200} is no answer of everlearn; give an answer, or the header x-everlearn-record")


def in_episode(client: C, episode_id: str) -> C:
    """The client, whose answers belong to that episode from here on. The one that was given stays as it is."""
    return client.with_options(default_headers={HEADER: episode_id})  # type: ignore[attr-defined]


class Feedback:
    """Says things about answers. `source` and `source_id`: who says them, unless a call says otherwise; of each source the last word of a
    kind about an answer counts. Every method returns the feedback as the server keeps it."""

    def __init__(self, client: Any, source: str = "human", source_id: str = ""):
        self.client, self.source, self.source_id = client, source, source_id

    def thumb(self, answer: Any, up: bool, **more: Any) -> dict[str, Any]:
        return self.say(answer, kind="boolean", value=up, **more)

    def score(self, answer: Any, value: float, name: str = "", **more: Any) -> dict[str, Any]:
        return self.say(answer, kind="float", value=value, name=name, **more)

    def comment(self, answer: Any, text: str, **more: Any) -> dict[str, Any]:
        return self.say(answer, kind="comment", text=text, **more)

    def correct(self, answer: Any, text: str, **more: Any) -> dict[str, Any]:
        """What the answer should have been; with `span=[first, end]` what should stand in the place of these tokens."""
        return self.say(answer, kind="demonstration", text=text, **more)

    def prefer(self, better: Any, worse: Any, choice: int = 0, worse_choice: int = 0, **more: Any) -> dict[str, Any]:
        over = {"record_id": record_of(worse), "choice": worse_choice}
        return self.say(better, kind="preference", choice=choice, over=over, **more)

    def outcome(self, answer: Any, name: str, value: bool | float, text: str | None = None, **more: Any) -> dict[str, Any]:
        """How a tool or a test that had to do with the answer ended."""
        return self.say(answer, kind="outcome", name=name, value=value, **({"text": text} if text else {}), **more)

    def say(self, answer: Any, **said: Any) -> dict[str, Any]:
        """Anything that POST /v1/feedback takes. With `episode_id` it is about that episode, and `answer` is None."""
        target = {} if "episode_id" in said else {"record_id": record_of(answer)}
        return self._post("/feedback", {**target, "source": self.source, "source_id": self.source_id, **said})

    def edit(self, feedback_id: str, **fields: Any) -> dict[str, Any]:
        """Other words (`value`, `text`, `reason`) in the place of these."""
        return dict(self.client.patch(f"/feedback/{feedback_id}", body=fields, cast_to=object))

    def delete(self, feedback_id: str) -> None:
        self.client.delete(f"/feedback/{feedback_id}", cast_to=object)

    def token(self, answer: Any, expires_in: int = 86_400, source_id: str = "") -> str:
        """A token with which a browser may give feedback on this answer alone, for so many seconds."""
        body = {"record_id": record_of(answer), "expires_in": expires_in, "source_id": source_id}
        return str(self._post("/feedback/tokens", body)["token"])

    def event(self, episode_id: str, kind: str, name: str = "", **more: Any) -> dict[str, Any]:
        """Something that happened in an episode and that no answer tells: an outcome, a tool's result, an act of the user."""
        return self._post(f"/episodes/{episode_id}/events", {"kind": kind, "name": name, **more})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return dict(self.client.post(path, body=body, cast_to=object))
