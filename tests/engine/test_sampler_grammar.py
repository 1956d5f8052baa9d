"""Sampling under grammars on a model with random weights: what ends with "stop" matches, and nothing else changes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from everlearn.engine.protocol import Failed, Sample
from everlearn.engine.sampler import Sampler
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.models.load import BaseModel
from everlearn.types import Grammar, SampleResult
from tests.engine.harness import GRAMMAR_LIBRARIES, load_tiny
from tests.engine.sampling import make_sampler, prompts, reference_logprobs, request, tokens_of

EOS = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module", params=GRAMMAR_LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def closers(base: BaseModel) -> dict[int, float]:
    """A bias that makes random weights come to an end: quotes, brackets, commas."""
    assert base.tokenizer is not None
    return {base.tokenizer.token_to_id(c): 8.0 for c in '"}],'} | {EOS: 8.0}


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def answer_all(sampler: Sampler, *requests: Sample, seconds: float = 60.0) -> dict[str, SampleResult | Failed]:
    """`run`, for requests whose grammars compile meanwhile."""
    for one in requests:
        sampler.add(one)
    answers: dict[str, SampleResult | Failed] = {}
    give_up = time.monotonic() + seconds
    while sampler.requests or sampler.has_work():
        assert time.monotonic() < give_up, f"{len(sampler.compiling)} compile, {len(sampler.running)} run"
        if sampler.has_work():
            answers |= run_until_idle(sampler)
        else:
            time.sleep(0.002)
    return answers


def run_until_idle(sampler: Sampler) -> dict[str, SampleResult | Failed]:
    answers: dict[str, SampleResult | Failed] = {}
    while sampler.has_work():
        for event in sampler.step():
            if hasattr(event, "result"):
                answers[event.request_id] = event.result
            elif isinstance(event, Failed):
                answers[event.request_id] = event
    return answers


def text_of(base: BaseModel, answer: SampleResult | Failed, index: int = 0) -> str:
    assert base.tokenizer is not None
    tokens = tokens_of(answer, index)
    assert isinstance(answer, SampleResult)
    if answer.sequences[index].stop_reason == "stop" and tokens[-1] == EOS:
        tokens = tokens[:-1]
    return base.tokenizer.decode(tokens, skip_special_tokens=False)


def test_an_answer_matches_and_ends_with_the_end_of_sequence(base: BaseModel, closers: dict[int, float], library: str) -> None:
    asked = [
        request(str(i), p, max_tokens=200, seed=i, num_samples=2, stop_tokens=[EOS], grammar=schema(PERSON), logit_bias=closers)
        for i, p in enumerate(prompts(0, [5, 9, 14, 30]))
    ]
    for answer in answer_all(make_sampler(base, grammar=library), *asked).values():
        for index in range(2):
            assert isinstance(answer, SampleResult) and answer.sequences[index].stop_reason == "stop"
            assert tokens_of(answer, index)[-1] == EOS
            text = text_of(base, answer, index)
            jsonschema.validate(json.loads(text), PERSON)
            assert re.fullmatch(r'\{"name": ?"[^"]*(\\"[^"]*)*", ?"age": ?\d+\}', text), "white space is bounded"


@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        (Grammar("regex", r"[ab]{3,6}c?"), r"[ab]{3,6}c?"),
        (Grammar("lark", 'start: "x" item+ "y"\nitem: /[0-9]/ | "(" item ")"'), r"x[()0-9]+y"),
        (Grammar("ebnf", 'root ::= "yes" | "no" " way"'), r"yes|no way"),
        (Grammar("json_object"), r"(?s)\{.*\}"),
    ],
)
def test_every_kind(base: BaseModel, closers: dict[int, float], grammar: Grammar, matches: str, library: str) -> None:
    assert base.tokenizer is not None
    bias = closers | {base.tokenizer.token_to_id(c): 6.0 for c in "y1"}
    asked = [
        request(str(i), prompts(1, [6])[0], max_tokens=300, seed=i, stop_tokens=[EOS], grammar=grammar, logit_bias=bias) for i in range(8)
    ]
    answers = answer_all(make_sampler(base, grammar=library), *asked)
    ended = [a for a in answers.values() if isinstance(a, SampleResult) and a.sequences[0].stop_reason == "stop"]
    assert len(ended) >= 6
    for answer in ended:
        assert re.fullmatch(matches, text_of(base, answer)), text_of(base, answer)


def test_the_seed_decides_alone_with_grammars_too(base: BaseModel, closers: dict[int, float], library: str) -> None:
    """Alone, in a crowd of 32, and with blocks that run out: grammars, penalties and free rows side by side."""
    grammars = [schema(PERSON), None, Grammar("regex", "[a-z ]{20,60}"), Grammar("json_object"), None]
    asked = [
        request(
            str(i), p, max_tokens=40, seed=70 + i, num_samples=1 + (i % 7 == 0), grammar=grammars[i % 5], stop_tokens=[EOS],
            **({"presence_penalty": 0.5, "min_p": 0.01, "min_tokens": 6, "logit_bias": closers} if i % 2 else {}),
        )
        for i, p in enumerate(prompts(2, [5 + i % 9 for i in range(32)]))
    ]  # fmt: skip
    crowd = answer_all(make_sampler(base, grammar=library), *asked)
    small = make_sampler(base, grammar=library, kv_tokens=300, prefill_tokens=16)
    squeezed = answer_all(small, *asked)
    assert small.stats()["preemptions"] > 0
    for wanted in asked:
        for index in range(wanted.num_samples):
            assert tokens_of(squeezed[wanted.request_id], index) == tokens_of(crowd[wanted.request_id], index)
    for wanted in asked[::3]:
        alone = answer_all(make_sampler(base, grammar=library), wanted)[wanted.request_id]
        assert tokens_of(alone) == tokens_of(crowd[wanted.request_id])


def test_log_probabilities_know_nothing_of_the_mask(base: BaseModel, tiny_model: Path, library: str) -> None:
    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompt = prompts(3, [11])[0]
    answer = answer_all(
        make_sampler(base, grammar=library), request("r", prompt, max_tokens=30, grammar=schema(PERSON), topk_sample_logprobs=2)
    )["r"]
    drawn = tokens_of(answer)
    assert isinstance(answer, SampleResult) and answer.sequences[0].topk is not None
    expected = reference_logprobs(plain, [*prompt, *drawn])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(answer.sequences[0].logprobs.numpy(), expected[torch.arange(len(drawn)), torch.tensor(drawn)], atol=1e-5)
    np.testing.assert_array_equal(answer.sequences[0].topk.token_ids.numpy(), expected.topk(2).indices.numpy())


def test_stop_tokens_end_it_only_where_it_is_complete(base: BaseModel, library: str) -> None:
    assert base.tokenizer is not None
    a, b, z = (base.tokenizer.token_to_id(c) for c in "abz")
    bias = {a: 50.0, z: 60.0, EOS: 40.0}
    asked = request("r", [5, 6, 7], max_tokens=30, temperature=0.0, grammar=Grammar("regex", "a{3}b?"), stop_tokens=[z], logit_bias=bias)
    drawn = tokens_of(answer_all(make_sampler(base, grammar=library), asked)["r"])
    assert drawn == [a, a, a, z]  # z, likelier all along, was not allowed before
    without = request("r", [5, 6, 7], max_tokens=30, temperature=0.0, grammar=Grammar("regex", "a{3}"), logit_bias={a: 50.0})
    assert tokens_of(answer_all(make_sampler(base, grammar=library), without)["r"]) == [a, a, a, EOS]  # the model's own end counts unasked
    late = request(
        "r", [5, 6, 7], max_tokens=30, temperature=0.0, grammar=Grammar("regex", "a*"), min_tokens=9, stop_tokens=[EOS], logit_bias=bias | {EOS: 80.0}
    )  # fmt: skip
    assert tokens_of(answer_all(make_sampler(base, grammar=library), late)["r"]) == [a] * 9 + [EOS]
    forced = request("r", [5, 6, 7], max_tokens=30, grammar=Grammar("regex", "ab"), min_tokens=9, stop_tokens=[EOS])
    tokens = tokens_of(answer_all(make_sampler(base, grammar=library), forced)["r"])
    assert base.tokenizer.decode(tokens[:-1]) == "ab" and tokens[-1] == EOS  # a grammar with nothing left outweighs min_tokens
    exact = answer_all(
        make_sampler(base, grammar=library), request("r", [5, 6, 7], max_tokens=2, grammar=Grammar("regex", "zz"), logit_bias={z: 50.0})
    )["r"]
    assert isinstance(exact, SampleResult) and (tokens_of(exact), exact.sequences[0].stop_reason) == ([z, z], "stop")
    assert b not in tokens_of(exact)


def test_a_model_without_an_end_of_sequence_stops_where_the_text_is_complete(tiny_model: Path, library: str) -> None:
    lonely = load_tiny(tiny_model)
    lonely.info = type(lonely.info)("tiny", str(tiny_model), [], "LlamaForCausalLM", 512, 1024, [])
    answer = answer_all(
        make_sampler(lonely, grammar=library), request("r", [5, 6, 7], max_tokens=30, grammar=Grammar("regex", "[xyz]{4}"))
    )["r"]
    assert isinstance(answer, SampleResult) and answer.sequences[0].stop_reason == "stop"
    assert re.fullmatch("[xyz]{4}", text_of(lonely, answer))


def test_others_go_on_while_a_grammar_compiles(base: BaseModel, library: str) -> None:
    sampler = make_sampler(base, grammar=library)
    with sampler.grammars.compiler_lock:  # what a compilation needs
        sampler.add(request("slow", prompts(4, [6])[0], max_tokens=4, grammar=schema(PERSON)))
        assert sampler.stats()["compiling"] == 1
        sampler.add(request("free", prompts(5, [6])[0], max_tokens=4))
        assert list(run_until_idle(sampler)) == ["free"]
    assert list(answer_all(sampler)) == ["slow"]
    assert sampler.stats()["grammar_compiles"] == 1
    sampler.add(request("known", prompts(4, [6])[0], max_tokens=4, grammar=schema(PERSON)))
    assert sampler.stats()["compiling"] == 0  # the second time it is there


def test_a_request_may_leave_or_run_out_of_time_while_its_grammar_compiles(base: BaseModel, library: str) -> None:
    sampler = make_sampler(base, grammar=library)
    with sampler.grammars.compiler_lock:
        for name, more in (("leaves", {}), ("late", {"deadline": 0.001, "num_samples": 2, "stream": True})):
            sampler.add(request(name, [5, 6], max_tokens=4, grammar=schema(PERSON | {"title": name}), **more))  # type: ignore[arg-type]
        assert sampler.cancel("leaves")
        answers = answer_all(sampler)
    assert isinstance(answers["leaves"], Failed) and answers["leaves"].code == "cancelled"
    late = answers["late"]
    assert isinstance(late, SampleResult) and [s.stop_reason for s in late.sequences] == ["deadline"] * 2
    assert sampler.stats()["compiling"] == 0 and not sampler.requests


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("json_schema", "{nonsense"), "Expecting"),
        (Grammar("json_schema", "[]"), "must be an object"),
        (schema({"type": "nonsense"}), "nonsense"),
        (schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"$ref": "#"}), ""),
        (Grammar("regex", "(("), "regex"),
        (Grammar("lark", "start: nowhere"), "nowhere"),
        (Grammar("ebnf", "root = 1"), ""),
        (Grammar("regex", "\ud800"), ""),
    ],
)
def test_a_grammar_that_does_not_compile_fails_its_request_alone(base: BaseModel, grammar: Grammar, says: str, library: str) -> None:
    sampler = make_sampler(base, grammar=library)
    answers = answer_all(sampler, request("wrong", [5, 6], grammar=grammar), request("fine", [5, 6], max_tokens=3))
    wrong = answers["wrong"]
    assert isinstance(wrong, Failed) and (wrong.code, wrong.param) == ("invalid_request", "response_format")
    assert says in wrong.message and len(wrong.message) < 500
    assert len(tokens_of(answers["fine"])) == 3


def test_what_is_refused_at_once(base: BaseModel, tiny_model: Path, library: str) -> None:
    with pytest.raises(TooLarge):
        make_sampler(base, grammar=library).add(request("r", [5, 6], grammar=Grammar("regex", "a" * 20_000)))
    blind = load_tiny(tiny_model)
    blind.tokenizer = None
    with pytest.raises(Unsupported):
        make_sampler(blind, grammar=library).add(request("r", [5, 6], grammar=Grammar("regex", "a")))


def test_a_grammar_that_becomes_too_dear_fails_its_request_alone(base: BaseModel, library: str) -> None:
    """Every split of the text is a parse of its own here: each token costs more than the one before."""
    assert base.tokenizer is not None
    a = base.tokenizer.token_to_id("a")
    sampler = make_sampler(base, grammar=library)
    costly = Grammar("lark", 'start: s\ns: s s | "a" |')
    asked = request("costly", [5, 6], max_tokens=900, grammar=costly, logit_bias={a: 100.0})
    answers = answer_all(sampler, asked, request("fine", [5, 7], max_tokens=200), seconds=120)
    costly_answer = answers["costly"]
    assert isinstance(costly_answer, Failed) and costly_answer.code == InvalidRequest.code, costly_answer
    assert len(tokens_of(answers["fine"])) == 200
    assert sampler.pool.num_used == 0


# ---- random schemas ----


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    low = st.integers(-1000, 1000)
    span = st.integers(0, 500)
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.just({"type": "integer"}),
        st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, low, span),
        st.builds(lambda a, b: {"type": "number", "minimum": a / 8, "exclusiveMaximum": a / 8 + b + 1}, low, span),
        st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 5), st.integers(0, 9)),
        st.sampled_from([
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, {"type": "string", "pattern": "ab+"}, {"type": "string", "format": "date"},
            {"type": "string", "format": "uuid"}, {"type": ["string", "null"], "maxLength": 4}, {"const": {"a": [1, "x", None]}},
        ]),
        st.builds(lambda v: {"enum": v}, st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=5), st.booleans(), st.none()), min_size=1, max_size=5)),
    )  # fmt: skip


def objects(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], keep: list[bool], more: object) -> dict[str, Any]:
        required = [name for name, wanted in zip(properties, keep, strict=False) if wanted]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}

    names = st.one_of(st.sampled_from(["id", "name", "value", "ü", 'a"b', "x y"]), st.text(min_size=1, max_size=6))
    properties = st.dictionaries(names, children, max_size=4)
    return st.builds(
        build, properties, st.lists(st.booleans(), min_size=4, max_size=4), st.sampled_from([False, False, True, {"type": "integer"}])
    )


def nested(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        objects(children),
        st.builds(lambda c, a, b: {"type": "array", "items": c, "minItems": a, "maxItems": a + b}, children, st.integers(0, 2), st.integers(0, 3)),
        st.builds(lambda c: {"type": "array", "prefixItems": c, "items": False, "minItems": len(c)}, st.lists(children, min_size=1, max_size=3)),
        st.builds(lambda c: {"anyOf": c}, st.lists(children, min_size=1, max_size=3)),
        st.builds(
            lambda c: {"$defs": {"node": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}, c]}},
                       "$ref": "#/$defs/node"},
            scalars(),
        ),
    )  # fmt: skip


def closed(value: Any) -> Any:
    """Definitions stand at the top: a nested $ref is moved there under a name of its own."""
    defs: dict[str, Any] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, list):
            return [walk(p) for p in part]
        if not isinstance(part, dict):
            return part
        if "$defs" in part:
            name = f"node{len(defs)}"
            defs[name] = None
            defs[name] = json.loads(json.dumps(part["$defs"]["node"]).replace("#/$defs/node", f"#/$defs/{name}"))
            return {"$ref": f"#/$defs/{name}"}
        return {key: walk(v) for key, v in part.items()}

    made = walk(value)
    return {**made, "$defs": defs} if defs else made


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.lists(st.recursive(scalars(), nested, max_leaves=8).map(closed), min_size=8, max_size=8))
def test_random_schemas_hold_for_all_that_stops(
    base: BaseModel, closers: dict[int, float], library: str, schemas: list[dict[str, Any]]
) -> None:
    """8 schemas x 10: all that compile are kept to the letter."""
    sampler = make_sampler(base, grammar=library)
    asked = [
        request(str(i), [5, 6, 7 + i], max_tokens=250, seed=i, stop_tokens=[EOS], grammar=schema(one), logit_bias=closers)
        for i, one in enumerate(schemas)
    ]
    answers = answer_all(sampler, *asked)
    ends = [answer.sequences[0].stop_reason for answer in answers.values() if isinstance(answer, SampleResult)]
    assert library == "xgrammar" or ends.count("stop") >= len(schemas) // 2, "hardly anything is tested"  # the other one refuses many
    for i, one in enumerate(schemas):
        answer = answers[str(i)]
        if isinstance(answer, Failed):
            assert any(why in answer.message for why in ("nsatisfiable", "nsupported", "can't follow", "accept any")), (answer.message, one)
            continue
        if answer.sequences[0].stop_reason == "stop":
            text = text_of(base, answer)
            jsonschema.Draft202012Validator(one, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
