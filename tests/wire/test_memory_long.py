"""A conversation of 1,000 turns in a memory, with the server killed in the middle of answers: no prompt is over the budget, nothing that was
answered is lost, and what was said at the third turn is still there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from everlearn.memory.synthetic import synthetic
from tests.live import KEY, LiveServer

TURNS, BUDGET, FACT = 1000, 400, "I never eat shellfish, and my sister Nora lives in Lisbon."
KILLED = (400, 700)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_turns_and_two_kills(new_server: Callable[..., LiveServer]):
    live = new_server()
    said = [text for role, text in synthetic(2 * TURNS, 7, 1).turns if role == "user"][:TURNS]
    said[2] = FACT
    prompts: list[int] = []
    answered: list[tuple[str, str]] = []
    unsure: list[str] = []  # said when the server died: remembered whole, or not at all
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as client:

        def say(text: str, tokens: int = 3) -> None:
            messages: list[Any] = [{"role": "user", "content": text}]
            body = {"memory": {"id": "long", "budget": BUDGET}}
            told = client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens, seed=1, extra_body=body)
            prompts.append(told.usage.prompt_tokens)
            answered.append((text, told.choices[0].message.content or ""))

        for number, text in enumerate(said):
            if number not in KILLED:
                say(text)
                continue
            threading.Timer(0.15, live.process.kill).start()
            try:
                say(text, 400)
            except openai.APIError:
                unsure.append(text)
            live.process.wait(30)
            live.restart()
    with httpx.Client(base_url=live.url + "/v1", headers={"X-API-Key": KEY}, timeout=60) as http:
        turns: list[dict[str, Any]] = []
        while page := http.get("/memories/long/turns", params={"limit": 500, "after": turns[-1]["number"] if turns else -1}).json():
            turns += page["data"]
            if not page["has_more"]:
                break
        window = http.get("/memories/long").json()
    kept = [(one["text"], other["text"]) for one, other in zip(turns[::2], turns[1::2], strict=True)]
    assert [pair for pair in kept if pair[0] not in unsure or pair in answered] == answered, "what was answered is there, in order"
    assert len(prompts) >= TURNS - len(KILLED) and max(prompts) <= BUDGET
    assert window["tokens"] <= BUDGET and any("shellfish" in chunk["text"] for chunk in window["chunks"]), "said at the third turn"
