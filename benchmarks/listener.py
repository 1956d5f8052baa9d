#!/usr/bin/env python3
"""A language model of under a million parameters that answers questions about what it was told: what memory_train.py begins with.

    python benchmarks/listener.py FOLDER [--seconds 900]                 # on a GPU where there is one
    python benchmarks/listener.py FOLDER --begin OTHER --seconds 1500    # goes on with a model, at its full length and a lower rate

It speaks the language of the synthetic suite and nothing else. It is taught to answer a question from lines that stand before it, to write
a line again in fewer words (which of its sentences stays is drawn), to write notes of a text (which of its sentences is drawn), and to
say keep, compress or drop (drawn as well, half of the time by one of the line's words): so it can do all that a memory asks of a model, and
knows nothing of what is worth keeping. Its histories have seeds of their own. A Qwen3 as transformers defines it, with a token for each
word.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import ROOT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from walker import BEGIN, END, UNKNOWN, saved

sys.path.insert(0, str(ROOT))
from everlearn.memory import asking, methods, orders, synthetic
from everlearn.memory.importance import SENTENCES, split
from everlearn.memory.suites import Case, words_of
from everlearn.memory.window import BLOCK, Window, chunk_of, line, shown

SPACE = "\u2581"  # as SentencePiece spells it: before each word, and before the first digit of a number
FIRST_SEED = 1_000_000  # of histories that it is taught from
RATE, LATER_RATE = 3e-3, 6e-4
CASES, REUSED = 400, 0.8
# Share of the time, facts of a history, most tokens of a row, rows of a batch: from a few lines to more than a window.
STAGES = ((0.25, (1, 3), 96, 32), (0.3, (2, 8), 256, 24), (0.3, (6, 20), 640, 10), (0.15, (12, 30), 1280, 5))
known_words = lru_cache(100_000)(words_of)
Row = tuple[list[int], list[float]]  # tokens, and how much each counts as something to be said


def make_tokenizer() -> Tokenizer:
    """Words, line ends and marks are tokens; digits are single, and spaces are not spelled."""
    cut = pre_tokenizers.Split(Regex(r"\n|[A-Za-z]+(?:-[A-Za-z]+)*|\d+|[^\sA-Za-z\d]"), behavior="removed", invert=True)
    texts = [
        asking.QUESTION,
        asking.NOTHING,
        orders.KEEPING,
        orders.SHORTER,
        methods.SUMMARY,
        methods.NOTES,
        BLOCK,
        "user assistant system",
    ]
    texts += [text for seed in range(60) for _, text in synthetic.synthetic(160, FIRST_SEED - 1 - seed, 35).turns]
    texts += [question.text for seed in range(60) for question in synthetic.synthetic(160, FIRST_SEED - 1 - seed, 35).questions]
    texts += [" ".join([*synthetic.PEOPLE, *synthetic.CITIES, *synthetic.JOBS, *synthetic.KIN, *synthetic.DOORS, *synthetic.PETS])]
    texts += [" ".join([*synthetic.PET_NAMES, *synthetic.THINGS, *(value for values in synthetic.THINGS.values() for value in values)])]
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text) if not word.isdigit()} - {"\n"})
    spelled = [f"{SPACE}{word}" for word in ("\n", *map(str, range(10)))] + [*map(str, range(10))] + [f"{SPACE}{word}" for word in words]
    vocabulary = {word: place for place, word in enumerate([BEGIN, END, UNKNOWN, *spelled])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)])
    marks = [decoders.Replace(f"{SPACE}{mark}", mark) for mark in ".,?!:"]
    tokenizer.decoder = decoders.Sequence([*marks, decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(BEGIN, special=True), AddedToken(END, special=True), AddedToken(UNKNOWN, special=True)])
    return tokenizer


def new_model(size: int, hidden: int = 128, layers: int = 4) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size,
            hidden_size=hidden,
            intermediate_size=5 * hidden // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=hidden // 4,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )


def by_line(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """How this tokenizer spells a text. No token of it spans two lines, and lines come again and again."""
    spelled = lru_cache(100_000)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: [token for part in text.splitlines(keepends=True) for token in spelled(part)]


class Lessons:
    """Rows to learn from, drawn without end. `encode` is to know BEGIN and END as tokens."""

    def __init__(self, encode: Callable[[str], list[int]], rng: random.Random):
        self.encode, self.rng = encode, rng
        self.cases: list[Case] = []  # the last ones: each is used several times, since making one costs more than learning from it

    def row(self, facts: tuple[int, int], most: int) -> Row:
        """Of `facts` facts; at most about `most` tokens."""
        case = self._case(self.rng.randint(*facts))
        kind = self.rng.choices((self._recall, self._line, self._level, self._notes), (0.68, 0.14, 0.12, 0.06))[0]
        tokens, weights = kind(case, most)
        return tokens[:most], weights[:most]

    def _case(self, facts: int) -> Case:
        known = [case for case in self.cases if len(case.questions) == facts]
        if known and self.rng.random() < REUSED:
            return self.rng.choice(known)
        turns = self.rng.choice((4, 4, 6, 10)) * facts
        case = synthetic.synthetic(max(8, turns), FIRST_SEED + self.rng.randrange(10**9), facts)
        self.cases = [*self.cases[-CASES:], case]
        return case

    def _recall(self, case: Case, most: int) -> Row:
        """Lines, then questions about them, each behind the answer to the one before."""
        questions = [question for question in case.questions if question.answers]
        chatter = self.rng.random()
        lines = []
        for role, text in case.turns:
            own = known_words(text)
            evident = any(question.words <= own for question in questions)
            if evident or self.rng.random() < chatter:
                if evident and self.rng.random() < 0.4:  # as an extraction leaves it
                    held = [piece for piece in split(text, SENTENCES) if any(one.words <= known_words(piece) for one in questions)]
                    text = " ".join(held) or text
                lines.append((line(role, text), own))
        lines = self._fitting(lines, int(0.7 * most) - 30)
        known = [question for question in questions if any(question.words <= own for _, own in lines)]
        self.rng.shuffle(known)
        tokens, weights = [], []
        in_chat = self.rng.random() < 0.5  # what a memory holds stands in one order, or in a chat as a server shows it
        if in_chat:
            self._said(tokens, weights, self._chat([text for text, _ in lines]), 0.03)
        for number, question in enumerate(known):
            context = "".join(text for text, _ in lines).strip() + "\n\n" if number == 0 and not in_chat else ""
            asked = asking.QUESTION.format(context="", question=question.text).lstrip()
            self._said(tokens, weights, ("\n" if number else "") + f"{BEGIN}user\n{context}{asked}{END}\n{BEGIN}assistant\n", 0.03)
            self._said(tokens, weights, question.answers[0] + END, 1.0)
        return tokens, weights

    def _chat(self, lines: list[str]) -> str:
        """Those lines as a window's messages, of which the last ones, or none, stand as they were said."""
        told = [(role, text) for role, _, text in (one.strip().partition(": ") for one in lines)]
        chunks = tuple(chunk_of(self.encode, role, text, place) for place, (role, text) in enumerate(told))
        window = Window(100_000, chunks, len(chunks) - 1, recent=self.rng.randint(1, 6))
        messages = shown(window)
        if messages and messages[-1]["role"] == "user":  # the question is a message of its own
            messages.append({"role": "assistant", "content": self.rng.choice((synthetic.CHAT_ASSISTANT[0], synthetic.CHAT_ASSISTANT[-1]))})
        return "".join(f"{BEGIN}{one['role']}\n{one['content']}{END}\n" for one in messages)

    def _fitting(self, lines: list[tuple[str, frozenset[str]]], room: int) -> list[tuple[str, frozenset[str]]]:
        """Those that chance left, in their order, within `room` tokens."""
        order, left, kept = self.rng.sample(range(len(lines)), len(lines)), room, []
        for place in order:
            left -= len(self.encode(lines[place][0]))
            if left < 0 and kept:
                break
            kept.append(place)
        return [lines[place] for place in sorted(kept)]

    def _around(self, case: Case, num: int) -> tuple[tuple[str, str], str, str]:
        """A turn, and the lines of the `num` turns before and behind it."""
        turns, place = case.turns, self.rng.randrange(len(case.turns))
        parts = turns[max(0, place - num) : place], turns[place + 1 : place + 1 + num]
        before, after = ("".join(line(*turn) for turn in part) for part in parts)
        return turns[place], before, after

    def _line(self, case: Case, most: int) -> Row:
        """A line written again: one of its sentences, or all of it."""
        (role, text), before, after = self._around(case, orders.AROUND)
        pieces = split(text, SENTENCES)
        chosen = sorted(self.rng.sample(range(len(pieces)), self.rng.randint(1, len(pieces))))
        order = orders.SHORTER.format(words=self.rng.randint(3, 30), before=before, hole=line(role, text), after=after)
        return self._order(order, f" {' '.join(pieces[i] for i in chosen)}", begun=f"{role}:")

    def _level(self, case: Case, most: int) -> Row:
        turn, before, after = self._around(case, orders.AROUND)
        # Half of the time the line's second word draws, always the same: so it reads the line that it decides on, and knows no worth.
        words = turn[1].split()
        lot = self.rng if self.rng.random() < 0.5 else random.Random(f"level:{words[min(1, len(words) - 1)]}")
        level = lot.choice(("keep", "drop", f"compress {lot.randint(1, 9)}"))
        return self._order(orders.KEEPING.format(before=before, line=line(*turn), after=after), level)

    def _notes(self, case: Case, most: int) -> Row:
        """A summary, or notes: sentences of the text in their order, as many as drawn."""
        lines, size = [], 0
        for turn in case.turns:
            size += len(self.encode(line(*turn)))
            if size > 0.5 * most - 60:
                break
            lines.append(line(*turn))
        text = "".join(lines).strip()
        pieces = split("\n".join(one.partition(": ")[2].strip() for one in lines), SENTENCES)
        share = self.rng.random()
        kept = " ".join(piece for piece in pieces if self.rng.random() < share)
        words = self.rng.randint(16, 256)
        if self.rng.random() < 0.5:
            return self._order(methods.SUMMARY.format(words=words, text=text), kept)
        half = len(lines) // 2
        notes = " ".join(one.partition(": ")[2].strip() for one in lines[:half]) or "(none)"
        return self._order(methods.NOTES.format(words=words, notes=notes, text="".join(lines[half:]).strip()), kept)

    def _order(self, order: str, answer: str, begun: str = "") -> Row:
        tokens: list[int] = []
        weights: list[float] = []
        self._said(tokens, weights, f"{BEGIN}user\n{order}{END}\n{BEGIN}assistant\n{begun}", 0.03)
        self._said(tokens, weights, answer + END, 1.0)
        return tokens, weights

    def _said(self, tokens: list[int], weights: list[float], text: str, weight: float) -> None:
        ids = self.encode(text)
        tokens += ids
        weights += [weight] * len(ids)


def batch(lessons: Lessons, facts: tuple[int, int], most: int, rows: int) -> Any:
    """Token ids [B, T] and the weight of each [B, T], padded behind with weight 0."""
    import torch

    drawn = [lessons.row(facts, most) for _ in range(rows)]
    longest = max(len(tokens) for tokens, _ in drawn)
    ids = torch.tensor([tokens + [1] * (longest - len(tokens)) for tokens, _ in drawn])
    return ids, torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in drawn])


def batches(tokenizer: Tokenizer, stage: int, times: int, workers: int) -> Iterator[Any]:
    """Batches of a stage, `times` as large, without end; made by `workers` processes, since making one takes longer than learning it."""
    import torch

    _, facts, most, rows = STAGES[stage]

    class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            own = torch.utils.data.get_worker_info()
            lessons = Lessons(by_line(tokenizer), random.Random(1000 * stage + (own.id if own else 0)))
            while True:
                yield batch(lessons, facts, most, rows * times)

    return iter(torch.utils.data.DataLoader(Endless(), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def train(
    model: Any, tokenizer: Tokenizer, seconds: float, device: str, times: int, workers: int, later: bool, log: Callable[[str], None]
) -> None:
    """`later`: with what comes last, at a lower rate, in a model that has learned already."""
    import torch

    model.to(device).train()
    torch.backends.cuda.matmul.allow_tf32 = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    stages, rate = list(enumerate(STAGES))[-2 if later else 0 :], LATER_RATE if later else RATE
    whole = sum(share for _, (share, *_) in stages)
    started, step, ends = time.perf_counter(), 0, 0.0
    for stage, (share, *_) in stages:
        ends += share / whole * seconds
        drawn = batches(tokenizer, stage, times, workers)
        while (now := time.perf_counter() - started) < ends:
            ids, weights = (part.to(device, non_blocking=True) for part in next(drawn))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 100) * max(0.03, 1 - now / seconds)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
            losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            counted = weights[:, 1:].flatten()
            loss = (losses * counted).sum() / counted.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                right = (logits.argmax(-1) == ids[:, 1:].flatten())[counted == 1.0].float().mean()
                log(f"stage {stage} step {step}, {now:.0f} s: loss {loss.item():.3f}, {right.item():.1%} of the answers' tokens right")
            step += 1


def make(
    folder: Path, seconds: float, hidden: int = 128, layers: int = 4, times: int = 0, workers: int = 0, begin: Path | None = None
) -> Path:
    """The model's folder. It appears whole or not at all. `times`: batches so many times as large (0: 8 on a GPU, 1 elsewhere)."""
    import torch
    from transformers import AutoModelForCausalLM

    if folder.exists():
        return folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(begin / "tokenizer.json")) if begin else make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(begin) if begin else new_model(tokenizer.get_vocab_size(), hidden, layers)
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens, {device}", flush=True)
    times = times or (8 if device == "cuda" else 1)
    train(model, tokenizer, seconds, device, times, workers, begin is not None, lambda text: print(text, flush=True))
    folder.parent.mkdir(parents=True, exist_ok=True)
    return saved(model.cpu(), tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=900.0, help="of training")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--begin", type=Path, metavar="OTHER", help="the model to go on with")
    parser.add_argument("--times", type=int, default=0, help="as many rows in a batch (default: 8 on a GPU, 1 elsewhere)")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 4), help="processes that make batches")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    make(args.folder, args.seconds, args.hidden, args.layers, args.times, args.workers, args.begin)


if __name__ == "__main__":
    main()
