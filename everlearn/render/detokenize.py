"""Text of a token stream: what can be shown now, never half a character and never a part of a stop string.

One `TextStream` follows one sequence. Its texts, joined, are what decoding all its tokens at once gives, cut before the first stop
string. A stop string that ends first wins, so the cut doesn't depend on how the tokens arrived.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence

from everlearn.render.tokenizer import ChatTokenizer


class TextStream:
    """`keep` are special tokens that show although `skip_special` is set (the marks of tool calls, for their parser). `continues`
    says that the text goes on after other text, so a leading space of the first token stays."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        stop_strings: Sequence[str] = (),
        skip_special: bool = True,
        *,
        keep: Collection[int] = (),
        continues: bool = False,
    ):
        self.tokenizer = tokenizer
        self.stop_strings = [stop for stop in stop_strings if stop]
        self.stopped: str | None = None
        self.offsets: list[int] = []  # of every token added: the character of the text at which it begins
        self._skipped = tokenizer.special_ids - frozenset(keep) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._longest = max((len(stop) for stop in self.stop_strings), default=0)
        self._held = ""  # the end of the text that may be the beginning of a stop string
        self._num_chars = 0
        self._strip = tokenizer.strips_first_space and not continues

    def add(self, ids: Iterable[int]) -> str:
        """The text that may be shown now; "" while nothing new is safe, and after a stop string."""
        pieces = []
        for number in ids:
            self.offsets.append(self._num_chars)
            if number in self._skipped:
                continue
            data = self.tokenizer.token_bytes(number)
            if self._strip and data:
                data, self._strip = data.removeprefix(b" "), False
            text = self._decoder.decode(data)
            self._num_chars += len(text)
            pieces.append(text)
        return self._release("".join(pieces))

    def finish(self) -> str:
        """What was held back: the sequence has ended. An unfinished character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest if self.stopped is None else text

    def _release(self, fresh: str) -> str:
        if self.stopped is not None:
            return ""
        if not self.stop_strings:
            return fresh
        text = self._held + fresh
        ends = [(place + len(stop), place, stop) for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        if ends:
            _, place, self.stopped = min(ends)
            self._held = ""
            return text[:place]
        safe = self._safe_length(text)
        self._held = text[safe:]
        return text[:safe]

    def _safe_length(self, text: str) -> int:
        """How much of `text` can't be the beginning of a stop string."""
        safe = len(text)
        first = max(0, len(text) - self._longest + 1)
        for stop in self.stop_strings:
            place = text.find(stop[0], max(first, len(text) - len(stop) + 1))
            while 0 <= place < safe:
                if text.endswith(stop[: len(text) - place]):
                    safe = place
                    break
                place = text.find(stop[0], place + 1)
        return safe
