"""Puts the retained-ability suite to a model, through the OpenAI API of any server that has chats and scores prompts.

Answers are the likeliest ones (temperature 0), so the same weights give the same results. A request that fails is sent again; one that goes
on failing ends the whole, because a metric over what happened to be answered would be another metric.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from everlearn.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from everlearn.evals.asked import Instructed, Piece, Question, Set, Suite
from everlearn.evals.retained import Metric, Results, Unit
from everlearn.evals.safety import Probe

AT_ONCE = 8
SECONDS = 600.0  # for one answer; the server may have others to serve
TRIES = 4
AGAIN = {408, 429, 500, 502, 503, 504}
OnDone = Callable[[int], None]  # how many units are done


class Subject:
    """A model behind an OpenAI API at `url` (without /v1): its `model` may be a base model, an adapter's name or a `tinker://` path."""

    def __init__(self, url: str, model: str, key: str = "", seconds: float = SECONDS):
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=f"{self.url}/v1", headers=headers, timeout=httpx.Timeout(seconds, connect=10.0))
        self._room = asyncio.Semaphore(AT_ONCE)

    async def close(self) -> None:
        await self._http.aclose()

    async def answer(self, said: str | list[dict[str, str]], max_tokens: int) -> str:
        """What it says to a message or a conversation, likeliest token by token."""
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        chat = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        body = await self._send("chat/completions", chat)
        return str(body["choices"][0]["message"].get("content") or "")

    async def surprise(self, text: str) -> tuple[float, int]:
        """Nats that the model needs for each token of a text but the first, and how many tokens those are."""
        body = await self._send("completions", {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 0})
        given = (body["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        if len(given) == 1:
            raise InvalidRequest(f"the text {text!r} is one token, which nothing foretells; make it longer or leave it out", param="data")
        logprobs = given[1:]
        if not logprobs or any(value is None for value in logprobs):
            raise Unsupported(f"{self.url} scores no prompts (echo with logprobs); leave texts out of the suite", param="model")
        return -sum(logprobs) / len(logprobs), len(logprobs)

    async def _send(self, path: str, body: dict[str, Any]) -> Any:
        async with self._room:
            for attempt in range(TRIES):
                if attempt:
                    await asyncio.sleep(0.5 * 2**attempt)
                try:
                    response = await self._http.post(path, json={"model": self.model, **body})
                except httpx.TransportError as error:
                    problem = f"{type(error).__name__}: {error}"
                    continue
                if response.is_success:
                    return response.json()
                problem = f"{response.status_code}: {response.text[:300]}"
                if response.status_code not in AGAIN:
                    kind = NotFound if response.status_code == 404 else InvalidRequest
                    raise kind(f"{self.url} refuses {path} of {self.model!r} ({problem})", param="model")
        raise Unavailable(f"{self.url} gave no answer of {self.model!r} in {TRIES} tries ({problem})", code="unreachable")


def measure(url: str, model: str, suite: Suite, key: str = "", on_done: OnDone = lambda _: None) -> Results:
    """The results of one model. Raises what the server's refusals are, and Unavailable where it doesn't answer."""
    return asyncio.run(measured(url, model, suite, key, on_done))


async def measured(url: str, model: str, suite: Suite, key: str = "", on_done: OnDone = lambda _: None) -> Results:
    """`measure` for who is in an event loop already."""
    subject, done = Subject(url, model, key), 0

    async def counted(row: Any) -> Any:
        nonlocal done
        found = await _unit(subject, row, suite)
        done += 1
        on_done(done)
        return found

    try:
        metrics: list[Metric] = []
        for one in suite.sets:
            tasks = [asyncio.create_task(counted(row)) for row in one.rows]
            try:
                units = list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
            metrics += _metrics(one, units)
        return Results(model, suite.digest, metrics)
    finally:
        await subject.close()


async def _unit(subject: Subject, row: Instructed | Question | Piece | Probe, suite: Suite) -> Unit:
    if isinstance(row, Piece):
        value, tokens = await subject.surprise(row.text)
        return Unit(row.id, value, tokens)
    if isinstance(row, Probe):
        said = await subject.answer(row.messages, suite.question_tokens)
        return Unit(row.id, float(row.good(said)), answer=said)
    if isinstance(row, Question):
        said = await subject.answer(row.question, suite.question_tokens)
        return Unit(row.id, float(row.right(said)), answer=said)
    said = await subject.answer(row.prompt, suite.instruction_tokens)
    followed = row.followed(said)
    return Unit(row.id, sum(followed) / len(followed), len(followed), said)


def _metrics(one: Set, units: list[Unit]) -> list[Metric]:
    """Of instructions two, as IFEval has them: the share that was followed, and the share of prompts of which all were."""
    if not units:
        return []
    if isinstance(one.rows[0], Piece):
        return [Metric(f"{one.name}: perplexity", "perplexity", units)]
    if isinstance(one.rows[0], Probe):
        return [Metric(f"{one.name}: good", "share", units)]
    if isinstance(one.rows[0], Question):
        return [Metric(f"{one.name}: right", "share", units)]
    whole = [Unit(unit.id, float(unit.value == 1.0)) for unit in units]
    return [Metric(f"{one.name}: followed", "share", units), Metric(f"{one.name}: all followed", "share", whole)]
