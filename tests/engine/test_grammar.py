"""Compiling what clients send: hostile sources end as errors in bounded time, the cache is bounded, tenants take turns."""

from __future__ import annotations

import contextlib
import json
import math
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everlearn.engine.grammar import HELD_SECONDS, KEPT_BYTES, KEPT_SECONDS, MAX_SOURCE, THREADS, Compilation, Grammars
from everlearn.engine.matching import PARAM
from everlearn.errors import EverlearnError, InvalidRequest, TooLarge, Unavailable
from everlearn.models.load import BaseModel
from everlearn.types import Grammar
from tests.engine.harness import load_tiny


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_tiny(tiny_model)


def until(grammars: Grammars, done: Callable[[], bool], seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < give_up, "it hangs"
        grammars.tend()
        time.sleep(0.001)


def compiled(grammars: Grammars, grammar: Grammar) -> Compilation:
    made = grammars.compile(grammar, "tenant")
    until(grammars, lambda: made.done)
    return made


def dear(name: str, width: int = 14) -> Grammar:
    """A union of objects with many optional properties: some hundredths of a second."""
    one = [{"type": "object", "properties": {f"{name}{i}_{j}": {"type": "string"} for j in range(30)}} for i in range(width)]
    return Grammar("json_schema", json.dumps({"anyOf": one}))


def slow(number: int) -> Grammar:
    """Some tenths of a second, and in the end an error."""
    return Grammar("lark", f"// {number}\nstart: " + "a? " * 3000 + '\na: "x"')


def chain(kind: str, num: int) -> str:
    """Rules that nest as deep as they are many."""
    names = range(num)
    if kind == "lark":
        return "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in names) + f'\na{num}: "x"'
    if kind == "terminals":
        return "start: A0\n" + "\n".join(f'A{i}: "x" | "y" A{i + 1}' for i in names) + f'\nA{num}: "x"'
    if kind == "ebnf":
        return "root ::= a0\n" + "\n".join(f'a{i} ::= a{i + 1} "z"' for i in names) + f'\na{num} ::= "x"'
    part = {
        "refs": lambda i: {"$ref": f"#/$defs/a{i + 1}"},
        "objects": lambda i: {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]},
        "unions": lambda i: {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"type": "integer"}]},
        "all": lambda i: {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"type": "object"}]},
        "twice": lambda i: {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2},
    }[kind]
    last = {"type": "object"} if kind in ("all", "twice") else {"type": "string"}
    return json.dumps({"$defs": {**{f"a{i}": part(i) for i in names}, f"a{num}": last}, "$ref": "#/$defs/a0"})


DEEP = "[" * 20_000 + '"a"' + "]" * 20_000
HOSTILE = {
    "nested repetition": ("regex", "(a+)+b"),
    "repetition of repetition": ("regex", "((a{1,100}){1,100}){1,100}"),
    "many texts": ("regex", "(.{1,1000}){1,1000}"),
    "states without end": ("regex", "(.*a.{30}|.*b.{31}|.*c.{32})"),
    "optional letters": ("regex", "a?" * 4000),
    "stars": ("regex", "(a*b*)*" * 2000),
    "parentheses": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "classes of characters": ("regex", r"(\p{L}|\p{N}|\w|\W){1,300}" * 20),
    "a long text": ("regex", "a" * MAX_SOURCE["regex"]),
    "brackets": ("lark", "start: " + DEEP),
    "doubling": ("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1} | a{i + 1}" for i in range(60)) + '\na60: "x" | '),
    "doubling terminals": ("lark", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"'),
    "empty parts": ("lark", "start: " + "a? " * 4000 + '\na: "x"'),
    "a loop": ("lark", "start: a\na: b\nb: a"),
    "counting": ("lark", 'start: a{100000}\na: b{100000}\nb: c{100000}\nc: "x"'),
    "complements": ("lark", "start: A\nA: ~(/.*foo.*/ | ~(/.*bar.*/ & ~/.*baz.{40}/))"),
    "a file": ("lark", '%import "/etc/passwd"\nstart: "a"'),
    "chain of rules": ("lark", chain("lark", 6000)),
    "chain of terminals": ("lark", chain("terminals", 5000)),
    "chain of GBNF": ("ebnf", chain("ebnf", 800)),
    "parentheses in GBNF": ("ebnf", "root ::= " + "(" * 8000),
    "lines in GBNF": ("ebnf", "\n" * 16_000),
    "depth": ("json_schema", '{"type":"array","items":' * 3000 + "{}" + "}" * 3000),
    "a reference to itself": ("json_schema", '{"$ref": "#"}'),
    "all of itself": ("json_schema", '{"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}'),
    "products of unions": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(6)]} for i in range(12)]}),
    ),
    "multiples": ("json_schema", '{"allOf": [{"type": "integer", "multipleOf": 99991}, {"type": "integer", "multipleOf": 99989}]}'),
    "a far reference": ("json_schema", '{"$ref": "http://169.254.169.254/latest"}'),
    "a file's reference": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "patterns of names": (
        "json_schema",
        json.dumps({"patternProperties": {f"^.*{chr(97 + i)}.{{{20 + i}}}$": {"type": "string"} for i in range(10)}}),
    ),
    "long strings": ("json_schema", '{"type": "string", "minLength": 100000, "maxLength": 10000000}'),
    **{f"chain of {kind}": ("json_schema", chain(kind, num)) for kind, num in [("refs", 3000), ("objects", 1200), ("unions", 1500), ("all", 1500)]},
    "doubling references": ("json_schema", chain("twice", 1500)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_source_is_an_error_or_cheap(base: BaseModel, name: str) -> None:
    """Whatever it is: an answer within the time limit, and if it compiled, copies of it work. The process lives, which counts most:
    several of these overflow a stack of the usual size."""
    kind, source = HOSTILE[name]
    grammars = Grammars(base, seconds=10.0, kept=4)
    made = compiled(grammars, Grammar(kind, source))  # type: ignore[arg-type]
    if made.matcher is None:
        assert isinstance(made.error, InvalidRequest) and made.error.param == PARAM and len(made.error.message) < 500
        assert "longer than 10 s" not in made.error.message
    else:
        assert made.matcher.copy().error() is None


@pytest.mark.parametrize("seed", range(4))
def test_random_sources_never_take_the_process_with_them(base: BaseModel, seed: int) -> None:
    rng = random.Random(seed)
    grammars = Grammars(base, seconds=10.0, kept=8)
    pieces = ["(", ")", "[", "]", "{", "}", "|", "*", "+", "?", "a", "B", ":", "\n", '"', "\\", "/", "~", "&", "1", ",", ".", "start: ", "root ::= ", "%json ", "<", ">", "é"]  # fmt: skip
    waiting = []
    for i in range(60):
        kind = rng.choice(["regex", "lark", "ebnf", "json_schema"])
        start = {"lark": "start: ", "ebnf": "root ::= ", "json_schema": '{"type": ', "regex": ""}[kind]
        source = start + "".join(rng.choices(pieces, k=rng.randint(1, 60)))
        waiting.append(grammars.compile(Grammar(kind, source), str(i % 3)))  # type: ignore[arg-type]
    until(grammars, lambda: all(made.done for made in waiting))
    assert all(made.matcher is not None or isinstance(made.error, InvalidRequest) for made in waiting)


def test_what_takes_too_long_is_given_up_on_and_nobody_is_stuck_behind_it(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=0.002, kept=100)
    late = [grammars.compile(slow(i), "tenant") for i in range(THREADS)]
    until(grammars, lambda: all(made.done for made in late))
    for made in late:
        assert isinstance(made.error, InvalidRequest) and "engine.grammar_seconds" in made.error.message
    assert grammars.lost == THREADS
    assert grammars.compile(slow(0), "tenant") is late[0]  # and not tried again
    grammars.seconds = 10.0
    assert compiled(grammars, Grammar("regex", "ab")).matcher is not None  # others took their places
    until(grammars, lambda: grammars.lost == 0 and grammars.threads == 0)


def test_when_all_threads_are_busy_for_good_requests_are_told_so(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=0.001, kept=100)
    many = [grammars.compile(slow(i), "tenant") for i in range(40)]
    until(grammars, lambda: all(made.done for made in many))
    busy = [made for made in many if isinstance(made.error, Unavailable)]
    assert busy
    until(grammars, lambda: grammars.lost == 0)
    grammars.seconds = 10.0
    again = compiled(grammars, busy[0].grammar)  # it was not the grammar's fault, so nothing is remembered of it
    assert again is not busy[0] and not isinstance(again.error, Unavailable)


@contextlib.contextmanager
def starved(grammars: Grammars, grammar: Grammar) -> Iterator[Compilation]:
    """Compiles it as on a machine that is busy with other things: once the compiler has begun, its thread doesn't get the interpreter
    back, because nothing in here lets go of it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1_000.0)
    try:
        made = grammars.compile(grammar, "tenant")
        while made.started == math.inf:
            time.sleep(0.0001)
        while not made.done:
            grammars.tend()
        yield made
    finally:
        sys.setswitchinterval(before)


def test_a_grammar_that_was_late_on_a_busy_machine_is_tried_again(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=10.0, kept=100)
    compiled(grammars, Grammar("regex", "warm"))
    grammars.seconds, grammar = 0.3, dear("busy", 40)
    with starved(grammars, grammar) as first:
        assert isinstance(first.error, Unavailable) and "busy" in first.error.message
        again = grammars.compile(grammar, "another")
        assert again is not first and isinstance(again.error, Unavailable), "not twice at a time"
        assert (grammars.lost, len(grammars.late)) == (1, 1)
    grammars.seconds = 60.0
    until(grammars, lambda: not grammars.lost)
    compiles = grammars.compiles
    found = grammars.compile(grammar, "another")
    assert found.done and not isinstance(found.error, Unavailable) and grammars.compiles == compiles, "what its thread found is kept"
    assert not grammars.late


def test_a_grammar_that_takes_too_long_by_itself_is_found_out_on_a_busy_machine_too(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=10.0, kept=100)
    needed = min(compiled(grammars, slow(number)).seconds for number in (98, 99, 100))
    grammars.seconds, grammar = 0.4 * needed, slow(101)  # far from what it needs on any other run
    with starved(grammars, grammar) as first:  # or it is found out before it starves
        assert isinstance(first.error, Unavailable) or "engine.grammar_seconds" in str(first.error)
    until(grammars, lambda: not grammars.late)
    found = grammars.compile(grammar, "another")
    assert isinstance(found.error, InvalidRequest) and "engine.grammar_seconds" in found.error.message
    until(grammars, lambda: not grammars.lost)
    assert grammars.compile(grammar, "another") is found


def test_what_is_known_anew_counts_once(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=10.0, kept=4)
    first = compiled(grammars, Grammar("regex", "once|twice"))
    size, seconds = grammars.known_bytes, grammars.known_seconds
    again = grammars._remember(Compilation(first.grammar))  # as a late one that was forgotten and compiled again meanwhile
    assert grammars.known_bytes == size and grammars.known_seconds == pytest.approx(seconds - first.seconds)
    grammars._forget(again)
    assert not grammars.known and grammars.known_bytes == 0 and grammars.known_seconds == pytest.approx(0.0)


def test_a_thread_that_the_system_refuses_costs_the_request_that_it_was_for(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, size = Grammars(base, seconds=10.0, kept=4), threading.stack_size()

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        first = grammars.compile(Grammar("json_object"), "a")
        assert isinstance(first.error, Unavailable) and "no thread for compiling the json_object" in first.error.message
        waiting = Compilation(Grammar("regex", "a+"))
        grammars._remember(waiting)
        grammars.queue.append("a", waiting)
        grammars.tend()
        assert isinstance(waiting.error, Unavailable)
    assert threading.stack_size() == size and not grammars.threads and not grammars.compiling and not grammars.known
    assert compiled(grammars, Grammar("json_object")).matcher is not None


def test_equal_grammars_are_compiled_once(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=10.0, kept=4)
    made = [grammars.compile(Grammar("json_object"), tenant) for tenant in "abcabc"]
    until(grammars, lambda: all(m.done for m in made))
    assert len({id(m) for m in made}) == 1 and grammars.compiles == 1
    assert compiled(grammars, Grammar("json_object")) is made[0]


def test_the_cache_is_bounded_in_number_and_bytes(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=10.0, kept=5)
    first = compiled(grammars, Grammar("regex", "first"))
    for i in range(4):
        compiled(grammars, Grammar("regex", f"x{i}"))
        assert compiled(grammars, Grammar("regex", "first")) is first  # used, so kept
    for i in range(5):
        compiled(grammars, Grammar("regex", f"y{i}"))
    assert len(grammars.known) == 5
    assert compiled(grammars, Grammar("regex", "first")) is not first
    grammars = Grammars(base, seconds=10.0, kept=1000)
    filler = "z" * (MAX_SOURCE["regex"] - 10)
    for i in range(3 * KEPT_BYTES // len(filler)):
        grammars._forget(grammars.compile(Grammar("regex", f"({i}"), "t"))
        with grammars.lock:
            made = Compilation(Grammar("json_schema", f"{i}{filler}"))
            made.error = InvalidRequest("made up")
            grammars.known[made.grammar] = made
            grammars.known_bytes += len(made.grammar.source)
        grammars.compile(Grammar("regex", f"[{i}"), "t")
        assert grammars.known_bytes <= KEPT_BYTES
    assert grammars.known_bytes == sum(len(grammar.source) for grammar in grammars.known)
    until(grammars, lambda: not grammars.queue and not grammars.threads)


def test_who_holds_much_memory_waits_until_some_is_free(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=60.0, kept=2)
    first = compiled(grammars, Grammar("regex", "held"))
    with grammars.lock:
        grammars.held["tenant"] += 2 * HELD_SECONDS
        weakref.finalize(first, grammars.released.append, ("tenant", 2 * HELD_SECONDS))
    waits = grammars.compile(Grammar("regex", "waits"), "tenant")
    for i in range(3):  # others go on, and the cache lets go of the first
        other = grammars.compile(Grammar("regex", f"other{i}"), "other")
        until(grammars, lambda other=other: other.done)
    assert not waits.done and grammars.threads == 0
    assert grammars.known.get(first.grammar) is None
    del first
    until(grammars, lambda: waits.done)
    assert set(grammars.held) <= {"tenant", "other"}


def test_dear_grammars_are_kept_in_small_numbers(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=60.0, kept=1000)
    for i in range(12):
        with grammars.lock:
            made = grammars.known[Grammar("regex", str(i))] = Compilation(Grammar("regex", str(i)))
            grammars.known_bytes += len(made.grammar.source)
            made.seconds = 1.0
            grammars._count("t", made)
    assert len(grammars.known) == KEPT_SECONDS
    assert compiled(grammars, Grammar("regex", "cheap")).matcher is not None
    assert 0 < grammars.known_seconds <= KEPT_SECONDS


def test_tenants_take_turns_at_the_compiler(base: BaseModel) -> None:
    grammars = Grammars(base, seconds=20.0, kept=100)
    with grammars.compiler_lock:  # nothing is compiled before all have asked
        flood = [grammars.compile(dear(f"c{i}"), "flood") for i in range(10)]
        calm = grammars.compile(Grammar("regex", "[a-z]{5}"), "calm")
    until(grammars, lambda: calm.done and all(made.done for made in flood))
    assert sum(made.started < calm.started for made in flood) <= 2 * THREADS


@pytest.mark.parametrize("kind", ["json_schema", "lark", "regex", "ebnf"])
def test_a_source_has_a_largest_size(base: BaseModel, kind: str) -> None:
    with pytest.raises(TooLarge) as refused:
        Grammars(base, seconds=5.0, kept=4).compile(Grammar(kind, "a" * (MAX_SOURCE[kind] + 1)), "t")  # type: ignore[arg-type]
    assert refused.value.param == PARAM


def test_every_error_is_one_of_ours(base: BaseModel) -> None:
    made = compiled(Grammars(base, seconds=5.0, kept=4), Grammar("json_schema", '{"x": '))
    assert isinstance(made.error, EverlearnError) and made.error.code == "invalid_request"


@pytest.mark.parametrize("compiles", [True, False])
def test_a_thread_that_still_compiles_isn_t_waited_for_when_the_engine_ends(compiles: bool) -> None:
    """Nor is the interpreter taken apart around it: xgrammar's code, coming back into that, ends the process with an abort."""
    program = f"""
import atexit, threading, time
from everlearn.engine import grammar, main
atexit.register(print, "taken apart")
threading.Thread(target=time.sleep, args=(60 * {compiles},), name=grammar.THREAD_NAME, daemon=True).start()
time.sleep(0.2)
print("ends")
main.end()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split("\n")[:-1]) == (0, ["ends"] if compiles else ["ends", "taken apart"]), ended.stderr
