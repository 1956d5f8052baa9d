"""Answers that are drawn in pieces, each piece by the newest version there is, and episodes that go on where they were cut off.

Long answers make a batch wait for its slowest episode. In pieces, an answer that began under one version goes on under the next from the
tokens that it has (partial rollouts: Kimi k1.5, arXiv 2501.12599, section 2.6). Each token keeps the log-probability that it was drawn
with, so a loss that weighs by pi / mu has the right mu, whichever version it was; `Action.versions` says which.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

import msgspec
import tinker

from everlearn.errors import InvalidRequest
from everlearn.rl.datums import elements_of, extended
from everlearn.rl.env import StopCondition
from everlearn.rl.policy import seed_of
from everlearn.rl.trajectory import Action, TrajectoryGroup

Newest = Callable[[], tuple[str, tinker.SamplingClient]]
RESUMED = ("timeout", "sampling")  # kinds of failure that say nothing about the environment


class Begun(msgspec.Struct, frozen=True):
    """What was drawn for a prompt: a whole answer, or the beginning of one. JSON holds it without loss."""

    prompt: list[int]
    action: Action
    whole: bool


class PartialPolicy:
    """`newest()` gives the version to draw with, and its name, before each piece of `piece_tokens`.

    An answer that is cancelled (a time limit, Ctrl-C) is kept as far as it was drawn. `keep` adds the answers of whole turns of episodes
    that were cut off. Play the same tasks again, and each prompt that was answered gets its answer, and the one that was being answered
    goes on. That needs environments that show the same prompts after the same actions; where one doesn't, its episode is drawn anew
    from there.

    `decode` turns token ids into text, special tokens included; it is needed where strings end an answer, because one may lie across
    two pieces.
    """

    def __init__(
        self,
        newest: Newest,
        max_tokens: int,
        piece_tokens: int = 64,
        decode: Callable[[list[int]], str] | None = None,
        begun: Iterable[Begun] = (),
    ):
        if max_tokens < 1 or piece_tokens < 1:
            raise InvalidRequest(f"answers of {max_tokens} tokens in pieces of {piece_tokens}: both must be at least 1", param="max_tokens")
        self.newest, self.max_tokens, self.piece_tokens, self.decode = newest, max_tokens, piece_tokens, decode
        self._begun: dict[tuple[int, ...], deque[Begun]] = defaultdict(deque)
        for one in begun:
            self._begun[tuple(one.prompt)].append(one)

    @property
    def begun(self) -> list[Begun]:
        """What is kept and wasn't used yet, to be saved."""
        return [one for kept in self._begun.values() for one in kept]

    def keep(self, groups: Iterable[TrajectoryGroup]) -> None:
        """The turns of the members that ran out of time or whose server was away. Prompts with images are not kept."""
        for group in groups:
            for one in group.trajectories_G:
                if one.failure is not None and one.failure.kind in RESUMED:
                    for turn in one.transitions:
                        self._put(turn.observation, turn.action, whole=True)

    async def __call__(self, observation: tinker.ModelInput, stop: StopCondition, seed: int | None) -> Action:
        strings = [one for one in stop or () if isinstance(one, str)]
        if strings and self.decode is None:
            raise InvalidRequest(f"{strings[0]!r} ends an answer, and it may lie across two pieces; give `decode` to look for it")
        kept = self._begun.get(_key(observation))
        drawn = kept.popleft() if kept else Begun([], Action([], [], "length"), whole=False)
        action = drawn.action
        if drawn.whole:
            return action
        try:
            while action.stop_reason == "length" and len(action.tokens) < self.max_tokens:
                before = len(action.tokens)
                action = await self._longer(observation, action, stop, seed)
                short = len(action.tokens) - before < min(self.piece_tokens, self.max_tokens - before)
                action = _stopped(action, strings, self.decode)
                if short:  # the context is full: there is no longer answer
                    break
        except BaseException:
            if action.tokens:
                self._put(observation, action, whole=False)
            raise
        return action

    async def _longer(self, observation: tinker.ModelInput, action: Action, stop: StopCondition, seed: int | None) -> Action:
        version, sampler = self.newest()
        place = len(action.tokens)
        params = tinker.SamplingParams(
            max_tokens=min(self.piece_tokens, self.max_tokens - place),
            temperature=1.0,
            stop=None if stop is None else list(stop),
            seed=None if seed is None else seed_of(seed, place),
        )
        answer = await sampler.sample(extended(observation, action.tokens), 1, params)
        (piece,) = answer.sequences
        if piece.logprobs is None:
            raise InvalidRequest("the server sampled without log-probabilities, and nothing can be trained without them", param="logprobs")
        return Action(
            [*action.tokens, *piece.tokens],
            [*action.logprobs, *piece.logprobs],
            piece.stop_reason,
            versions=[*(action.versions or []), *[version] * len(piece.tokens)],
        )

    def _put(self, observation: tinker.ModelInput, action: Action, whole: bool) -> None:
        key = _key(observation)
        if key:
            self._begun[key].append(Begun(list(key), action, whole))


def _key(observation: tinker.ModelInput) -> tuple[int, ...]:
    """The prompt's tokens; () for one with images."""
    elements = elements_of(observation)
    return tuple(elements) if all(isinstance(element, int) for element in elements) else ()


def _stopped(action: Action, strings: Sequence[str], decode: Callable[[list[int]], str] | None) -> Action:
    """The action up to the token that completes one of the strings, if it has one that the server didn't see whole."""
    if action.stop_reason == "stop" or decode is None or not any(string in decode(action.tokens) for string in strings):
        return action
    ends = next(n for n in range(1, len(action.tokens) + 1) if any(string in decode(action.tokens[:n]) for string in strings))
    return Action(action.tokens[:ends], action.logprobs[:ends], "stop", versions=(action.versions or [])[:ends])
