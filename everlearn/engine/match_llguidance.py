"""Grammars by llguidance: it counts its own work and gives up over limits, and says of a schema what it can't follow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from tokenizers import Tokenizer

from everlearn.engine.matching import PARAM, Matcher, num_tokens, num_words, try_out
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models.load import BaseModel
from everlearn.render.callgrammar import SPACING
from everlearn.types import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Free white space lets a small model write nothing else; what a keyword means that the compiler doesn't know can't be promised.
STYLE = cast("JsonCompileOptions", {**SPACING, "lenient": False})
LIMITS = LLParserLimits(max_lexer_states=25_000, verbose_errors=False)


class GuidanceMatcher:
    def __init__(self, inner: LLMatcher):
        self.inner = inner

    def copy(self) -> GuidanceMatcher:
        return GuidanceMatcher(self.inner.deep_copy())

    def fill(self, allowed_NU: np.ndarray, row: int) -> None:
        fill_next_token_bitmask(self.inner, allowed_NU, row)

    def consume(self, token: int) -> None:
        self.inner.consume_token(token)

    def is_complete(self) -> bool:
        return self.inner.is_accepting()

    def is_over(self) -> bool:
        return self.inner.is_stopped()

    def error(self) -> str | None:
        if not self.inner.is_error():
            return None
        return (self.inner.get_error().splitlines() or ["it has no continuation"])[0][:300]


class Guidance:
    def __init__(self, base: BaseModel, threads: int):
        assert base.tokenizer is not None
        self.base, self.words, self.threads = base, num_words(base), threads
        self.executor: LLExecutor | None = None
        tokenizer = Tokenizer.from_str(base.tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        try:
            self.tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=num_tokens(base), eos_token=base.info.eos_token_ids or None)
        except Exception as error:
            raise Unsupported(f"no grammar can be applied to the tokenizer of {base.info.name}: {error}", param=PARAM) from error

    def compile(self, grammar: Grammar) -> GuidanceMatcher:
        matcher = LLMatcher(self.tokenizer, spell(grammar), limits=LIMITS, log_level=0)
        found = GuidanceMatcher(matcher)
        if not matcher.is_error():
            found.fill(np.zeros((1, self.words), np.int32), 0)  # the first mask is the dearest; copies inherit what it found out
        if not matcher.is_error():
            try_out(found.copy(), self.words, self.base.info.eos_token_ids)
        if matcher.is_error():
            raise ValueError(matcher.get_error() or "nothing matches it")
        return found

    def fill(self, following: Sequence[tuple[Matcher, int]], allowed_NU: np.ndarray) -> None:
        self.executor = self.executor or LLExecutor(self.threads)
        inner = [(cast(GuidanceMatcher, matcher).inner, row) for matcher, row in following]
        fill_next_token_bitmask_par(self.executor, inner, allowed_NU)


def spell(grammar: Grammar) -> str:
    """The grammar as llguidance reads it. Raises where it isn't even that."""
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=STYLE)
        case "json_schema":
            schema = json.loads(grammar.source)
            schema = {} if schema is True else schema
            if not isinstance(schema, dict):
                raise InvalidRequest(f"the json_schema is {grammar.source[:40]!r}; it must be an object", param=PARAM)
            schema.pop("x-guidance", None)  # the compiler's options; a schema doesn't set them
            return LLMatcher.grammar_from_json_schema(schema, overrides=STYLE)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)
        case "ebnf":
            return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.source))
