"""Chains of string operations: a task with exact answers that a model of a few million parameters learns in minutes.

    SL:dbaf=bdfa      sort, then rotate left: abdf, bdfa

A problem is one to three operations, a colon, letters, and an equals sign; the answer ends with a token of its own. The base model
is trained on `COMMON`: single operations, and all pairs but four. The `SHIFTED` task is chains of three, of which it never saw one:
the 13 of 64 that it gets right more than one time in twenty and less than six in ten (drawn at temperature 1, on strings that
aren't held out), so that rewards have something to start from. The pairs that were left out, `UNSEEN`, nobody trains on by
themselves; but adapters, which train on `SHIFTED`, meet two of them inside longer chains: NL in NLN and SNL, SR in SRR. RN and LR
nobody meets.

Letters whose checksum falls in one bucket of eight are held out of all training, so tests see only unseen strings.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghij"
LENGTHS = (4, 5, 6)
OPERATIONS = {
    "R": lambda text: text[::-1],
    "S": lambda text: "".join(sorted(text)),
    "N": lambda text: "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in text),
    "L": lambda text: text[1:] + text[:1],
}
UNSEEN = ("SR", "RN", "NL", "LR")
COMMON = (*OPERATIONS, *(pair for first, second in product(OPERATIONS, repeat=2) if (pair := first + second) not in UNSEEN))
SHIFTED = ("LSL", "LSN", "NLN", "NRL", "RLL", "RLN", "RSL", "RSN", "SLL", "SLN", "SNL", "SNS", "SRR")
TASKS = {"common": COMMON, "shifted": SHIFTED, "unseen": UNSEEN}

END, UNKNOWN = "<|end|>", "?"
VOCABULARY = (END, UNKNOWN, ":", "=", *OPERATIONS, *LETTERS)
END_ID = VOCABULARY.index(END)
# A chat is the problem as the user's message: `SL:dbaf=`.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
HELD_OUT, BUCKETS = 0, 8


class Problem(NamedTuple):
    prompt: str
    answer: str

    @property
    def prompt_ids(self) -> list[int]:
        return [VOCABULARY.index(letter) for letter in self.prompt]

    @property
    def answer_ids(self) -> list[int]:
        """With the end: a model that goes on is wrong."""
        return [*map(VOCABULARY.index, self.answer), END_ID]


def solve(chain: str, letters: str) -> str:
    """The operations in the order in which they're written."""
    return reduce(lambda text, name: OPERATIONS[name](text), chain, letters)


def problems(chains: Sequence[str], num: int, rng: random.Random, held_out: bool = False, length: int | None = None) -> list[Problem]:
    """`num` problems of these chains, drawn evenly. `held_out` says from which side of the split the letters come."""
    found: list[Problem] = []
    while len(found) < num:
        letters = "".join(rng.choices(LETTERS, k=length or rng.choice(LENGTHS)))
        if (zlib.crc32(letters.encode()) % BUCKETS == HELD_OUT) == held_out:
            chain = rng.choice(chains)
            found.append(Problem(f"{chain}:{letters}=", solve(chain, letters)))
    return found


def make_tokenizer() -> Tokenizer:
    """One token for each character: nothing is merged, so the vocabulary is 18 rows and the parameters are elsewhere."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
