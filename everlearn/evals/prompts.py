"""How the study's question is put to a model that sees: its own chat template around a photo and a question, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from everlearn.errors import Unsupported
from everlearn.evals.fewshot_vision import PREFILL, PROMPT
from everlearn.render import template, tokenizer
from everlearn.types import BaseModelInfo, VisionInfo


class VisionPrompt:
    """Tokens `before` the image's and `after` them, up to the first word of the answer; `prefill` are the answer's first words."""

    def __init__(self, read: tokenizer.ChatTokenizer, vision: VisionInfo, before: Sequence[int], after: Sequence[int], end: int):
        self.read, self.vision, self.before, self.after, self.end = read, vision, list(before), list(after), end
        self.prefill = read.encode(PREFILL)

    @classmethod
    def load(cls, info: BaseModelInfo) -> VisionPrompt:
        """Raises Unsupported for a model that reads text alone."""
        if info.vision is None:
            raise Unsupported(f"{info.name} is a {info.architecture}, which reads text alone; name a model that sees", param="model")
        read = tokenizer.load(Path(info.path))
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        ids = read.encode(template.render(read, [{"role": "user", "content": content}]))
        end = read.id_of(read.eos) if read.eos else next(iter(info.eos_token_ids), None)
        if ids.count(info.vision.image) != 1 or end is None:
            raise Unsupported(
                f"{info.path}: its chat template has no place for one image, or its tokenizer no end of a turn", param="model"
            )
        at = ids.index(info.vision.image)
        return cls(read, info.vision, ids[:at], ids[at + 1 :], end)

    def answer(self, rest: str) -> list[int]:
        """The whole reply: prefilled words, `rest`, end of turn."""
        return [*self.prefill, *self.read.encode(rest), self.end]

    def teach(self, num_image_tokens: int, rest: str) -> tuple[list[int], int]:
        """Tokens of the question and its reply, and how many of them are the question's."""
        asked = [*self.before, *[self.vision.image] * num_image_tokens, *self.after]
        return [*asked, *self.answer(rest)], len(asked)
