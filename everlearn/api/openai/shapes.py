"""What answers of chat completions and completions have in common: ids, usage, log-probabilities, error events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from everlearn.api.calls import Call, Exchange
from everlearn.api.errors import STATUS, envelope
from everlearn.api.replies import ScoredToken
from everlearn.errors import EverlearnError
from everlearn.render.tokenizer import ChatTokenizer

encode = msgspec.json.encode
LOWEST = -9999.0  # JSON has no minus infinity
FINISH = {"deadline": "length"}  # OpenAI has no word for time that is over; `everlearn.finish` tells


def public_id(prefix: str, record_id: str) -> str:
    """`chatcmpl-...` for record `rec_...`: each can be made from the other."""
    return prefix + record_id.removeprefix("rec_")


def finish_reason(finish: str) -> str:
    return FINISH.get(finish, finish)


def usage(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    prompt = sum(exchange.prompt_tokens for exchange in exchanges)
    completion = sum(exchange.completion_tokens for exchange in exchanges)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(exchange.cached_tokens for exchange in exchanges)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(reply.reasoning_tokens for exchange in exchanges for reply in exchange.replies)
        },
    }


def ours(call: Call) -> dict[str, Any]:
    """What OpenAI's answers have no field for: the records of this answer, and which weights gave it."""
    told: dict[str, Any] = {"record": call.record_ids[0], "version": call.target.name}
    if len(call.exchanges) > 1:
        told["records"] = call.record_ids
    if any(reply.finish == "deadline" for exchange in call.exchanges for reply in exchange.replies):
        told["finish"] = "deadline"
    if call.memory is not None:
        told["memory"] = call.memory
    return told


def scored(tokenizer: ChatTokenizer, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
    """Chat's form of log-probabilities."""
    return [
        {**_token(tokenizer, token.id, token.logprob), "top_logprobs": [_token(tokenizer, number, score) for number, score in token.top]}
        for token in tokens
    ]


def _token(tokenizer: ChatTokenizer, number: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.token_text(number), "logprob": max(logprob, LOWEST), "bytes": list(tokenizer.token_bytes(number))}


def error_event(error: EverlearnError) -> bytes:
    """An error after the headers, in the envelope that clients look for."""
    told = envelope(STATUS.get(error.code, 500), error.code, error.message.encode("utf-8", "backslashreplace").decode(), error.param)
    return b"data: " + encode(told) + b"\n\n"
