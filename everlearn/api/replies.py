"""What a model says: from tokens, as they are drawn, to text, reasoning and tool calls. The same for every dialect of the API.

A `Reply` follows one sequence. Each part of it becomes a `Step`: deltas to show, scored tokens to report, and at the end the reason why
it ended. A reply that isn't streamed takes its whole sequence in one step, through the same code. Nothing here waits, and nothing is
in the shape of anybody's API.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from everlearn.engine.protocol import TokenPart
from everlearn.render.detokenize import TextStream
from everlearn.render.reasoning import OPEN
from everlearn.render.replies import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import ReplyParser
from everlearn.types import SampledSequence

__all__ = ["ContentDelta", "Delta", "ReasoningDelta", "Reply", "ScoredToken", "Step", "ToolCallDelta", "part_of"]


class ScoredToken(msgspec.Struct):
    """A drawn token: its log-probability, and the likeliest ones in its place as (id, log-probability). `offset`: where its text begins."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int


class Step(msgspec.Struct):
    """`finish`: "" while it goes on, then stop, length, tool_calls or deadline. `parts`: the same token by token, where tokens are reported
    and there are several, so that each can be told with what it says."""

    deltas: list[Delta]
    scored: list[ScoredToken]
    finish: str
    parts: list[Step] = []


class SpokenCall(msgspec.Struct):
    """A tool call as it grows; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


class Reply:
    """`parser` None: the text is content as it stands (completions). `scored`: report tokens too. `single_call`: the reply is over where
    a second call begins, for models that no grammar holds to one."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        parser: ReplyParser | None,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        keep: Collection[int] = (),
        scored: bool = False,
        continues: bool = False,
        single_call: bool = False,
    ):
        self.text = TextStream(tokenizer, stop_strings, keep=keep, continues=continues)
        self.parser, self.stop_tokens, self.scored = parser, frozenset(stop_tokens), scored
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[SpokenCall] = []
        self.ids: list[int] = []  # as drawn: stop tokens and the tokens of stop strings too
        self.logprobs: list[float] = []
        self.reasoning_tokens = 0
        self.finish = ""
        self._single_call, self._over = single_call, False
        self._shown = 0  # characters that TextStream has let go
        self._held: deque[ScoredToken] = deque()

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it."""
        return self.text.stopped

    def message(self) -> dict[str, Any]:
        """What was said so far, as chat templates take it back."""
        said: dict[str, Any] = {"role": "assistant", "content": "".join(self.content)}
        if self.reasoning:
            said["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            said["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in self.calls
            ]
        return said

    def take(self, index: int, sequence: SampledSequence, thinks: bool) -> Step:
        """A whole sequence. Where there is a thought, token by token, so that those of the thought can be counted."""
        whole = part_of(index, sequence, self.scored)
        if self.parser is None or not (thinks or self._begins_with_a_thought(whole.tokens)):
            return self.feed(whole)
        return self._feed_each(whole)

    def feed(self, part: TokenPart) -> Step:
        """What the part adds. After the end: nothing."""
        if self.scored and self.parser is not None and len(part.tokens) > 1:
            return self._feed_each(part)
        return self._feed(part)

    def _feed_each(self, part: TokenPart) -> Step:
        """Token by token; the last one brings the end."""
        if self.finish:
            return Step([], [], "")
        steps = []
        last = max(len(part.tokens) - 1, 0)
        for place in range(last + 1):
            cut = slice(place, place + 1)
            reason = part.stop_reason if place == last else ""
            one = TokenPart(part.index, part.tokens[cut], part.logprobs[cut], part.top_ids[cut], part.top_logprobs[cut], reason)
            steps.append(self._feed(one))
        deltas, scored = [delta for step in steps for delta in step.deltas], [token for step in steps for token in step.scored]
        return Step(deltas, scored, self.finish, steps if self.scored else [])

    def _feed(self, part: TokenPart) -> Step:
        if self.finish:
            return Step([], [], "")
        ids = part.tokens
        self.ids += ids
        self.logprobs += part.logprobs
        if part.stop_reason == "stop" and ids and ids[-1] in self.stop_tokens:
            ids = ids[:-1]  # it ends the text, and is no part of it
        first = len(self.text.offsets)
        text = self.text.add(ids)
        self._shown += len(text)
        if self.scored:
            self._score(part, ids, first)
        if part.stop_reason or self.text.stopped is not None:
            return self._end(text, part.stop_reason)
        deltas = self._deltas(text)
        if self._over:
            self.finish = "tool_calls"
        if deltas and self.parser is not None and isinstance(deltas[-1], ReasoningDelta):
            self.reasoning_tokens += len(ids)
        return Step(deltas, self._released(), self.finish)

    def _begins_with_a_thought(self, ids: Sequence[int]) -> bool:
        first = b"".join(self.text.tokenizer.token_bytes(number) for number in ids[:32])
        return first.lstrip().startswith(OPEN.encode())

    def _end(self, text: str, reason: str) -> Step:
        rest = self.text.finish()
        self._shown += len(rest)
        deltas = self._deltas(text + rest)
        if self.parser is not None and not self._over:
            deltas += self._kept(self.parser.finish())
        stopped = self.text.stopped is not None or self._over
        self.finish = "stop" if stopped else reason
        if self.calls and self.finish == "stop":
            self.finish = "tool_calls"
        scored = self._released() if stopped else list(self._held)
        self._held.clear()
        return Step(deltas, scored, self.finish)

    def _deltas(self, text: str) -> list[Delta]:
        if not text:
            return []
        return self._kept([ContentDelta(text)] if self.parser is None else self.parser.feed(text))

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        """Notes what is said, so that the whole reply is there at its end."""
        for place, delta in enumerate(deltas):
            if isinstance(delta, ContentDelta):
                self.content.append(delta.text)
            elif isinstance(delta, ReasoningDelta):
                self.reasoning.append(delta.text)
            else:
                if delta.index and self._single_call:
                    self._over = True
                    return deltas[:place]
                if delta.index == len(self.calls):
                    self.calls.append(SpokenCall(delta.id or "", delta.name or ""))
                self.calls[delta.index].arguments += delta.arguments
        return deltas

    # -- log-probabilities -------------------------------------------------------------------------------------------------

    def _score(self, part: TokenPart, ids: Sequence[int], first: int) -> None:
        for place, number in enumerate(ids):
            top = list(zip(part.top_ids[place], part.top_logprobs[place], strict=True)) if part.top_ids else []
            self._held.append(ScoredToken(number, part.logprobs[place], top, self.text.offsets[first + place]))

    def _released(self) -> list[ScoredToken]:
        """Tokens whose text has been shown: a stop string must not leak by its tokens either."""
        out = []
        while self._held and self._held[0].offset < self._shown:
            out.append(self._held.popleft())
        return out


def part_of(index: int, sequence: SampledSequence, top: bool = False) -> TokenPart:
    """A whole sequence as one part."""
    ids: list[list[int]] = []
    scores: list[list[float]] = []
    if top and sequence.topk is not None:
        ids, scores = sequence.topk.token_ids.numpy().tolist(), sequence.topk.logprobs.numpy().tolist()
    return TokenPart(index, sequence.tokens.numpy().tolist(), sequence.logprobs.numpy().tolist(), ids, scores, sequence.stop_reason)
