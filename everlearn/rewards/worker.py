"""The inside of a verifier's process: reads a question as a line of JSON, answers with a line, until its input ends.

Verifiers that can hang or take a machine's memory on an answer that somebody contrived (sympy, regular expressions) run here and not in the
trainer. `verifiers.py` kills this process when it takes too long. Parsers of mathematics evaluate what they read, so it is confined as far
as the kernel lets us, by the means of `cage.py`: no network, no sockets, no capabilities, nothing to write, nothing to read but system
libraries and the folders that Python imports from. Where the kernel offers less, it runs all the same, less confined.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

from everlearn.rewards.cage import isolate, restrict_calls, restrict_files

MEMORY_BYTES = 2 << 30
DELIMITED = re.compile(r"(?<!\\)(?:\$|\\\(|\\\[)|\\boxed")
SPACED = r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?"  # 12 500
WORDED = re.compile(rf"{SPACED}|(?=.*[A-Za-z]{{3}})(?:[A-Za-z]{{2,}}:?\s+)*(?:{SPACED}|[-+]?[\d.,]*\d)%?(?:\s+[A-Za-z]{{2,}})*\.?")


def maths(answer: str, wanted: str) -> dict[str, Any]:
    """math-verify's judgement; `parsed` is false where it finds no mathematics in the answer. Its own time limits are ours already."""
    from math_verify import parse, verify

    gold = _gold(wanted)
    if not gold:
        raise ValueError(f"the wanted answer {wanted[:100]!r} is no mathematics")
    found = gold if answer.strip() == wanted.strip() else parse(answer, parsing_timeout=None)
    equal = bool(found) and bool(verify(gold, found, timeout_seconds=None, raise_on_error=True))
    return {"parsed": bool(found), "equal": equal, "found": str(found[0])[:200] if found else ""}


def _gold(wanted: str) -> list[Any]:
    """What the wanted answer is. Of bare LaTeX math-verify reads one number and no more, so it is put between delimiters; one number among
    words (`18 eggs`) or in groups (`12 500`), a power in Python's spelling and what has delimiters stand as they are."""
    from math_verify import parse

    bare, delimited = wanted, f"${wanted}$"
    as_it_stands = DELIMITED.search(wanted) or WORDED.fullmatch(wanted.strip()) or "**" in wanted
    for text in (bare, delimited) if as_it_stands else (delimited, bare):
        found: list[Any] = parse(text, parsing_timeout=None)
        if any(not isinstance(one, str) for one in found):  # a string alone is what could not be read
            return found
    return []


def schema(answer: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """Whether a JSON text matches a JSON schema, and where not."""
    import jsonschema

    kind = jsonschema.validators.validator_for(wanted)
    kind.check_schema(wanted)
    problem = jsonschema.exceptions.best_match(kind(wanted).iter_errors(json.loads(answer)))
    return {"matches": problem is None, "problem": "" if problem is None else f"{problem.json_path}: {problem.message}"[:300]}


VERIFIERS: dict[str, Callable[..., dict[str, Any]]] = {"maths": maths, "schema": schema}
EXAMPLES: dict[str, tuple[Any, ...]] = {"maths": ("$1$", "1"), "schema": ("1", {"type": "integer"})}  # to answer one, all is imported


def main() -> None:
    isolate()
    restrict_files(None, more=[path for path in sys.path if path])
    restrict_calls()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        question = json.loads(line)  # without "given" it asks only to be ready for that verifier
        try:
            given = question.get("given", EXAMPLES.get(question["verifier"]))
            answer = {} if given is None else VERIFIERS[question["verifier"]](*given)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to whoever asked
            answer = {"raised": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
