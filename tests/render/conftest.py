"""The embedded model's tokenizer, and the same with the special tokens of other families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from everlearn.render.tokenizer import ChatTokenizer, load
from tests.models.conftest import smollm2  # noqa: F401 - a fixture

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "additionalProperties": False},
    },
}


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> ChatTokenizer:  # noqa: F811
    return load(smollm2)


@pytest.fixture(scope="session")
def with_tokens(tokenizer: ChatTokenizer) -> Callable[..., ChatTokenizer]:
    """A function that gives SmolLM2's tokenizer further tokens, called special or not, and a template."""

    def make(*tokens: str, template: str | None = None, special: bool = True) -> ChatTokenizer:
        copy = tokenizer.tokenizer
        if tokens:
            copy = Tokenizer.from_str(copy.to_str())
            add = copy.add_special_tokens if special else copy.add_tokens
            add([AddedToken(token, special=special, normalized=False) for token in tokens])
        return ChatTokenizer(copy, tokenizer.config, {"default": template} if template is not None else tokenizer.templates)

    return make
