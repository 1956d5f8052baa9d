"""A model behind the examination: it answers from what a method shows, and writes the summaries and notes of methods that need a writer."""

from __future__ import annotations

from collections.abc import Sequence

import tinker

from everlearn.rl.prompts import ChatMl

ANSWER_TOKENS = 24
QUESTION = "{context}\n\nAnswer in a few words, from what was said above.\nQuestion: {question}"
NOTHING = "(nothing was said)"


class Asking:
    """Greedy, so that the same weights give the same answers. `begun`: how each answer begins; small models answer shorter so."""

    def __init__(self, sampler: tinker.SamplingClient, chat: ChatMl, begun: str = ""):
        self.sampler, self.chat, self.begun = sampler, chat, begun

    def answers(self, asked: Sequence[tuple[Sequence[str], str]]) -> list[str]:
        prompts = [
            self.chat.ask(QUESTION.format(context="".join(pieces).strip() or NOTHING, question=question), begun=self.begun)
            for pieces, question in asked
        ]
        return [text.split("\n")[0].strip() for text in self._said(prompts, ANSWER_TOKENS)]

    def write(self, order: str, most: int) -> str:
        return self._said([self.chat.ask(order)], most)[0].strip()

    def _said(self, prompts: Sequence[tinker.ModelInput], most: int) -> list[str]:
        params = tinker.SamplingParams(max_tokens=most, temperature=0.0, stop=list(self.chat.stop))
        futures = [self.sampler.sample(prompt, 1, params) for prompt in prompts]
        return [self.chat.decode(list(future.result().sequences[0].tokens)) for future in futures]
