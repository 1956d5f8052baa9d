"""The same grammars of calls by xgrammar: what it takes it holds to the letter, and what it can't say is refused before anything is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlearn.errors import Unsupported
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import FORMATS
from everlearn.types import Grammar
from tests.engine.harness import WITHOUT_XGRAMMAR, load_tiny
from tests.render import test_schemas
from tests.render.test_callgrammar import BAD, EITHER, FAMILY, GOOD, NAMED, OWN, TOOLS, Bound, reply

pytestmark = WITHOUT_XGRAMMAR
# llama3: text that doesn't begin like an object; no automaton of words says that. llama4: JSON's strings between brackets of Python's.
REFUSED = {"llama3": ("auto",), "llama4": ("auto", "required", NAMED)}


class Kit(Bound):
    def __init__(self, name: str, tokenizer: ChatTokenizer, tiny_model: Path):
        from everlearn.engine.match_xgrammar import XGrammar

        super().__init__(name, tokenizer)
        base = load_tiny(tiny_model)
        base.tokenizer = tokenizer.tokenizer
        self.compiler = XGrammar(base, 1)
        self.compiled = functools.cache(self.compiler.compile)

    def takes(self, grammar: Grammar, text: str) -> bool:
        matcher = self.compiled(grammar).copy()
        mask = np.zeros((1, self.compiler.words), np.uint32)
        for token in self.tokenizer.encode(text):
            matcher.fill(mask.view(np.int32), 0)
            if not mask[0, token // 32] >> token % 32 & 1:
                return False
            matcher.consume(token)
        return matcher.error() is None and matcher.is_complete()


@pytest.fixture(scope="module")
def kits(tokenizer: ChatTokenizer, with_tokens: Callable[..., ChatTokenizer], tiny_model: Path) -> Callable[[str, bool], Kit]:
    made: dict[tuple[str, bool], Kit] = {}

    def make(name: str, special: bool) -> Kit:
        if (name, special) not in made:
            made[name, special] = Kit(name, with_tokens(*FORMATS[name].marks) if special else tokenizer, tiny_model)
        return made[name, special]

    return make


@EITHER
@FAMILY
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_calls_match_or_the_choice_is_refused(kits: Callable[..., Kit], family: str, special: bool, choice: Any):
    kit = kits(family, special)
    grammar = kit.format.grammar(TOOLS, choice)
    assert grammar is not None
    if choice in REFUSED.get(family, ()):
        with pytest.raises(Unsupported, match="xgrammar"):
            kit.compiler.compile(grammar)
        return
    assert kit.takes(grammar, reply(family, GOOD[0]))
    wrong = [reply(family, arguments) for arguments in BAD if family not in OWN] + [
        reply(family, GOOD[0]).replace("get_weather", "get_wether")
    ]
    assert [text for text in wrong if kit.takes(grammar, text)] == []
    text = "Hello!\n{} < 3 and <b>.\n"
    answer = f"<|channel|>final<|message|>{text}" if family == "harmony" else text
    assert kit.takes(grammar, answer) is (choice == "auto")


def test_a_mark_is_no_text_though_the_tokenizer_does_not_call_it_special(with_tokens: Callable[..., ChatTokenizer], tiny_model: Path):
    """Qwen3's <tool_call> is such a token; what isn't in brackets stays text."""
    kit = Kit("hermes", with_tokens(*FORMATS["hermes"].marks, "hello world", special=False), tiny_model)
    grammar = kit.format.grammar(TOOLS, "auto")
    assert grammar is not None
    assert kit.takes(grammar, "hello world " + reply("hermes", GOOD[0]))
    assert not kit.takes(grammar, 'Hi <tool_call>{"name": "drop_tables", "arguments": {"x": 1}}\n</tool_call>')
    assert not kit.takes(grammar, "Hi " + reply("hermes", GOOD[0]).replace("get_weather", "drop_tables"))


@pytest.mark.parametrize("family", ["qwen3_coder", "deepseek_v32"])
@pytest.mark.parametrize("name", ["at", "till", "colour", "fill", "name", "kind", "mode", "note"])
def test_a_parameter_that_refers_to_a_schema_is_held_to_it(kits: Callable[..., Kit], family: str, name: str):
    kit = kits(family, False)
    schema = {**test_schemas.SCHEMA, "properties": {name: test_schemas.SCHEMA["properties"][name]}, "required": [name]}
    grammar = kit.format.grammar([test_schemas.tool(schema)], "required", False)
    for value in test_schemas.GOOD[name]:
        assert kit.takes(grammar, test_schemas.called(family, {name: value})), value
    for value in test_schemas.BAD.get(name, []):
        assert not kit.takes(grammar, test_schemas.called(family, {name: value})), value
