"""What stands for an episode that no client names: the same at every turn, and not the same for all who say hello."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from everlearn.api import auth
from everlearn.api.routing import episode_of

HELLO = {"role": "user", "content": "hi"}


def episode(said: Any, key: str | None = "key-1", user: str | None = None, **headers: str) -> str:
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    caller = auth.Caller("a", key, auth.ALL_SCOPES)
    return episode_of(Request({"type": "http", "headers": lines, "state": {"caller": caller}}), user, said)()


def system(text: str, role: str = "system") -> dict[str, str]:
    return {"role": role, "content": text}


def test_a_clock_in_the_system_prompt_changes_no_episode() -> None:
    first = episode([system("It is 10:00."), HELLO])
    later = [system("It is 10:01."), HELLO, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "who?"}]
    assert episode(later) == first == episode([HELLO]) == episode([system("Be kind.", "developer"), HELLO])
    assert episode([{"role": "user", "content": "who?"}]) != first


def test_who_says_hello_with_another_key_begins_another_episode() -> None:
    assert len({episode([HELLO], key) for key in ("key-1", "key-2", None)}) == 3
    assert episode([HELLO], "key-1", user="ann") == episode([system("x")], "key-2", user="ann") == "user:ann"
    assert episode([HELLO], user="ann", x_everlearn_episode="ticket-17") == "episode:ticket-17"


def test_where_no_user_speaks_all_of_it_tells() -> None:
    assert len({episode(said) for said in ("once", "twice", ["once"], [1, 2], [1, 3], [system("a")], [system("b")])}) == 7
