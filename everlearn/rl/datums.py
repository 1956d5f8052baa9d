"""From trajectories to what `forward_backward` takes. The tokens and log-probabilities are those of the sampler, moved and never changed.

Consecutive turns whose prompt begins with all that came before share one datum; a turn whose prompt does not (the environment shortened its
history, or spelled it anew) begins another. So every sampled token is trained on behind exactly the prompt that it was sampled
from, and a long conversation costs its length once.

T axis: positions of a datum. Position i predicts token i + 1, so inputs lose the last token and targets the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import tinker
from tinker import types

from everlearn.errors import InvalidRequest
from everlearn.rl.trajectory import Trajectory, TrajectoryGroup, Transition

Element: TypeAlias = Any  # int: one token; or a chunk that is an image
Span: TypeAlias = Any  # types.PromptProvenanceSpan | types.SampledProvenanceSpan
MASK = "sequence_ratio_mask"  # of loss_fn_inputs


def extended(observation: tinker.ModelInput, action: Sequence[int], *more: Element) -> tinker.ModelInput:
    """The prompt of the next turn: what was seen, the action's own tokens, then `more` tokens and images.

    Environments of several turns build their observations with it and so never spell an answer anew.
    """
    return _model_input([*elements_of(observation), *action, *more])


def datums_of(
    trajectory: Trajectory, advantages_T: Sequence[float], provenance: bool = False, sequence_mask: bool = False
) -> list[types.Datum]:
    """Datums with `target_tokens`, `logprobs` and `advantages`; each sampled token has its turn's advantage, all others have 0.

    `advantages_T` has one value for each turn. `provenance` adds the spans that `stable_reinforce` asks for; the sampling client must
    then have been made with `record_stability_info=True`. `sequence_mask` adds `sequence_ratio_mask`, 1 on sampled tokens, for `gspo` and
    for `sampled_of`.
    Turns whose advantage is 0 stay in, as context of the later ones.
    """
    if len(advantages_T) != len(trajectory.transitions):
        counts = f"{len(advantages_T)} advantages for {len(trajectory.transitions)} turns"
        raise InvalidRequest(f"{counts}; give one for each turn", param="advantages")
    if not np.all(np.isfinite(np.asarray(advantages_T, dtype=np.float64))):
        raise InvalidRequest(f"advantages must be finite numbers; {list(advantages_T)} are not", param="advantages")
    rows: list[_Row] = []
    for transition, advantage in zip(trajectory.transitions, advantages_T, strict=True):
        seen = elements_of(transition.observation)
        if not (rows and rows[-1].begins(seen)):
            rows.append(_Row())
        rows[-1].add(seen, transition, float(advantage))
    return [row.datum(provenance, sequence_mask) for row in rows]


def datums_of_group(
    group: TrajectoryGroup,
    advantages_GT: Sequence[Sequence[float]],
    provenance: bool = False,
    sequence_mask: bool = False,
    always: Collection[int] = (),
) -> list[types.Datum]:
    """Those of all members that have an advantage other than 0 in any turn; to a policy gradient the rest has nothing to say. Members in
    `always` come too, for losses that act on all that was sampled: where they have no advantages, with 0."""
    return [
        datum
        for index, (trajectory, own) in enumerate(zip(group.trajectories_G, advantages_GT, strict=True))
        if any(own) or index in always
        for datum in datums_of(trajectory, own or [0.0] * len(trajectory.transitions), provenance, sequence_mask)
    ]


def supervised(prompt: Sequence[int], answer: Sequence[int], weight: float = 1.0) -> types.Datum:
    """A datum for `cross_entropy`: what is to be said behind the prompt, which has a token at least. It has `target_tokens`, int64 [T], and
    `weights`, float32 [T], with T = prompt + answer - 1: each token of the answer weighs `weight`, the prompt nothing."""
    tokens = [*prompt, *answer]
    return weighted(tokens[:-1], tokens[1:], [0.0] * (len(prompt) - 1) + [weight] * len(answer))


def weighted(tokens: Sequence[int], targets: Sequence[int], weights: Sequence[float]) -> types.Datum:
    """A datum for `cross_entropy` from its own T tokens, targets and weights."""
    inputs = {
        "target_tokens": types.TensorData.from_numpy(np.array(targets, dtype=np.int64)),
        "weights": types.TensorData.from_numpy(np.array(weights, dtype=np.float32)),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def sampled_of(datum: types.Datum) -> np.ndarray:
    """Which positions' targets were sampled: bool [T], of a datum with `sequence_mask`. Nothing else tells: where a policy is certain a
    sampled token's log-probability is exactly 0, as that of a shown one is here."""
    return datum.loss_fn_inputs[MASK].to_numpy() != 0


def by_length(datum: types.Datum) -> types.TensorData:
    """The datum's advantages divided by how many of its tokens were sampled, so that a sum over these is a mean: an answer weighs
    the same however long it is. Of a datum with `sequence_mask`."""
    advantages = datum.loss_fn_inputs["advantages"].to_numpy() / max(int(sampled_of(datum).sum()), 1)
    return types.TensorData.from_numpy(advantages.astype(np.float32))


def without_mask(datum: types.Datum) -> types.Datum:
    """The same datum for a loss that takes no `sequence_ratio_mask`, or would do something else with it."""
    inputs = {name: value for name, value in datum.loss_fn_inputs.items() if name != MASK}
    return dataclasses.replace(datum, loss_fn_inputs=inputs)


class _Row:
    """One growing datum: its elements, and for each position (an image has several) what the loss needs."""

    def __init__(self) -> None:
        self.elements: list[Element] = []
        self.targets: list[int] = []
        self.logprobs: list[float] = []
        self.advantages: list[float] = []
        self.sampled: list[float] = []
        self.spans: list[Span] = []

    def begins(self, elements: list[Element]) -> bool:
        return len(self.elements) <= len(elements) and elements[: len(self.elements)] == self.elements

    def add(self, seen: list[Element], transition: Transition, advantage: float) -> None:
        action, before = transition.action, len(self.targets)
        new = seen[len(self.elements) :]
        for element in new:
            self.targets += [element] if isinstance(element, int) else [0] * _length(element)  # nobody predicts an image
        shown = len(self.targets) - before
        self.targets += action.tokens
        self.logprobs += [0.0] * shown + action.logprobs
        self.advantages += [0.0] * shown + [advantage] * len(action.tokens)
        self.sampled += [0.0] * shown + [1.0] * len(action.tokens)
        self.elements += [*new, *action.tokens]
        if action.sequence_id is not None:
            if shown:
                self.spans.append(types.PromptProvenanceSpan(sequence_id=action.sequence_id, offset=before, length=shown))
            self.spans.append(types.SampledProvenanceSpan(sequence_id=action.sequence_id, length=len(action.tokens)))

    def datum(self, provenance: bool, sequence_mask: bool) -> types.Datum:
        inputs = {
            "target_tokens": types.TensorData.from_numpy(np.array(self.targets[1:], dtype=np.int64)),
            "logprobs": types.TensorData.from_numpy(np.array(self.logprobs[1:], dtype=np.float32)),
            "advantages": types.TensorData.from_numpy(np.array(self.advantages[1:], dtype=np.float32)),
        }
        if sequence_mask:
            inputs[MASK] = types.TensorData.from_numpy(np.array(self.sampled[1:], dtype=np.float32))
        datum = types.Datum(model_input=_model_input(self.elements[:-1]), loss_fn_inputs=inputs)
        if not provenance:
            return datum
        if sum(span.length for span in self.spans) != len(self.targets):
            raise InvalidRequest("a sampled sequence has no id, so nobody can look up what was recorded of it", param="provenance")
        return datum.with_provenance(model_input=_cut(self.spans, first=0, last=1), loss_fn_inputs=_cut(self.spans, first=1, last=0))


def _cut(spans: Sequence[Span], first: int, last: int) -> list[Span]:
    """The spans without their first and last positions, of which 0 or 1 are dropped; a span has at least one."""
    kept = list(spans)
    if first:
        kept[0] = _shorter(kept[0], offset=1)
    if last:
        kept[-1] = _shorter(kept[-1], offset=0)
    return [span for span in kept if span.length]


def _shorter(span: Span, offset: int) -> Span:
    return type(span)(sequence_id=span.sequence_id, offset=span.offset + offset, length=span.length - 1)


def elements_of(observation: tinker.ModelInput) -> list[Element]:
    """Token by token, image by image."""
    elements: list[Element] = []
    for chunk in observation.chunks:
        elements += chunk.tokens if isinstance(chunk, types.EncodedTextChunk) else [chunk]
    return elements


def _length(element: Element) -> int:
    if element.expected_tokens is None:
        raise InvalidRequest("an image among observations must say how many tokens it takes (expected_tokens)", param="expected_tokens")
    return int(element.expected_tokens)


def _model_input(elements: Sequence[Element]) -> tinker.ModelInput:
    chunks: list[Any] = []
    tokens: list[int] = []
    for element in elements:
        if isinstance(element, int):
            tokens.append(element)
            continue
        if tokens:
            chunks.append(types.EncodedTextChunk(tokens=tokens))
            tokens = []
        chunks.append(element)
    if tokens:
        chunks.append(types.EncodedTextChunk(tokens=tokens))
    return tinker.ModelInput(chunks=chunks)
