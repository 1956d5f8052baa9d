"""The handbook as a lesson: its questions and answers as token ids, for everlearn/loop/lesson.py, which trains.

This module doesn't know where the server came from, nor how answers are graded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from everlearn.demo.handbook import Handbook
from everlearn.errors import Unsupported
from everlearn.loop import lesson as lessons
from everlearn.loop.lesson import ALTERNATIVES, Example, Recipe, Step, batches, num_steps, teach, to_datum

__all__ = ["ALTERNATIVES", "Example", "Recipe", "Step", "batches", "num_steps", "teach", "to_datum"]

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANSWER_TOKENS = 24  # enough for one sentence; the model is wordy, and what it says after the first sentence isn't graded
END = "<|im_end|>"


def render(tokenizer: Tokenizer, question: str) -> list[int]:
    """The model's chat template without a system prompt: a question costs a dozen tokens instead of thirty."""
    ids: list[int] = tokenizer.encode(f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n", add_special_tokens=False).ids
    return ids


def end_of_turn(tokenizer: Tokenizer) -> int:
    end = tokenizer.token_to_id(END)
    if end is None:
        raise Unsupported(f"this model's tokenizer has no token {END}, so its chat template isn't the one the demo speaks; use smollm2")
    return int(end)


def lesson(handbook: Handbook, tokenizer: Tokenizer) -> list[Example]:
    """Every trained wording of every fact with its answer."""
    end = end_of_turn(tokenizer)
    return [
        Example(render(tokenizer, question), [*tokenizer.encode(fact.answer, add_special_tokens=False).ids, end])
        for fact in handbook.facts
        for question in (fact.question, *fact.also_trained)
    ]


def ask(sampler: Any, tokenizer: Tokenizer, questions: Sequence[str], on_answer: Callable[[], None] = lambda: None) -> list[Any]:
    """The most likely answer to each question, as sampled sequences."""
    prompts = [render(tokenizer, question) for question in questions]
    return lessons.ask(sampler, prompts, [end_of_turn(tokenizer)], ANSWER_TOKENS, on_answer)


def rehearse(sampler: Any, tokenizer: Tokenizer, questions: Sequence[str], on_answer: Callable[[], None] = lambda: None) -> list[Example]:
    """What the untrained model would say to each question."""
    prompts = [render(tokenizer, question) for question in questions]
    return lessons.rehearse(sampler, prompts, [end_of_turn(tokenizer)], ANSWER_TOKENS, on_answer)
