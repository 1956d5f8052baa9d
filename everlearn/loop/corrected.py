"""Is an answer right, by what a user corrected? Pure, and without a model.

A correction says more than its words: what it has and the mistaken answer had not, is what was meant. "The workshop opens at 9:00."
corrected to "The workshop opens at 7:40." asks for `7:40`, and an answer in other words that says it is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|\w+", flags=re.UNICODE)
NEEDED = 0.8  # of the words that were corrected in
# Words that carry nothing: a correction that differs by these alone is one of style.
EMPTY = frozenset({
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "it", "its", "this", "that", "these", "those", "and", "or", "of",
    "to", "in", "on", "at", "by", "for", "with", "from", "as", "do", "does", "did", "has", "have", "had", "he", "she", "they",
    "we", "you", "i", "there", "here", "not", "no", "yes", "so", "but", "if", "then", "than", "will", "would", "can", "could",
    "may", "might", "must", "should",
})  # fmt: skip


def words(text: str) -> list[str]:
    """Words and numbers in small letters; 7:40 and 3.5 are one word."""
    return [word.lower() for word in WORD.findall(text)]


def corrected_words(question: str, mistake: str, correction: str) -> frozenset[str]:
    """What the correction says that neither the question nor the mistaken answer did, empty words left out; where that is nothing, all that
    it says."""
    said = set(words(question)) | set(words(mistake))
    told = [word for word in words(correction) if word not in EMPTY]
    return frozenset(word for word in told if word not in said) or frozenset(told) or frozenset(words(correction))


def right(question: str, mistake: str, correction: str, answer: str) -> float:
    """1.0 if the answer says what was corrected, else 0.0."""
    wanted = corrected_words(question, mistake, correction)
    found = set(words(answer))
    if not wanted:
        return float(not found)
    return float(sum(word in found for word in wanted) >= NEEDED * len(wanted))


def accepted(answer: str, accept: Iterable[str]) -> bool:
    """Whether it contains one of the accepted strings as whole words, whatever the case. Generous to wordy answers and strict about
    numbers: 33 is not in 133, 7:40 is not in 17:40, and 58 is not in 58.5."""
    text = _plain(answer)
    return any(re.search(rf"(?<![\w.:,]){re.escape(_plain(wanted))}(?!\w|[.:,]\d)", text) for wanted in accept)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
