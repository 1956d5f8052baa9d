"""What the retained-ability suite asks: instructions, questions and texts, from this package and from folders of the user's own.

A folder holds files of two kinds, told apart by what is in them: `.jsonl`, whose rows are instructions in IFEval's form (`prompt`,
`instruction_id_list`, `kwargs`) or questions (`question`, `answer`), and `.txt`, texts in paragraphs. Reading and grading are pure; neither
a model nor a network here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from everlearn.errors import InvalidRequest, NotFound
from everlearn.evals import instructions, safety
from everlearn.evals.safety import Probe
from everlearn.rewards.rules import read_number

OURS = Path(__file__).parent / "suite"
PIECE = 400  # characters of a piece of text, at most, but for a paragraph that is longer; one piece is one unit
LONGEST_PIECE = 4000
SHORT_PIECE = 20
GRADED = 2000  # characters of an answer that are looked at for the words that were wanted
# What stands before and behind a number's text that is no part of another number (3.7, 7/8, 1,7, -7); 7.0 is 7, and dates have three.
BEFORE_DIGIT = r"(?:(?<![0-9][.,/])|(?<=[0-9][./][0-9][./])|(?<=[0-9][./][0-9][0-9][./]))(?<!(?<![\w%)])-)"
BEHIND_DIGIT = r"(?:(?![,/][0-9]|\.0*[1-9])|(?=([./])[0-9]{1,2}\1[0-9]))"


class Instructed(msgspec.Struct, frozen=True):
    """One prompt with instructions: (name, parameters)."""

    id: str
    prompt: str
    checks: list[tuple[str, dict[str, Any]]]

    def followed(self, answer: str) -> list[bool]:
        return [instructions.follows(answer, name, parameters) for name, parameters in self.checks]


class Question(msgspec.Struct, frozen=True):
    """Right is an answer that holds one of `answers` as whole words and whole numbers; with `number`, one whose last number is that."""

    id: str
    question: str
    answers: list[str]
    number: bool = False

    def right(self, answer: str) -> bool:
        if self.number:
            found = read_number(answer, anywhere=True)
            return found is not None and found == read_number(self.answers[0])
        text = answer[:GRADED].casefold().replace("\u2212", "-")
        return any(_pattern(one.casefold().replace("\u2212", "-")).search(text) for one in self.answers)


def _pattern(wanted: str) -> re.Pattern[str]:
    before = BEFORE_DIGIT if wanted[:1].isdigit() else ""
    behind = BEHIND_DIGIT if wanted[-1:].isdigit() else ""
    return re.compile(rf"(?<!\w){before}{re.escape(wanted)}(?!\w){behind}")


class Piece(msgspec.Struct, frozen=True):
    id: str
    text: str


class Set(msgspec.Struct, frozen=True):
    """The rows of one file, all of one kind; `left_out` could not be judged here (a language, without the package that tells them)."""

    name: str
    rows: list[Instructed] | list[Question] | list[Piece] | list[Probe]
    left_out: int = 0


class Suite(msgspec.Struct, frozen=True):
    """All sets, and how many tokens an answer to an instruction and to a question may have."""

    sets: list[Set]
    instruction_tokens: int = 256
    question_tokens: int = 64

    @property
    def digest(self) -> str:
        """Of all that is asked and how: results of another digest are of another suite."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()

    @property
    def num_units(self) -> int:
        return sum(len(one.rows) for one in self.sets)


def probes() -> Suite:
    """The probes of everlearn/evals/safety.py, a set for each kind; an answer has `question_tokens`."""
    rows = safety.load()
    return Suite([Set(kind, [row for row in rows if row.kind == kind]) for kind in safety.KINDS], question_tokens=safety.TOKENS)


def read_suite(
    folders: Sequence[Path] = (), ours: bool = True, limit: int | None = None, instruction_tokens: int = 256, question_tokens: int = 64
) -> Suite:
    """The suite of this package (`ours`) and of the folders. `limit` keeps so many units of each file, always the same ones.

    Raises NotFound for a folder without such files, InvalidRequest for a row that is none, and where nothing is left to ask.
    """
    files = [(path, "") for path in sorted(OURS.iterdir())] if ours else []
    for folder in folders:
        found = sorted(path for path in folder.glob("*") if path.suffix in (".jsonl", ".txt")) if folder.is_dir() else []
        if not found:
            raise NotFound(f"{folder} holds neither .jsonl nor .txt files; docs/guides/retained.md says what may be in it", param="data")
        files += [(path, f"{folder.resolve().name}/") for path in found]
    sets = [_kept(_read(path, prefix + path.stem), limit) for path, prefix in files]
    names = [one.name for one in sets]
    if not sets or len(set(names)) < len(names):
        raise InvalidRequest(f"there is nothing to ask, or two files of one name ({', '.join(names)}); rename one", param="data")
    return Suite(sets, instruction_tokens, question_tokens)


def _read(path: Path, name: str) -> Set:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return Set(name, [Piece(f"{name}:{number}", piece) for number, piece in enumerate(pieces(text))])
    rows = [_row(path, number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if len({type(row) for row in rows}) > 1:
        raise InvalidRequest(f"{path} mixes questions with instructions; put them into two files", param="data")
    if rows and isinstance(rows[0], Instructed) and not instructions.can_tell_languages():
        judged = [row for row in rows if isinstance(row, Instructed) and all(check[0] != instructions.LANGUAGE for check in row.checks)]
        return Set(name, judged, len(rows) - len(judged))
    return Set(name, rows)  # type: ignore[arg-type]


def _row(path: Path, number: int, line: str) -> Instructed | Question:
    try:
        row = json.loads(line)
        key = str(row.get("key", number))
        if "instruction_id_list" in row:
            checks = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
            found = Instructed(key, row["prompt"], [(name, dict(parameters)) for name, parameters in checks])
            _try(found)
            return msgspec.convert(msgspec.to_builtins(found), Instructed)
        answer = row["answer"]
        if isinstance(answer, str) and "####" in answer:  # as GSM8K has it: the way there, and then the number
            return Question(key, row["question"], [_gold(answer.rpartition("####")[2])], number=True)
        question = Question(key, row["question"], answer if isinstance(answer, list) else [str(answer)])
        return msgspec.convert(msgspec.to_builtins(question), Question)
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise InvalidRequest(
            f"{path}, line {number} is neither an instruction (prompt, instruction_id_list, kwargs) nor a question (question, answer): "
            f"{error}; correct it or take it out",
            param="data",
        ) from None


def _gold(text: str) -> str:
    """A number's text without signs of currency and percent. Raises ValueError where it is no number: no answer could ever be right."""
    found = text.strip().strip("$\u20ac\u00a3%").strip()
    if read_number(found) is None:
        raise ValueError(f"{text.strip()[:100]!r} behind #### is no number")
    return found


def _try(row: Instructed) -> None:
    """Raises InvalidRequest for a check that isn't known or lacks parameters: better now than after an hour of answers."""
    for name, parameters in row.checks:
        if name != instructions.LANGUAGE:
            instructions.follows("x", name, parameters)


def pieces(text: str) -> list[str]:
    """Paragraphs, put together to pieces of at most PIECE characters; what is longer than LONGEST_PIECE is cut at a space. A last word by
    itself belongs to the piece before: one token alone can't be scored."""
    found = list(_pieces(text))
    if len(found) > 1 and len(found[-1]) < SHORT_PIECE:
        last = found.pop()
        found[-1] += f"\n\n{last}"
    return found


def _pieces(text: str) -> Iterator[str]:
    held = ""
    for paragraph in (part.strip() for part in re.split(r"\n\s*\n", text)):
        while len(paragraph) > LONGEST_PIECE:
            cut = paragraph.rfind(" ", 1, LONGEST_PIECE)
            cut = cut if cut > 0 else LONGEST_PIECE
            yield from filter(None, (held, paragraph[:cut]))
            held, paragraph = "", paragraph[cut:].strip()
        if held and len(held) + len(paragraph) > PIECE:
            yield held
            held = ""
        held = f"{held}\n\n{paragraph}" if held and paragraph else held or paragraph
    if held:
        yield held


def _kept(one: Set, limit: int | None) -> Set:
    """`limit` rows, chosen by the digests of their ids, in their old order."""
    if limit is None or len(one.rows) <= limit:
        return one
    chosen = set(sorted((row.id for row in one.rows), key=lambda key: hashlib.blake2b(key.encode(), digest_size=8).digest())[:limit])
    rows: Any = [row for row in one.rows if row.id in chosen]
    return msgspec.structs.replace(one, rows=rows)
