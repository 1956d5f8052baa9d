"""Each rule on answers that are right, wrong and contrived; and verifiers that hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.rewards.reward import Part
from everlearn.rewards.rules import code, code_in, exact, json_schema, maths, number, read_number
from everlearn.rewards.sandbox import SandboxLimits
from everlearn.rewards.verifiers import VerifierFailed, Verifiers


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(processes=1, seconds=5) as started:
        yield started


def test_exact():
    assert exact(" Paris\n", "Paris") == Part("exact", 1.0, "'Paris' is 'Paris'")
    assert exact("paris", "Paris").value == 0.0 and exact("paris", "Paris", 2.0, ignore_case=True).value == 2.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("42", 42), (" -7 ", -7), ("1,234.5", Fraction("1234.5")), ("1e3", 1000), (".5", Fraction(1, 2)), ("3/4", Fraction(3, 4)), ("3 / -4", Fraction(-3, 4)), ("+0.10", Fraction(1, 10))],
)  # fmt: skip
def test_numbers_that_are_read(text: str, value: Fraction):
    assert read_number(text) == value
    assert read_number(f"first 1, then {text}", anywhere=True) == value


@pytest.mark.parametrize("text", ["", "x", "4 2", "42.", "1,23", "1/0", "inf", "nan", "٤٢", "0x10", "9" * 10_000, "--1", "1e9999"])
def test_what_is_no_number(text: str):
    assert read_number(text) is None
    assert number(text, 42).value == 0.0


def test_number():
    assert number("0.1", 0.1).value == 1.0 and number("1/10", 0.1).value == 1.0, "0.1 is a tenth, not its nearest double"
    assert number("3.14", 3.14159).value == 0.0 and number("3.14", 3.14159, tolerance=0.01).value == 1.0
    assert number("The sum is 12, so 12 + 1 = 13", 13).value == 0.0
    assert number("The sum is 12, so 12 + 1 = 13", 13, anywhere=True).value == 1.0


@given(st.integers(-(10**12), 10**12), st.integers(1, 999))
def test_every_spelling_of_a_number_is_that_number(above: int, below: int):
    assert read_number(f"{above:,}") == read_number(str(above)) == above
    assert read_number(f"{above}/{below}") == Fraction(above, below)


@given(st.text(max_size=60))
def test_no_text_breaks_a_rule(text: str):
    assert number(text, 1, anywhere=True).value in (0.0, 1.0) and exact(text, "x").value in (0.0, 1.0)


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("answer", "value", "word"),
    [
        ('{"x": 1}', 1.0, "matches"),
        ('{"x": "1"}', 0.0, "$.x"),
        ('{"y": 1}', 0.0, "'x' is a required"),
        ('here: {"x": 1}', 0.0, "no JSON"),
        ('{"x": NaN}', 0.0, "NaN"),
        ("[" * 90_000, 0.0, "no JSON"),
        ("[" * 200_000, 0.0, "characters"),
    ],
)
def test_json_schema(verifiers: Verifiers, answer: str, value: float, word: str):
    pytest.importorskip("jsonschema")
    part = asyncio.run(json_schema(answer, SCHEMA, verifiers))
    assert part.value == value and (word in part.reason or "Additional" in part.reason)


def test_a_verifier_that_hangs_or_raises_gives_no_score_and_the_next_question_is_answered(verifiers: Verifiers):
    pytest.importorskip("jsonschema")
    slow = {"type": "string", "pattern": "^(a+)+$"}
    with Verifiers(processes=1, seconds=0.7) as hurried:
        assert asyncio.run(json_schema('"aaa"', slow, hurried)).value == 1.0
        started = time.monotonic()
        with pytest.raises(VerifierFailed, match="not over after"):
            asyncio.run(json_schema('"' + "a" * 40 + '!"', slow, hurried))
        assert time.monotonic() - started < 5
        assert asyncio.run(json_schema('"aaa"', slow, hurried)).value == 1.0
    with pytest.raises(VerifierFailed, match="SchemaError"):
        asyncio.run(json_schema("1", {"type": "nonsense"}, verifiers))
    assert asyncio.run(json_schema("1", {"type": "integer"}, verifiers)).value == 1.0
    with pytest.raises(InvalidRequest, match="verify nothing"):
        Verifiers(processes=0)


def test_a_verifier_s_process_is_confined():
    """Through the front door of the process, with a verifier that looks around."""
    import subprocess
    import sys

    probe = (
        "import sys; from everlearn.rewards import worker\n"
        "def look(path):\n"
        "    import socket\n"
        "    try:\n        socket.create_connection(('127.0.0.1', 1), 1)\n"
        "    except OSError as error:\n        network = str(error)\n"
        "    return {'network': network, 'text': open(path).read()}\n"
        "worker.VERIFIERS['look'] = look\nworker.main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", probe], input='{"verifier": "look", "given": ["/etc/passwd"]}\n', capture_output=True, text=True, timeout=60
    )
    if "root:" in ran.stdout:
        pytest.skip("this machine can't confine: no user namespaces, or no Landlock")
    assert "PermissionError" in ran.stdout, ran


@pytest.mark.parametrize(
    ("answer", "wanted", "value"),
    [
        ("$\\frac{1}{2}$", "0.5", 1.0),
        ("The answer is \\boxed{2\\sqrt{3}}.", "\\sqrt{12}", 1.0),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("42", "42", 1.0),
        ("$\\frac{1}{3}$", "0.5", 0.0),
        ("I don't know.", "0.5", 0.0),
        ("x" * 200_000, "0.5", 0.0),
    ],
)
def test_maths(verifiers: Verifiers, answer: str, wanted: str, value: float):
    pytest.importorskip("math_verify")
    assert asyncio.run(maths(answer, wanted, verifiers)).value == value


def test_mathematics_without_an_end_is_no_score():
    pytest.importorskip("math_verify")
    with Verifiers(processes=1, seconds=2) as hurried:
        assert asyncio.run(maths("$1$", "1", hurried)).value == 1.0
        try:
            part = asyncio.run(maths("$9^{9^{9^{9^{9}}}}$", "$9^{9^{9^{9^{8}}}}$", hurried))
        except VerifierFailed:
            pass
        else:
            assert part.value == 0.0
        assert asyncio.run(maths("$1$", "1", hurried)).value == 1.0


GCD = [([12, 18], 6), ([7, 5], 1), ([0, 4], 4)]


def judge(answer: str, **options) -> Part:
    try:
        return asyncio.run(code(answer, "gcd", GCD, **options))
    except Unsupported as error:
        pytest.skip(str(error))


def test_code():
    good = "Here:\n```python\ndef gcd(a, b):\n    return gcd(b, a % b) if b else a\n```\nDone."
    assert judge(good) == Part("code", 1.0, "3 of 3 cases")
    assert judge("def gcd(a, b): return 6") == Part("code", 0.0, "1 of 3 cases")
    assert judge("def gcd(a, b): return 6", partial=True).value == pytest.approx(1 / 3)
    assert code_in("a\n```py\nx = 1\n```\n```\ny = 2\n```\n") == "y = 2\n"


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("no code at all", "SyntaxError"),
        ("def gcd(a, b):\n    raise ValueError('x')", "ValueError"),
        ("def gcd(a, b):\n    while True: pass", "not over"),
        ("import os; os._exit(0)", "ended with status 0"),
        ("raise SystemExit(0)", "KeyError"),
        ("class Same(int):\n    __eq__ = lambda *_: True\ndef gcd(a, b): return Same(0)", "0 of 3"),
        ("def gcd(a, b): return True", "0 of 3"),
        ("def gcd(a, b): return 10 ** 100000", "0 of 3"),
    ],
)
def test_code_that_cheats_or_hangs_is_wrong(answer: str, word: str):
    part = judge(answer, limits=SandboxLimits(seconds=1 if word == "not over" else 20))
    assert part.value == 0.0 and word in part.reason
