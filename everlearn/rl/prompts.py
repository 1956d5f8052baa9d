"""How a conversation is spelled in tokens: ChatML, which the Qwen and SmolLM families speak. Text goes in once; sampled tokens never do.

Environments that need another spelling bring their own; nothing else in `everlearn.rl` knows about text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tinker
from tinker import types

from everlearn.rl.datums import extended

IMAGE_BEGINS, IMAGE_ENDS = "<|vision_start|>", "<|vision_end|>"
END = "<|im_end|>"


class ChatMl:
    """`encode` turns text, special tokens included, into ids and adds none; `decode` turns ids into text and drops special tokens."""

    stop = (END,)

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]):
        self.encode, self.decode = encode, decode

    @classmethod
    def of(cls, tokenizer: Any) -> ChatMl:
        """With a tokenizer of `transformers`, such as `training_client.get_tokenizer()`."""
        return cls(
            lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        )

    def ask(self, text: str, image: types.ImageChunk | None = None, begun: str = "") -> tinker.ModelInput:
        """A first question, with an image before it or without; the model is to answer next, or to go on from what is `begun`."""
        return extended(tinker.ModelInput.empty(), [], *self._turn(text, image, begun))

    def go_on(
        self, observation: tinker.ModelInput, action: list[int], text: str, image: types.ImageChunk | None = None
    ) -> tinker.ModelInput:
        """The next question, after the answer's own tokens; an answer that was cut off is ended first."""
        ended = action[-1:] == self.encode(END)
        return extended(observation, action, *self.encode("\n" if ended else f"{END}\n"), *self._turn(text, image))

    def _turn(self, text: str, image: types.ImageChunk | None, begun: str = "") -> list[Any]:
        if image is None:
            return self.encode(f"<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n{begun}")
        begin = self.encode(f"<|im_start|>user\n{IMAGE_BEGINS}")
        return [*begin, image, *self.encode(f"{IMAGE_ENDS}{text}{END}\n<|im_start|>assistant\n{begun}")]
