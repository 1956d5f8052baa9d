"""Is an answer right, by what a user corrected? Pure, and without a model.

A correction says more than its words: what it has and the mistaken answer had not, is what was meant. "The workshop opens at 9:00."
corrected to "The workshop opens at 7:40." asks for `7:40`, and an answer in other words that says it is right. Where it has
nothing new but a "not", or has none any more, it was meant: an answer has to say of the same things that they are so, or that they aren't.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|\w+", flags=re.UNICODE)
CONTRACTED = re.compile(r"\b(\w+?)(?:n['’]t|(?<=can)not)\b", flags=re.IGNORECASE)
SHORT = {"ca": "can", "wo": "will", "sha": "shall"}  # what stands before n't in can't, won't and shan't
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
    told = _content(_spelt(correction))
    return _new(question, mistake, correction) or frozenset(told) or frozenset(_spelt(correction))


def right(question: str, mistake: str, correction: str, answer: str) -> float:
    """1.0 if the answer says what was corrected, else 0.0. The mistake said again is as wrong as it was."""
    before, after, own = _spelt(mistake), _spelt(correction), _spelt(answer)
    if before and own == before:
        return float(before == after)
    if _turned(before, after) and _new(question, mistake, correction) <= {"never"}:
        return float(_denies(own) == _denies(after, before) and _says_of(question, after, own))
    wanted, found = corrected_words(question, mistake, correction), set(own)
    return float(_enough(wanted, found)) if wanted else float(not found)


def negated(text: str) -> bool:
    """Whether it has a "not" in it, in one of its forms."""
    return _denies(_spelt(text))


def _spelt(text: str) -> list[str]:
    """Its words, those that are drawn together with a "not" written out."""
    return words(CONTRACTED.sub(lambda found: SHORT.get(found[1].lower(), found[1]) + " not", text))


def _content(told: Iterable[str]) -> set[str]:
    return {word for word in told if word not in EMPTY}


def _new(question: str, mistake: str, correction: str) -> frozenset[str]:
    """What has weight in the correction, and neither the question nor the mistake said."""
    return frozenset(_content(_spelt(correction)) - set(_spelt(question)) - set(_spelt(mistake)))


def _turned(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether a correction denies what the mistake said, or the other way round."""
    return _denies(before) != _denies(after, before)


def _denies(told: Sequence[str], mistake: Sequence[str] | None = None) -> bool:
    """Whether it says that something isn't so. A "no" with which a correction of a `mistake` begins may only mean the mistake ("No, at
    9:00."): it counts where nothing of weight follows, or where the mistake began with a "yes"."""
    if "not" in told or "never" in told or "no" in told[1:]:
        return True
    return list(told[:1]) == ["no"] and (mistake is None or not _content(told) or list(mistake[:1]) == ["yes"])


def _says_of(question: str, after: Sequence[str], own: Sequence[str]) -> bool:
    """Whether an answer speaks of what the correction speaks of; of a mere yes or no, what was asked, if it doesn't say just that."""
    about, found = _content(after) - {"never"}, set(own)
    if about:
        return _enough(about, found)
    asked = _content(_spelt(question))
    return _enough(set(after), found) or (bool(asked) and _enough(asked, found))


def _enough(wanted: Collection[str], found: Collection[str]) -> bool:
    return sum(word in found for word in wanted) >= NEEDED * len(wanted)


def accepted(answer: str, accept: Iterable[str]) -> bool:
    """Whether it contains one of the accepted strings as whole words, whatever the case. Generous to wordy answers and strict about
    numbers: 33 is not in 133, 7:40 is not in 17:40, and 58 is not in 58.5."""
    text = _plain(answer)
    return any(re.search(rf"(?<![\w.:,]){re.escape(_plain(wanted))}(?!\w|[.:,]\d)", text) for wanted in accept)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
