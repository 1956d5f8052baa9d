"""Rewards that a rule decides. Each is one named part with its reason; add them, weigh them, sum them.

A wrong answer earns 0 and is a judgement. A verifier that hangs or raises is none: it raises VerifierFailed, and the episode fails.
Answers that somebody contrived (endless code, a number with a million digits) can only cost their own episode.
"""

from __future__ import annotations

import importlib.util
import json
import math
import numbers
import re
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.rewards.reward import Part
from everlearn.rewards.sandbox import SandboxLimits, run_code
from everlearn.rewards.verifiers import Verifiers

# Nothing is given back once it is taken (?+, ++, *+): a text of n characters costs n steps from each place where a number may begin.
SIGN = r"(?:(?<![\w%)])[-+])?+"  # behind these it is a dash: 3-4, 2024-11-25, 10%-20%
NUMBER = re.compile(
    rf"{SIGN}(?:[0-9]{{1,3}}+(?:,[0-9]{{3}})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]{{1,3}})?+|{SIGN}\.[0-9]++"
)
FRACTION = re.compile(rf"({NUMBER.pattern})\s*+/\s*+({NUMBER.pattern})")
CUT_OFF = re.compile(r"[-+0-9.,eE/\s]*+", re.ASCII)  # what may belong to a number that began before
LANGUAGE = re.compile(r"[\w+-]*[ \t\r]*")
MAX_ANSWER = 100_000  # characters; a longer one is wrong, unread
MAX_TAIL = 1000  # characters from the end, in which the last number is looked for
MAX_DIGITS = 400  # of a number; Python takes quadratic time to read them


# ---- text ----


def exact(answer: str, wanted: str, weight: float = 1.0, ignore_case: bool = False) -> Part:
    """`exact`: weight if both are the same but for white space at the ends."""
    one, other = answer.strip(), wanted.strip()
    same = one.casefold() == other.casefold() if ignore_case else one == other
    return Part("exact", weight * same, f"{_short(one)} {'is' if same else 'is not'} {_short(other)}")


def number(answer: str, wanted: float | Fraction, weight: float = 1.0, tolerance: float = 0.0, anywhere: bool = False) -> Part:
    """`number`: weight if the answer is that number, within `tolerance`; compared as fractions, so 0.1 is 1/10.

    The answer is a number and nothing else, or with `anywhere` the last number in its last 1000 characters. 1,234.5 and 1e3 and 3/4
    are numbers. A hyphen behind a letter or a digit is no sign: `3-4 days` ends with 4.
    """
    found = read_number(answer, anywhere)
    if found is None:
        return Part("number", 0.0, f"{_short(answer)} is no number")
    goal = Fraction(str(wanted)) if isinstance(wanted, float) else Fraction(wanted)
    same = abs(found - goal) <= Fraction(str(tolerance))
    return Part("number", weight * same, f"{_short(str(found))} {'is' if same else 'is not'} {_short(str(goal))}")


def read_number(text: str, anywhere: bool = False) -> Fraction | None:
    """The number that a text is, or with `anywhere` the last one in its last 1000 characters; None where there is none."""
    text = text.strip().replace("\u2212", "-")
    if anywhere:
        tail = text[-MAX_TAIL:]
        tail = tail if len(text) <= MAX_TAIL else CUT_OFF.sub("", tail, count=1)
        matches = [match for pattern in (FRACTION, NUMBER) for match in pattern.finditer(tail)]
        found = max(matches, key=lambda match: (match.end(), -match.start()), default=None)
    else:
        found = None if len(text) > MAX_DIGITS else FRACTION.fullmatch(text) or NUMBER.fullmatch(text)
    if found is None or len(found[0]) > MAX_DIGITS:
        return None
    above, _, below = found[0].replace(",", "").replace(" ", "").partition("/")
    try:
        return Fraction(above) / Fraction(below or "1")
    except (ZeroDivisionError, ValueError):
        return None


# ---- JSON ----


async def json_schema(answer: str, schema: dict[str, Any], verifiers: Verifiers, weight: float = 1.0) -> Part:
    """`schema`: weight if the answer is JSON, without anything around it, that matches the schema. Needs the package jsonschema."""
    _needs("jsonschema", "jsonschema")
    if len(answer) > MAX_ANSWER:
        return Part("schema", 0.0, f"{len(answer)} characters; {MAX_ANSWER} are read")
    try:
        json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return Part("schema", 0.0, f"no JSON: {error}"[:300])
    found = await verifiers.ask("schema", answer, schema)
    return Part("schema", weight * bool(found["matches"]), str(found["problem"]) or "matches")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# ---- mathematics ----


async def maths(answer: str, wanted: str, verifiers: Verifiers, weight: float = 1.0) -> Part:
    """`maths`: weight if the answer is mathematically equal to `wanted` (LaTeX or plain), as math-verify judges.

    Needs the package math-verify: `pip install math-verify`.
    """
    _needs("math_verify", "math-verify")
    if len(answer) > MAX_ANSWER:
        return Part("maths", 0.0, f"{len(answer)} characters; {MAX_ANSWER} are read")
    found = await verifiers.ask("maths", answer, wanted)
    if not found["parsed"]:
        return Part("maths", 0.0, f"{_short(answer)} holds no mathematics")
    return Part(
        "maths", weight * bool(found["equal"]), f"{found['found']} {'equals' if found['equal'] else 'does not equal'} {_short(wanted)}"
    )


# ---- code ----


async def code(
    answer: str,
    function: str,
    cases: Sequence[tuple[Sequence[Any], Any]],
    weight: float = 1.0,
    partial: bool = False,
    limits: SandboxLimits | None = None,
) -> Part:
    """`code`: weight if the function in the answer gives the wanted value for every case (arguments, value); `partial`: its share of them.

    The code is the answer's last fenced block, or the answer. It runs in a sandbox, which gets the arguments and never the values that
    are wanted, so that it can't just print them. Code that raises, hangs or ends itself is wrong. Arguments and values go through JSON, so
    keys of dicts become text. Raises InvalidRequest for a wanted value that has no place in JSON.
    """
    wanted = [_through_json(value) for _, value in cases]
    if len(answer) > MAX_ANSWER:
        return Part("code", 0.0, f"{len(answer)} characters; {MAX_ANSWER} are read")
    outcome = await run_code(code_in(answer), [(function, list(arguments)) for arguments, _ in cases], limits=limits)
    right = [_same(result.get("value"), value) for result, value in zip(outcome.results, wanted, strict=False) if "value" in result]
    share = sum(right) / len(cases) if cases else 0.0
    earned = share if partial else float(share == 1.0)
    reason = f"{sum(right)} of {len(cases)} cases"
    errors = [str(result["error"]) for result in outcome.results if "error" in result]
    told = (outcome.message or (errors[0] if errors else "")).encode("utf-8", "replace").decode()  # half a surrogate can't be written
    return Part("code", weight * earned, f"{reason}; {told}"[:500] if told else reason)


def code_in(answer: str) -> str:
    """The last block between lines of fences (```), whatever language it names; the answer itself where there is none.

    A block may be indented, as in a list: its lines lose what all of them are indented by, and it ends at a fence that stands no more than
    three columns to the right of the one that it began with.
    """
    found = answer
    block: list[str] | None = None
    column = 0
    for line in answer.split("\n"):
        if block is None:
            before, fence, language = line.rpartition("```")
            block, column = ([] if fence and LANGUAGE.fullmatch(language) else None), len(before)
        elif line.lstrip(" \t").startswith("```") and line.index("`") <= column + 3:
            text = "".join(f"{one}\n" for one in block)
            found, block = textwrap.dedent(text) if text[:1].isspace() else text, None
        else:
            block.append(line)
    return found


def _through_json(value: Any) -> Any:
    """A wanted value as a function's would come back: keys are text, numbers of other types are int or float."""
    try:
        return json.loads(json.dumps(value, default=_plain, allow_nan=False))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(
            f"cases: the wanted value {_short(repr(value))} can't be equal to what a function gives, which comes back as JSON ({error}); "
            "want numbers, strings, lists and dicts of those",
            param="cases",
        ) from None


def _plain(value: Any) -> int | float:
    if not isinstance(value, numbers.Number):
        raise TypeError(f"{type(value).__name__} is none of its types")
    return int(value) if value == int(value) else float(value)  # type: ignore[call-overload, arg-type]


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, and floats may differ by rounding."""
    try:
        return _equal(one, other)
    except (OverflowError, RecursionError):  # an integer that no float can hold; lists in lists without an end
        return False


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other if isinstance(one, int) and isinstance(other, int) else math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(one, list) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _needs(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unsupported(f"this reward needs the package {package}, which isn't installed: pip install {package}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
