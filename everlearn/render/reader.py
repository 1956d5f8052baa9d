"""A reader of text that arrives in pieces, for parsers that are written as if it were all there.

Parsers (`everlearn/render/syntaxes.py`) are generators: they ask the reader for what comes next and wait inside it while it isn't
there. No decision depends on where the pieces were cut. The reader keeps only what nobody has taken, so a piece costs its own length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, str | None, T]
Emit = Callable[[str], None]

# Inside a JSON string nothing but its end, an escape, and a control character (which has no place there) is of interest.
INSIDE, OUTSIDE = r'["\\\x00-\x1f]', r'["{}\[\]]'
SCALAR = re.compile(r"[^\s,\]}<]*")


class BrokenError(Exception):
    """What looked like a call is none; the parser gives its text back as content."""


class Marks:
    """Strings to look for, none of them the beginning of another."""

    def __init__(self, *marks: str):
        either = "|".join(re.escape(mark) for mark in marks)
        self.pattern = re.compile(either)
        self.outside, self.inside = re.compile(f"{OUTSIDE}|{either}"), re.compile(f"{INSIDE}|{either}")
        self.beginnings = {mark[:end] for mark in marks for end in range(1, len(mark))}
        self.longest = max(map(len, marks))

    def held(self, text: str, start: int) -> int:
        """Where the end of `text` may be the beginning of a mark; its length if it isn't."""
        for place in range(max(start, len(text) - self.longest + 1), len(text)):
            if text[place:] in self.beginnings:
                return place
        return len(text)


_IN_STRING = re.compile(INSIDE)


class Reader:
    """Methods that may have to wait are generators. `feed` and `end` are called by whoever has the text."""

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._kept: list[str] | None = None

    def more(self) -> Step[bool]:
        """Waits for the next piece; False when there is none any more."""
        if self.ended:
            return False
        piece = yield
        if piece is None:
            self.ended = True
            return False
        self.text, self.at = self.text[self.at :] + piece, 0
        return True

    def take(self, end: int) -> str:
        """The text up to position `end`, which is then behind the reader."""
        piece = self.text[self.at : end]
        self.at = end
        if self._kept is not None and piece:
            self._kept.append(piece)
        return piece

    def keep(self, first: str) -> None:
        """From here on remembers what is taken, with `first` before it, for the case that it has to be given back."""
        self._kept = [first]

    def forget(self) -> str:
        """Stops remembering; what was remembered."""
        kept, self._kept = "".join(self._kept or []), None
        return kept

    # ---- what comes next ----

    def peek(self) -> Step[str]:
        """The next character, not taken; "" at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def space(self) -> Step[None]:
        """Takes white space."""
        while (yield from self.peek()).isspace():
            end = self.at
            while end < len(self.text) and self.text[end].isspace():
                end += 1
            self.take(end)

    def comes(self, literal: str) -> Step[bool]:
        """Takes `literal` if the text goes on with it."""
        while len(self.text) - self.at < len(literal) and literal.startswith(self.text[self.at :]):
            if not (yield from self.more()):
                return False
        if not self.text.startswith(literal, self.at):
            return False
        self.take(self.at + len(literal))
        return True

    def until(self, marks: Marks, emit: Emit) -> Step[str]:
        """Hands the text before the next mark to `emit` as it comes; takes the mark and returns it, "" at the end of the text."""
        while True:
            found = marks.pattern.search(self.text, self.at)
            end = found.start() if found else len(self.text) if self.ended else marks.held(self.text, self.at)
            if piece := self.take(end):
                emit(piece)
            if found:
                return self.take(found.end())
            if not (yield from self.more()) and self.at >= len(self.text):
                return ""

    def rest(self, emit: Emit) -> Step[None]:
        """Hands all that comes to `emit`."""
        while (yield from self.peek()):
            emit(self.take(len(self.text)))

    # ---- JSON ----

    def string(self, end: Marks) -> Step[str]:
        """A JSON string's value. Raises BrokenError where none comes."""
        if (yield from self.peek()) != '"':
            raise BrokenError("a JSON string was expected")
        pieces: list[str] = []
        if not (yield from self.value(pieces.append, end)):
            raise BrokenError("a JSON string doesn't end")
        try:
            return str(json.loads("".join(pieces), strict=False))
        except ValueError:
            raise BrokenError("a JSON string is broken") from None

    def value(self, emit: Emit, end: Marks, hard: bool = False) -> Step[bool]:
        """Hands a JSON value to `emit` as it comes; False where it is broken: the text ends, or a mark of `end` stands in it.

        Brackets and strings are followed, no more. A mark inside a string is part of the string, unless `hard` says that a mark
        can't be text (it is a special token), or the string is torn: a line break in it shows that its last quote is missing.
        """
        if (yield from self.peek()) not in ("{", "[", '"'):
            return (yield from self._scalar(emit))
        depth, inside, torn, place = 0, False, False, self.at
        while True:
            marked = not inside or hard or torn
            pattern = end.outside if not inside else end.inside if marked else _IN_STRING
            found = pattern.search(self.text, place)
            escape = found is not None and found[0] == "\\"
            if found is None or (escape and found.end() >= len(self.text)):
                stop = found.start() if found else end.held(self.text, place) if marked else len(self.text)
                if piece := self.take(stop):
                    emit(piece)
                if not (yield from self.more()):
                    if rest := self.take(len(self.text)):
                        emit(rest)
                    return False
                place = self.at
                continue
            place = found.end() + escape
            if len(found[0]) > 1:
                emit(self.take(found.start()))
                return False
            if found[0] == '"':
                inside, torn = not inside, False
            elif inside:
                torn = torn or not escape
            else:
                depth += 1 if found[0] in "{[" else -1
            if depth <= 0 and not inside:
                emit(self.take(place))
                return True

    def _scalar(self, emit: Emit) -> Step[bool]:
        """A number, true, false or null; whatever stands there up to a bracket, a comma or white space."""
        while True:
            end = SCALAR.match(self.text, self.at).end()  # type: ignore[union-attr]
            if piece := self.take(end):
                emit(piece)
            if end < len(self.text):
                return True
            if not (yield from self.more()):
                return False
