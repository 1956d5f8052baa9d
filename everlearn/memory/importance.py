"""Importance: how much is lost with a chunk, from 0 to 1. One function, `Importance.of`, behind which estimators stand.

| name | what it asks | cost |
|---|---|---|
| `recency` | nothing: all chunks are worth the same, and the older go first | none |
| `head` | a logistic regression on a chunk's surface; by hand (`BY_HAND`), or distilled from `counterfactual` | none, or a forward pass |
| `counterfactual` | how much less likely later turns are without the chunk (everlearn/memory/counterfactual.py) | 1 + N forward passes |
| `decided`, `certain` | the policy itself, in words, or how sure it is (everlearn/memory/decide.py) | N short samples |
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.memory.window import Chunk, Window

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NAME = re.compile(r"(?<![.!?:]\s)(?<!^)\b[A-Z][^\W\d_]+")
STOP = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "to",
        "in",
        "and",
        "is",
        "are",
        "was",
        "were",
        "for",
        "on",
        "at",
        "by",
        "with",
        "that",
        "this",
        "it",
        "its",
        "as",
        "from",
        "be",
        "or",
        "which",
        "who",
        "whom",
        "what",
        "when",
        "where",
        "how",
        "why",
        "do",
        "does",
        "did",
        "i",
        "my",
        "me",
        "you",
        "your",
        "he",
        "his",
        "she",
        "her",
        "they",
        "their",
        "them",
        "we",
        "our",
        "have",
        "has",
        "had",
        "about",
        "can",
        "could",
        "would",
        "should",
        "will",
        "not",
        "so",
        "if",
        "than",
        "then",
        "there",
    ]
)
FIRST_PERSON = frozenset(["i", "i'm", "i've", "i'd", "i'll", "my", "mine", "me", "myself", "we", "we're", "we've", "our", "ours", "us"])
LASTING = frozenset(
    [
        "always",
        "never",
        "prefer",
        "prefers",
        "preferred",
        "favourite",
        "favorite",
        "like",
        "likes",
        "love",
        "loves",
        "hate",
        "hates",
        "allergic",
        "name",
        "named",
        "called",
        "born",
        "birthday",
        "live",
        "lives",
        "moved",
        "work",
        "works",
        "married",
        "remember",
        "important",
        "decided",
        "changed",
        "now",
        "instead",
        "password",
        "number",
        "address",
        "deadline",
        "bought",
    ]
)
PHATIC = frozenset(
    [
        "hi",
        "hello",
        "hey",
        "thanks",
        "thank",
        "okay",
        "ok",
        "sure",
        "yes",
        "bye",
        "goodbye",
        "great",
        "welcome",
        "glad",
        "interesting",
        "sounds",
        "well",
        "please",
        "nice",
        "wonderful",
        "hope",
    ]
)
SENTENCES = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
SPLIT_CHARS = 20_000  # of a longer text only so much at its beginning is looked at
MOST_SENTENCES = 200
FEATURES = ("length", "digits", "names", "first_person", "lasting", "phatic", "question", "from_user", "quoted", "rarity", "surprisal")


def split(text: str, ends: re.Pattern[str]) -> list[str]:
    return [piece.strip() for piece in ends.split(text) if piece.strip()]


class Importance(Protocol):
    name: str
    late: bool  # asked again when chunks are about to be masked, because what came later matters; else once, when a chunk enters

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        """The importance of the chunks at `places`, each in 0..1, with sight of all of them. `window`: where they stand or are to stand."""
        ...


class Recency:
    name, late = "recency", False

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        return [0.5] * len(places)


class Head(msgspec.Struct, frozen=True):
    """sigmoid(bias + weights . features). `weights` by name of feature; those left out weigh nothing. `origin`: where they come from."""

    weights: Mapping[str, float]
    bias: float = 0.0
    origin: str = "by hand"

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.weights) - set(FEATURES)):
            raise InvalidRequest(f"the head weighs {unknown[0]!r}; features are {', '.join(FEATURES)}", param="weights")

    def score(self, window: Window, role: str, text: str, surprisal: float = 0.0) -> float:
        """Of one text. `surprisal`: mean of -log p of its tokens (nats), 0 where nobody computed it."""
        return float(self.scores(features(window, role, text, surprisal)[None])[0])

    def scores(self, features_NF: np.ndarray) -> np.ndarray:
        """[N] from [N, len(FEATURES)]."""
        weights_F = np.array([self.weights.get(name, 0.0) for name in FEATURES])
        return 1.0 / (1.0 + np.exp(-np.clip(features_NF @ weights_F + self.bias, -30.0, 30.0)))


BY_HAND = Head(
    {
        "digits": 0.3,
        "names": 0.3,
        "first_person": 0.4,
        "lasting": 0.6,
        "phatic": -0.6,
        "question": -2.0,
        "from_user": 0.8,
        "quoted": 0.2,
        "rarity": 6.0,
    },
    -4.0,
)


class Surface:
    """A head as an estimator: a chunk is worth as much as its best sentence, because the others can go."""

    name, late = "head", False

    def __init__(self, head: Head = BY_HAND):
        if head.weights.get("surprisal"):
            raise InvalidRequest("this head weighs surprisal, which a forward pass must tell; use Surprised", param="head")
        self.head = head

    def of(self, window: Window, chunks: Sequence[Chunk], places: Sequence[int]) -> list[float]:
        return [best(self.head, window, chunks[place].role, chunks[place].text) for place in places]


def best(head: Head, window: Window, role: str, text: str) -> float:
    """The score of the sentence that scores most."""
    return max((head.score(window, role, sentence) for sentence in split(text[:SPLIT_CHARS], SENTENCES)[:MOST_SENTENCES]), default=0.0)


def features(window: Window, role: str, text: str, surprisal: float = 0.0) -> np.ndarray:
    """[len(FEATURES)] of a text's surface, each about 0 to 3."""
    text = text[:20_000]
    words = [word.lower().replace("’", "'") for word in WORD.findall(text)]
    many = max(len(words), 1)

    def said(known: frozenset[str]) -> float:
        return float(np.log1p(sum(word in known for word in words)))

    numbers = sum(any(letter.isdigit() for letter in word) for word in words)
    return np.array(
        [
            np.log1p(many) / 2.0,
            np.log1p(numbers),
            np.log1p(len(NAME.findall(text))),
            said(FIRST_PERSON),
            said(LASTING),
            said(PHATIC),
            text.count("?") / max(1, len(re.findall(r"[.!?]", text))),
            float(role == "user"),
            np.log1p(text.count('"') // 2 + text.count("“")),
            rarity(window.words, text),
            surprisal / 2.0,
        ]
    )


# ---- how many turns held a word ----

BUCKETS = 8192  # words that share one are counted together
MOST_TURNS = 60_000  # then all counts are halved: what was long ago counts less


def counted(words: bytes, text: str) -> bytes:
    """The table after one more turn. Its first number is that of the turns, then one for each bucket of words."""
    table = _table(words).copy()
    table[0] += 1
    for bucket in {_bucket(word) for word in content_words(text[:SPLIT_CHARS])}:
        table[bucket] += 1
    if table[0] >= MOST_TURNS:
        table //= 2
    return table.tobytes()


def rarity(words: bytes, text: str) -> float:
    """0 to 1: the mean of log((1 + T) / (1 + n)) / log(1 + T) over the text's words that carry meaning, where n of the T turns so far held
    the word (the inverse document frequency of Sparck Jones, 1972, with the memory's own turns as documents). 0 for a text without such
    words."""
    table, found = _table(words), content_words(text[:SPLIT_CHARS])
    turns = 1.0 + float(table[0])
    if not found or turns <= 1.0:
        return float(bool(found))
    counts = table[[_bucket(word) for word in found]].astype(np.float64)
    return float(np.mean(np.log(turns / np.minimum(1.0 + counts, turns)) / np.log(turns)))


def content_words(text: str) -> list[str]:
    """The words that carry meaning, in small letters, in order."""
    words = (word.lower().replace("’", "'").removesuffix("'s") for word in WORD.findall(text))
    return [word for word in words if word not in STOP]


def _table(words: bytes) -> np.ndarray:
    return np.frombuffer(words, dtype=np.uint16) if words else np.zeros(1 + BUCKETS, dtype=np.uint16)


def _bucket(word: str) -> int:
    return 1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS


# ---- distillation and files ----


def distilled(features_NF: np.ndarray, targets_N: np.ndarray, ridge: float = 1e-2, origin: str = "distilled") -> Head:
    """A head for targets in 0..1: logistic regression with soft targets and a ridge on the weights (not on the bias), by Newton's method
    (iteratively reweighted least squares; Bishop, Pattern Recognition and Machine Learning, 4.3.3). It is convex, so this is the
    minimum."""
    if features_NF.ndim != 2 or features_NF.shape != (len(targets_N), len(FEATURES)) or len(targets_N) < 2:
        raise InvalidRequest(f"features must be [N, {len(FEATURES)}] for N >= 2 targets; they are {features_NF.shape}", param="features")
    if not (np.all(targets_N >= 0) and np.all(targets_N <= 1)):
        raise InvalidRequest("targets must lie in 0..1", param="targets")
    inputs_NG = np.hstack([features_NF, np.ones((len(targets_N), 1))])
    penalty_G = np.full(inputs_NG.shape[1], ridge * len(targets_N))
    penalty_G[-1] = 1e-9
    weights_G = np.zeros(inputs_NG.shape[1])
    for _ in range(30):
        predicted_N = 1.0 / (1.0 + np.exp(-np.clip(inputs_NG @ weights_G, -30, 30)))
        gradient_G = inputs_NG.T @ (predicted_N - targets_N) + penalty_G * weights_G
        hessian_GG = (inputs_NG * (predicted_N * (1 - predicted_N) + 1e-9)[:, None]).T @ inputs_NG + np.diag(penalty_G)
        step_G = np.linalg.solve(hessian_GG, gradient_G)
        weights_G -= step_G
        if np.abs(step_G).max() < 1e-9:
            break
    return Head({name: float(weight) for name, weight in zip(FEATURES, weights_G, strict=False)}, float(weights_G[-1]), origin)


def save(head: Head, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(head)) + b"\n")


def load(path: Path) -> Head:
    """Raises InvalidRequest for a file that holds no head."""
    try:
        return msgspec.convert(json.loads(path.read_bytes()), Head)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise InvalidRequest(f"{path} holds no head ({error}); write one with everlearn.memory.importance.save", param="head") from None
