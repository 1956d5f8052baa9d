"""Grammars by xgrammar, with `engine.grammar = "xgrammar"`.

What this library passes over in silence (a keyword of a schema, an anchor) is refused before it gets there (schema_subset.py,
regex_subset.py), so that what is taken is kept. Its compiler counts no work of its own: a time limit is all that ends it, as everywhere
(grammar.py). White space in JSON is Python's own: a space behind each comma and colon.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import cast

import numpy as np
import xgrammar

from everlearn.engine.lark_dialect import translate
from everlearn.engine.matching import PARAM, Matcher, num_tokens, num_words, try_out
from everlearn.engine.regex_subset import keep
from everlearn.engine.schema_subset import check_schema, prepare
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.models.load import BaseModel
from everlearn.types import Grammar

PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")  # of the library's own source, in its errors
NO_TEXT = b"\xff"  # no UTF-8
# Added tokens that stand for something although they aren't called special (Qwen3's <tool_call>); others (runs of spaces, words) are text.
SIGN = re.compile(r"<.*>|\[.*\]", re.DOTALL)
# Its work may grow with the square of these (4,096 signs of `a?` take 15 s), and a thread that is given up on goes on until it is done.
MAX_SOURCE = {"regex": 2**12, "ebnf": 2**13}


class XGrammarMatcher:
    """The library knows of tokens that end texts; they are never drawn through it, and their bits are the caller's affair."""

    def __init__(self, inner: xgrammar.GrammarMatcher, others_U: np.ndarray):
        self.inner, self.others_U = inner, others_U
        self.problem: str | None = None

    def copy(self) -> XGrammarMatcher:
        return XGrammarMatcher(self.inner.fork(), self.others_U)

    def fill(self, allowed_NU: np.ndarray, row: int) -> None:
        self.inner.fill_next_token_bitmask(allowed_NU, row)
        self.look(allowed_NU[row])

    def look(self, allowed_U: np.ndarray) -> None:
        """Notes where nothing may follow although the text isn't complete."""
        if not allowed_U.any() and not self.inner.is_completed():
            self.problem = self.problem or "it has no continuation"

    def consume(self, token: int) -> None:
        if self.problem is None and not self.inner.accept_token(token):
            self.problem = f"token {token} is no continuation"

    def is_complete(self) -> bool:
        return bool(self.inner.is_completed())

    def is_over(self) -> bool:
        if not self.is_complete():
            return False
        allowed_NU = np.zeros((1, len(self.others_U)), np.int32)
        self.inner.fill_next_token_bitmask(allowed_NU, 0)
        return not (allowed_NU[0] & self.others_U).any()

    def error(self) -> str | None:
        return self.problem


class XGrammar:
    def __init__(self, base: BaseModel, threads: int):
        assert base.tokenizer is not None
        self.base, self.words = base, num_words(base)
        added = base.tokenizer.get_added_tokens_decoder().items()
        self.added = {token.content: number for number, token in added if token.special or SIGN.fullmatch(token.content)}
        self.batch = xgrammar.BatchGrammarMatcher(max_threads=threads)
        # One thread: the one that asks, which has a deep stack and whose processor time is counted. The cache is grammar.py's.
        self.compiler = xgrammar.GrammarCompiler(self._vocabulary(base), max_threads=1, cache_enabled=False)
        others_U = np.full(self.words, 0xFFFFFFFF, np.uint32)
        for number in base.info.eos_token_ids:
            others_U[number // 32] &= ~np.uint32(1 << number % 32)
        self.others_U = others_U.view(np.int32)

    def _vocabulary(self, base: BaseModel) -> xgrammar.TokenizerInfo:
        """The bytes of each token. A sign has bytes that are in no text, so that it is drawn only where a grammar names it."""
        assert base.tokenizer is not None
        form = xgrammar.TokenizerInfo._detect_metadata_from_hf(base.tokenizer.to_str())
        if form["vocab_type"] is xgrammar.VocabType.RAW:
            raise Unsupported(f"xgrammar can't read the tokenizer of {base.info.name}; leave out engine.grammar", param=PARAM)
        texts = [""] * num_tokens(base)
        for text, number in base.tokenizer.get_vocab(with_added_tokens=True).items():
            texts[number] = text
        stops = base.info.eos_token_ids
        found = xgrammar.TokenizerInfo(texts, form["vocab_type"], stop_token_ids=stops).decoded_vocab
        for number in self.added.values():
            found[number] = NO_TEXT
        return xgrammar.TokenizerInfo(found, xgrammar.VocabType.RAW, stop_token_ids=stops, add_prefix_space=form["add_prefix_space"])

    def compile(self, grammar: Grammar) -> XGrammarMatcher:
        if len(grammar.source) > (limit := MAX_SOURCE.get(grammar.kind, math.inf)):
            text = f"the {grammar.kind} has {len(grammar.source)} characters; {limit} is the limit with xgrammar; make it smaller"
            raise TooLarge(text, param=PARAM)
        try:
            compiled = self._compile(grammar)
        except RuntimeError as error:
            raise ValueError(PLACE.sub("", str(error))) from error
        found = XGrammarMatcher(xgrammar.GrammarMatcher(compiled), self.others_U)
        found.fill(np.zeros((1, self.words), np.int32), 0)
        if (reason := found.error()) is not None:
            raise ValueError(f"nothing matches it: {reason}")
        try_out(found.copy(), self.words, self.base.info.eos_token_ids)
        return found

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        match grammar.kind:
            case "json_object":
                return self.compiler.compile_grammar(_json_grammar({"type": "object"}))
            case "json_schema":
                schema = json.loads(grammar.source)
                if not isinstance(schema, dict) and schema is not True:
                    raise InvalidRequest(f"the json_schema is {grammar.source[:40]!r}; it must be an object", param=PARAM)
                check_schema(schema, PARAM)
                return self.compiler.compile_grammar(_json_grammar(schema))
            case "regex":
                return self.compiler.compile_regex(_regex(grammar.source))
            case "lark":
                lark = translate(grammar.source, self.added)
                named = {name: _json_grammar(schema) for name, schema in lark.schemas.items()}
                return self.compiler.compile_lark(lark.source, named_grammars=named)
            case "ebnf":
                return self.compiler.compile_grammar(grammar.source)

    def fill(self, following: Sequence[tuple[Matcher, int]], allowed_NU: np.ndarray) -> None:
        matchers = [cast(XGrammarMatcher, matcher) for matcher, _ in following]
        rows = [row for _, row in following]
        self.batch.batch_fill_next_token_bitmask([matcher.inner for matcher in matchers], allowed_NU, rows)
        for matcher, row in zip(matchers, rows, strict=True):
            matcher.look(allowed_NU[row])


def _regex(source: str) -> str:
    try:
        return keep(source, in_json=False)
    except ValueError as error:
        raise ValueError(f"xgrammar, by which this server holds answers to it, can't follow {error}; say it otherwise") from None


def _json_grammar(schema: object) -> xgrammar.Grammar:
    """`schema` is changed: its patterns are said as the library keeps to them."""
    prepare(schema)
    return xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False, strict_mode=False)
