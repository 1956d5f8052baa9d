"""Stop strings: the text of a sequence, one token at a time.

A token is not a piece of text: a character may span tokens, and decoders merge spaces across them. So the text that a token adds is
what differs between two decodes of a short window, and a window that ends inside a character waits for the rest of it. A character
belongs to the token that completes it, also where it began in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

BROKEN = "\ufffd"
# Bytes that never become a character (a model may emit them) are given up on after this many tokens.
MAX_PENDING = 8


class StopStrings:
    """Watches one sequence. `context` are the last prompt tokens: they decide whether the first token starts with a space."""

    def __init__(self, tokenizer: Tokenizer, strings: list[str], context: Sequence[int]):
        self.tokenizer, self.strings = tokenizer, strings
        self.keep = max(len(s) for s in strings) - 1
        self.window = list(context)
        self.known_text = self._decode(self.window)
        self.num_pending = 0
        self.tail = ""

    def add(self, token: int) -> bool:
        """True when the text that ends with this token holds a stop string."""
        self.window.append(token)
        self.num_pending += 1
        text = self._decode(self.window)
        # Half a character, known before, may have become a whole one.
        known = self.known_text if text.startswith(self.known_text) else self.known_text.rstrip(BROKEN)
        fresh = text[len(known) :]
        seen = self.tail + fresh
        if any(s in seen for s in self.strings):
            return True
        if not text.endswith(BROKEN) or self.num_pending >= MAX_PENDING:
            self.tail = seen[-self.keep :] if self.keep else ""
            self.window = self.window[-self.num_pending :]
            self.known_text = self._decode(self.window)
            self.num_pending = 0
        return False

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)
