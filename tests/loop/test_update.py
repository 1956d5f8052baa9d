"""A reward for an update: from a version that can score, as long as there is one that may be a reward."""

from __future__ import annotations

from typing import Any

import pytest

from everlearn.errors import Conflict, NotFound
from everlearn.loop import update


class Server:
    """Its newest version, and those that can still score."""

    url = key = ""

    def __init__(self) -> None:
        self.newest: dict[str, Any] = {"id": "rm_1", "earned": True, "has_weights": True, "why": ""}
        self.scoring = {"rm_1": 0.1}

    def get(self, path: str, **params: Any) -> Any:
        return self.newest

    def post(self, path: str, body: Any = None) -> Any:
        chance = self.scoring.get(path.split("/")[-2])
        if chance is None:
            raise NotFound("only its figures")
        return {"data": [{"chance": chance}] * len(body["input"])}

    def patch(self, path: str, body: Any = None) -> Any:
        raise NotImplementedError

    def lines(self, path: str, **params: Any) -> list[dict[str, Any]]:
        raise NotImplementedError


def test_a_version_that_goes_while_it_is_the_reward_is_followed_by_the_next() -> None:
    server = Server()
    score = update.reward_of(server, "desk")
    assert score([[1]] * 70) == [0.1] * 70
    server.scoring = {"rm_2": 0.2}
    server.newest |= {"id": "rm_2"}
    assert score([[1]] * 70) == [0.2] * 70
    server.scoring = {}
    with pytest.raises(NotFound):
        score([[1]])
    server.newest |= {"has_weights": False}
    with pytest.raises(Conflict, match="deleted") as told:
        score([[1]])
    assert told.value.code == update.UNEARNED
    with pytest.raises(Conflict, match="deleted"):
        update.reward_of(server, "desk")
