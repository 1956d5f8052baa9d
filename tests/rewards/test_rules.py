"""Each rule on answers that are right, wrong and contrived; and verifiers that hang."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

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


def test_the_last_number_is_looked_for_at_the_end():
    assert read_number("12 apples" + " x" * 450, anywhere=True) == 12
    assert read_number("12 apples" + " x" * 600, anywhere=True) is None
    assert read_number("9" * 20 + " y" * 495, anywhere=True) is None, "half of it is no number"
    assert read_number("1,2345", anywhere=True) == 2345


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It takes 3-4 days", 4),
        ("on 2024-11-25", 25),
        ("COVID-19", 19),
        ("no caf\u00e9-5", 5),
        ("10%-20%", 20),
        ("(3)-4", 4),
        ("pages 3-1/2", Fraction(1, 2)),
        ("x=-5", -5),
        ("it is -5.", -5),
        ("$-5$", -5),
        ("(-.5)", Fraction(-1, 2)),
        ("1e-3", Fraction(1, 1000)),
        ("It is \u22125", -5),
        ("-3/-4", Fraction(3, 4)),
    ],
)
def test_a_hyphen_behind_a_word_or_a_number_is_no_sign(text: str, value: Fraction):
    assert read_number(text, anywhere=True) == value


def test_the_minus_of_typesetters_is_a_minus():
    assert read_number("\u22125") == -5 and number("\u22120.5", -0.5).value == 1.0


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "9 " * 50_000, "1,234" * 20_000, "9" + " " * 100_000, "```" * 33_000, "```a\n" * 25_000, "`" * 99_999]
)
def test_long_answers_cost_no_more_than_their_length(text: str):
    """What is quadratic takes from seconds to minutes for these."""
    started = time.process_time()
    read_number(text)
    read_number(text, anywhere=True)
    code_in(text)
    assert time.process_time() - started < 1.0


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


def test_starting_has_a_time_of_its_own():
    """A question gets its seconds and no more, also where the process has to be started for it, or has to import something."""
    pytest.importorskip("jsonschema")
    endless = '"' + "a" * 40 + '!"', {"type": "string", "pattern": "^(a+)+$"}
    with Verifiers(processes=1, seconds=1) as hurried:
        for _ in range(2):
            with pytest.raises(VerifierFailed, match="not over after 1 s"):
                asyncio.run(json_schema(*endless, hurried))
        assert asyncio.run(json_schema("1", {"type": "integer"}, hurried)).value == 1.0
        (worker,) = hurried._alive
        assert worker.ready == {"schema"}
        pytest.importorskip("math_verify")
        assert asyncio.run(maths("$1$", "1", hurried)).value == 1.0
        assert hurried._alive == {worker} and worker.ready == {"schema", "maths"}


def test_a_verifier_s_process_knows_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("jsonschema")
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    with Verifiers(processes=1) as started:
        asyncio.run(json_schema("1", {"type": "integer"}, started))
        (worker,) = started._alive
        assert b"SECRET_OF_THE_TRAINER" not in Path(f"/proc/{worker.process.pid}/environ").read_bytes()


def test_a_verifier_s_process_is_confined(tmp_path: Path):
    """Through the front door of the process, with a verifier that looks around."""
    import subprocess
    import sys

    probe = (
        "import sys; from everlearn.rewards import worker\n"
        "def look(path):\n"
        "    import os, socket\n"
        "    tries = [lambda: socket.socket(socket.AF_UNIX), lambda: os.utime(path), lambda: open(path, 'a'), lambda: open(path)]\n"
        "    said = []\n"
        "    for attempt in tries:\n"
        "        try:\n            attempt()\n            said.append('done')\n"
        "        except OSError as error:\n            said.append(type(error).__name__)\n"
        "    return {'said': said, 'inside': os.getuid()}\n"
        "worker.VERIFIERS['look'] = look\nworker.main()"
    )
    judge("def gcd(a, b): pass")  # skips where nothing can be confined
    looked_at = tmp_path / "file"
    looked_at.touch()
    question = json.dumps({"verifier": "look", "given": [str(looked_at)]})
    ran = subprocess.run([sys.executable, "-c", probe], input=question + "\n", capture_output=True, text=True, timeout=60)
    answer = json.loads(ran.stdout)
    assert answer["said"][0] == answer["said"][1] == "PermissionError" and "done" not in answer["said"], ran


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
        ("$2$", "2\\sqrt{3}", 0.0),
        ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}", 1.0),
        ("2\\sqrt{3}", "2\\sqrt{3}", 1.0),
        ("$3$", "3 + \\sqrt{2}", 0.0),
        ("$\\sqrt{2} + 3$", "3 + \\sqrt{2}", 1.0),
        ("$2$", "2 \\pi", 0.0),
        ("$2\\pi$", "2 \\pi", 1.0),
        ("$x = 5$", "x = 5", 1.0),
        ("5", "x = 5", 1.0),
        ("$y = 5$", "x = 5", 0.0),
        ("$0.1$", "10 \\%", 1.0),
        ("$2$", "1 or 2", 0.0),
        ("$1$ or $2$", "1 or 2", 1.0),
        ("2", "(1, 2)", 0.0),
        ("$(1, 2)$", "(1, 2)", 1.0),
        ("$1024$", "2**10", 1.0),
        ("18", "18 eggs", 1.0),
        ("about $12500$", "12 500 people", 1.0),
        ("$1000$", "1 000", 1.0),
        ("$5$", "\\$5", 1.0),
        ("$5$", "\u20ac5", 1.0),
        ("$2\\sqrt{3}$", "\\(2\\sqrt{3}\\)", 1.0),
        ("$\\frac{1}{2}$", "\\[\\frac{1}{2}\\]", 1.0),
        ("$\\frac{1}{2}$", "It is \\boxed{\\frac{1}{2}}", 1.0),
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
    ("answer", "code"),
    [
        ("1. Do:\n   ```python\n   if x:\n       y()\n   ```\n2. Done.", "if x:\n    y()\n"),
        ("- ```py\n  x = 1\n\n  y = 2\n  ```\n- well", "x = 1\n\ny = 2\n"),
        ("\t```\n\tx = 1\n\t```\nend", "x = 1\n"),
        ("   ```\n   x = 1\n```\nend", "x = 1\n"),
        ("```\nx = 1\n  ```\nend", "x = 1\n"),
        ("```\n    x = 1\n```", "x = 1\n"),
        ("  ```\n  a = 1\n  ```\n```\nb = 2\n```\n", "b = 2\n"),
        ('```\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n    \n```\n', 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    \n'),
    ],
)  # fmt: skip
def test_a_block_may_be_indented(answer: str, code: str):
    assert code_in(answer) == code


def test_wanted_values_are_compared_as_json():
    cases = [([1], {1: 2}), ([True], {True: (2, None)}), ([2], {2: Fraction(1, 2)})]
    answer = "def f(x): return {x: 2 if x == 1 and x is not True else [2, None] if x is True else 0.5}"
    try:
        assert asyncio.run(code(answer, "f", cases)) == Part("code", 1.0, "3 of 3 cases")
        assert asyncio.run(code(answer, "f", [([1], {1: 3})])).value == 0.0
    except Unsupported as error:
        pytest.skip(str(error))
    for wanted in ({1, 2}, {(1, 2): 3}, 1j, float("inf")):
        with pytest.raises(InvalidRequest, match="the wanted value .* comes back as JSON"):
            asyncio.run(code(answer, "f", [([1], wanted)]))


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
        ("def gcd(a, b): return 10 ** 400", "0 of 3"),
        ("def gcd(a, b):\n    raise ValueError('\\ud800')", "ValueError"),
        ("import os\nos._exit(77)", "ended with status 77"),
        ("x" * 200_000, "characters"),
    ],
)
def test_code_that_cheats_or_hangs_is_wrong(answer: str, word: str):
    part = judge(answer, limits=SandboxLimits(seconds=1 if word == "not over" else 20))
    assert part.value == 0.0 and word in part.reason


def test_values_that_no_float_can_hold_are_wrong():
    huge = [([], 0.5), ([], 0.5), ([], 0.5)]
    answer = "def f(): return 10 ** 400"
    try:
        part = asyncio.run(code(answer, "f", huge))
    except Unsupported as error:
        pytest.skip(str(error))
    assert part.value == 0.0 and part.reason == "0 of 3 cases"
    part = asyncio.run(
        code(
            "import os\ndef f():\n    for n in range(3, 64):\n        try: os.write(n, b'{\"value\": ' + b'[' * 900 + b']' * 900 + b'}\\n')\n        except OSError: pass\n    return 0.5",
            "f",
            huge,
            partial=True,
        )
    )
    assert part.value < 1.0, "a value of its own is compared, and wrong"
