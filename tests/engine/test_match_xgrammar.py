"""What xgrammar would pass over in silence is an error that names it; what it is asked to compile is bounded; and how its absence is told."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlearn.engine.grammar import Grammars
from everlearn.engine.lark_dialect import translate
from everlearn.engine.matching import check_installed
from everlearn.engine.schema_subset import check_schema
from everlearn.errors import InvalidRequest, TooLarge, Unavailable, Unsupported
from everlearn.models.load import BaseModel
from everlearn.types import Grammar
from tests.engine.harness import WITHOUT_XGRAMMAR, load_tiny
from tests.engine.test_grammar import HOSTILE, compiled, until


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


PASSED_OVER: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "'not' without a type"),
    ({"minimum": 3}, "'minimum' without a type"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "array", "contains": {"type": "integer"}}, "'contains'"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"type": "object", "minProperties": 2}, "'minProperties'"),
    ({"type": "number", "multipleOf": 2}, "'multipleOf'"),
    ({"type": "integer", "multipleOf": 3, "minimum": 0}, "'multipleOf'"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "'pattern' beside a length"),
    ({"type": "string", "pattern": "a" * 2000}, "'pattern' of more than"),
    ({"type": "string", "format": "date"}, "format 'date'"),
    ({"type": "string", "format": "uuid", "maxLength": 3}, "beside other keywords"),
    ({"anyOf": [{"type": "integer"}], "minimum": 5}, "'minimum' beside 'anyOf'"),
    ({"enum": [1, "x"], "type": "string"}, "'type' beside 'enum'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' without a type"),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "'allOf' of several"),
    ({"$ref": "http://a/b"}, "leads out of the schema"),
    ({"type": ["string", "thing"]}, "type \"['string', 'thing']\""),
    ({"type": "object", "properties": {"a": {"type": "array", "items": {"if": {}}}}}, "'if' without a type at /properties/a/items"),
    ({"type": "object", "required": ["b"]}, "'required' of 'b', which is none of the properties"),
    ({"default": {"not": {}}, "$ref": "#/default"}, "'#/default', which leads to no schema"),
    ({"$defs": {"x": {"default": {"not": {}}}}, "$ref": "#/$defs/x/default"}, "'#/$defs/x/default', which leads to no schema"),
    ({"properties": {"a/default": {}, "a": {"default": {"not": {}}}}, "type": "object", "additionalProperties": {"$ref": "#/properties/a/default"}}, "leads to no schema"),
    *(({"type": "string", "pattern": pattern}, says) for pattern, says in [
        ('say "hi"', "'\"' (a quote"), (r"C:\\a", "(a quote, a backslash"), (r"a\n", "a control character) of the 'pattern'"), (r"[\n\t]", "a control character"),
        (r"\x22", "(a quote"), ("a(?=b)", "'(?=b)' at character 1"), ("(?<!a)b", "'(?<!a)b' at character 0"), ("a$b", "'$b' at character 1"), ("a|^b", "'^b' at"),
        (r"\Aa", "at character 0"), ("(?i)a", "'(?i)a' at"), ("].", "'].' at"), ("a*+", "'*+' at"), (r"[\b]", "at character 0"), (r"\p{L}", "at character 0"),
    ]),
    ({"$defs": {"x": {"type": "integer", "maxLength": 1}}, "$ref": "#/$defs/x"}, "'maxLength' at /$defs/x"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "says"), PASSED_OVER, ids=[says for _, says in PASSED_OVER])
def test_what_would_be_passed_over_is_refused_by_name(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_schema(schema, "response_format")
    assert says in refused.value.message and refused.value.param == "response_format"


def test_what_is_kept_is_not_refused() -> None:
    check_schema({
        "title": "t", "type": "object", "required": ["a"], "additionalProperties": False, "minProperties": 1, "$defs": {"n": {"type": ["integer", "null"]}},
        "properties": {
            "a": {"anyOf": [{"$ref": "#/$defs/n"}, {"const": "x", "type": "string"}, {"enum": [1, None], "type": ["integer", "null"]}]},
            "b": {"type": "array", "items": {"type": "number", "minimum": 0.5}, "prefixItems": [{"type": "boolean"}], "maxItems": 3},
            "c": {"type": "string", "format": "uuid"}, "d": {"type": "integer", "multipleOf": 5}, "e": {}, "f": True,
        },
    }, "response_format")  # fmt: skip


def test_an_absent_package_is_told_at_the_start_with_the_command_that_helps(tmp_path: Path) -> None:
    check_installed("llguidance")
    if importlib.util.find_spec("xgrammar") is None:
        environment = {**os.environ, "EVERLEARN_HOME": str(tmp_path), "EVERLEARN_ENGINE__GRAMMAR": "xgrammar"}
        started = subprocess.run(
            [sys.executable, "-m", "everlearn.cli.main", "serve"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert started.returncode != 0 and 'pip install "xgrammar>=0.2.8,<0.3"' in started.stderr
        with pytest.raises(Unsupported, match='pip install "xgrammar'):
            check_installed("xgrammar")
    else:
        check_installed("xgrammar")


def test_a_text_without_words_becomes_their_automaton() -> None:
    rules = translate('%llguidance {}\nstart: TEXT1\nTEXT1: ANYTHING & ~(ANYTHING "ab" ANYTHING)\nANYTHING: /(?s:.*)/\n', {}).source
    assert "text1_1: " in rules and '"b"' not in rules.split("text1_1: ")[1].split("\n")[0], "behind an a no b may come"
    with pytest.raises(Unsupported, match="tool_choice"):
        translate("start: TEXT1\nTEXT1: ANYTHING & ~(/\\s*\\[/ ANYTHING)\n", {})


def writes(base: BaseModel, grammar: Grammar, text: bytes) -> bool:
    """Whether the grammar lets the library write these bytes to the end."""
    import xgrammar

    from everlearn.engine.match_xgrammar import XGrammar

    compiler = XGrammar(base, 1)
    letters = xgrammar.TokenizerInfo([b"</s>"] + [bytes([i]) for i in range(1, 256)], xgrammar.VocabType.RAW, stop_token_ids=[0])
    compiler.compiler = xgrammar.GrammarCompiler(letters, max_threads=1, cache_enabled=False)
    matcher = xgrammar.GrammarMatcher(compiler._compile(grammar))
    return all(matcher.accept_token(byte) for byte in text) and bool(matcher.is_completed())


KEPT = [
    (".{0,200}", ["", "aé😀", "b" * 200], ['"', "\\", "\n", "b" * 201]),
    (r"^é[^a]\D\S$", ["ébcd"], ['éb"d', "éb\\d", 'ébc"', "é\ncd"]),
    (r"[!-~]{1,3}|[\s\S]z", ["a[]", " z"], ['"', "\\", "\nz"]),
    (r"[\^a-c]-\$[_^]\]", ["^-$_]", "b-$^]"], ["d-$_]"]),
    ("(?:a|(?P<n>b))+?[+-]", ["abba-", "a+"], ["-", "a,"]),
]


@WITHOUT_XGRAMMAR
@pytest.mark.parametrize(("pattern", "taken", "refused"), KEPT, ids=[pattern for pattern, _, _ in KEPT])
def test_a_pattern_means_the_same_and_never_ends_the_string(
    base: BaseModel, capfd: Any, pattern: str, taken: list[str], refused: list[str]
) -> None:
    schema, regex = Grammar("json_schema", json.dumps({"type": "string", "pattern": pattern})), Grammar("regex", pattern)
    assert [text for text in taken if not writes(base, schema, f'"{text}"'.encode()) or not writes(base, regex, text.encode())] == []
    assert [text for text in refused if writes(base, schema, f'"{text}"'.encode())] == []
    assert not writes(base, Grammar("regex", "."), b"\n")
    assert capfd.readouterr().err == ""


@WITHOUT_XGRAMMAR
def test_what_a_regex_would_lose_is_refused(base: BaseModel, capfd: Any) -> None:
    grammars = Grammars(base, 30.0, 4, "xgrammar")
    for source in ("a^b", "a$b", r"\Aab\Z", "a(?=b)", "[[:alpha:]]", r"\Q"):
        error = compiled(grammars, Grammar("regex", source)).error
        assert isinstance(error, InvalidRequest) and "can't follow" in error.message and "at character" in error.message
    assert capfd.readouterr().err == ""


@WITHOUT_XGRAMMAR
def test_hostile_sources_end_in_bounded_time(base: BaseModel) -> None:
    """Those of llguidance's test. What takes longest here is refused for its size; the rest compiles or is an error, and whichever it is
    comes by itself: how soon depends on what else the machine does."""
    grammars = Grammars(base, 5.0, 4, "xgrammar")
    made = {name: grammars.compile(Grammar(*source), name) for name, source in HOSTILE.items()}  # type: ignore[arg-type]
    until(grammars, lambda: all(one.done for one in made.values()) and not grammars.lost, math.inf)  # a thread left behind aborts the exit
    for name, one in made.items():
        assert one.matcher is not None or isinstance(one.error, (InvalidRequest, TooLarge, Unsupported, Unavailable)), name
    assert isinstance(made["stars"].error, TooLarge)


@WITHOUT_XGRAMMAR
def test_special_tokens_are_no_text(base: BaseModel) -> None:
    """`<|im_start|>` is token 1 here: its letters are text like any other, it itself comes only where a grammar names it."""
    mask = np.zeros((1, 16), np.int32)
    for kind, source, allowed in (("regex", "(.|\n)*", False), ("lark", "start: <|im_start|>", True)):
        matcher = compiled(Grammars(base, 10.0, 4, "xgrammar"), Grammar(kind, source)).matcher  # type: ignore[arg-type]
        assert matcher is not None
        matcher.copy().fill(mask, 0)
        assert bool(mask[0, 0] >> 1 & 1) is allowed


@WITHOUT_XGRAMMAR
def test_errors_of_schemas_say_the_reason_alone(base: BaseModel) -> None:
    wrong = json.dumps({"type": "string", "minLength": 3, "maxLength": 2})
    error = compiled(Grammars(base, 10.0, 4, "xgrammar"), Grammar("json_schema", wrong)).error
    assert error is not None and error.message == "the json_schema can't be used: minLength 3 is greater than maxLength 2"
