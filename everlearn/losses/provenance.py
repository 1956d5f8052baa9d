"""From provenance spans to arrays: what the sampler recorded about each token of a datum. No torch.

A datum of stable_reinforce says, for every input token and for every target, which recorded sequence it came from: a run of that
sequence's prompt or of its sampled tokens. The runs tile the field in order. `attach` checks them against the recordings and
returns a datum that carries the sampler's log-probabilities, so that from there on (log, replay, engine) it stands alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from everlearn.errors import InvalidRequest
from everlearn.losses.spec import SAMPLED_MASK, SAMPLING_LOGPROBS
from everlearn.types import Array, Datum, ProvenanceSpan

SAMPLED, PROMPT = "sampled", "prompt"


class RecordedSequence(msgspec.Struct, frozen=True):
    """One sampled sequence as the server keeps it: `prompt` int32 [P], `tokens` int32 [N] and their `logprobs` float32 [N] under
    the sampler's weights at temperature 1, and the sampler version that drew it (for staleness, "" is the base model)."""

    prompt: Array
    tokens: Array
    logprobs: Array
    version: str = ""


@dataclass(frozen=True)
class Resolved:
    """What the spans say of T positions: the token each stands for, the sampler's log-probability (0 where the token was part of
    a prompt), and whether it was sampled."""

    tokens_T: np.ndarray
    sampling_logprobs_T: np.ndarray
    sampled_T: np.ndarray


def sequence_ids(data: Iterable[Datum]) -> set[str]:
    """Every sequence that the datums' spans name: what to look up before `attach`."""
    return {span.sequence_id for datum in data for spans in (datum.model_input_spans, datum.loss_input_spans) for span in spans or []}


def resolve(spans: Sequence[ProvenanceSpan], recorded: Mapping[str, RecordedSequence], length: int, at: str = "spans") -> Resolved:
    """The arrays that `spans` stand for; they must tile `length` positions. `at` names the field in messages."""
    total = sum(span.length for span in spans)
    if total != length:
        raise InvalidRequest(
            f"{at} cover {total} positions, but the field they annotate has {length}; the runs must tile it exactly, in order", param=at
        )
    resolved = Resolved(np.zeros(length, np.int32), np.zeros(length, np.float32), np.zeros(length, bool))
    position = 0
    for index, span in enumerate(spans):
        place = slice(position, position + span.length)
        tokens, logprobs = _run(span, recorded, f"{at}[{index}]")
        resolved.tokens_T[place] = tokens
        if logprobs is not None:
            resolved.sampling_logprobs_T[place] = logprobs
            resolved.sampled_T[place] = True
        position += span.length
    return resolved


def _run(span: ProvenanceSpan, recorded: Mapping[str, RecordedSequence], at: str) -> tuple[np.ndarray, np.ndarray | None]:
    """One run's tokens, and their log-probabilities if they were sampled."""
    if span.kind not in (SAMPLED, PROMPT):
        raise InvalidRequest(f"{at} has kind {span.kind!r}; it must be {SAMPLED!r} or {PROMPT!r}", param=at)
    if span.offset < 0 or span.length < 0:
        raise InvalidRequest(f"{at} has offset {span.offset} and length {span.length}; neither may be negative", param=at)
    sequence = recorded.get(span.sequence_id)
    if sequence is None:
        raise InvalidRequest(
            f"{at} names sequence {span.sequence_id!r}, of which nothing is recorded: it was sampled without record_stability_info=True, "
            "by another session, or so long ago that the recording expired; sample it again with a recording sampling client",
            param=at,
        )
    source = sequence.tokens if span.kind == SAMPLED else sequence.prompt
    end = span.offset + span.length
    if end > source.shape[0]:
        what = "sampled tokens" if span.kind == SAMPLED else "prompt tokens"
        raise InvalidRequest(
            f"{at} covers {what} [{span.offset}, {end}) of sequence {span.sequence_id!r}, which has {source.shape[0]}; "
            "offset + length must not exceed that (offsets count from the start of the sampled tokens, or of the prompt)",
            param=at,
        )
    logprobs = sequence.logprobs.numpy()[span.offset : end] if span.kind == SAMPLED else None
    return source.numpy()[span.offset : end], logprobs


def attach(index: int, datum: Datum, recorded: Mapping[str, RecordedSequence]) -> Datum:
    """The datum with `sampling_logprobs` and `sampled_mask` (float32 [T]) among its inputs, after checking both span lists.

    Input tokens must be the ones recorded. Of the targets only sampled ones must: clients put placeholders (0) where the target
    is part of a prompt. Only sampled targets may carry an advantage, since nothing was recorded for the others.
    `index` is the datum's place in the request. The datum has passed losses.spec.check_datum.
    """
    at = f"data[{index}]"
    length = datum.tokens.shape[0]
    inputs = resolve(datum.model_input_spans or [], recorded, length, f"{at}.model_input_spans")
    everywhere = np.ones(length, bool)
    _check_same(f"{at}.model_input", datum.tokens.numpy(), inputs.tokens_T, everywhere)
    targets = resolve(datum.loss_input_spans or [], recorded, length, f"{at}.loss_fn_input_spans")
    _check_same(f"{at}.loss_fn_inputs.target_tokens", datum.inputs["target_tokens"].numpy(), targets.tokens_T, targets.sampled_T)
    stray = np.flatnonzero((datum.inputs["advantages"].numpy() != 0) & ~targets.sampled_T)
    if len(stray):
        param = f"{at}.loss_fn_inputs.advantages"
        raise InvalidRequest(
            f"{param}[{stray[0]}] is {datum.inputs['advantages'].numpy()[stray[0]]:g} on a target that is part of a prompt; "
            "advantages must be 0 outside sampled tokens, for which alone a sampling log-probability is recorded",
            param=param,
        )
    added = {SAMPLING_LOGPROBS: Array.of(targets.sampling_logprobs_T), SAMPLED_MASK: Array.of(targets.sampled_T.astype(np.float32))}
    return msgspec.structs.replace(datum, inputs={**datum.inputs, **added})


def _check_same(param: str, sent_T: np.ndarray, recorded_T: np.ndarray, where_T: np.ndarray) -> None:
    differ = np.flatnonzero((sent_T != recorded_T) & where_T)
    if len(differ):
        place = int(differ[0])
        raise InvalidRequest(
            f"{param}[{place}] is token {sent_T[place]}, but its provenance span stands for token {recorded_T[place]} "
            f"({len(differ)} positions differ); send the sampled tokens as they came back, without decoding and encoding them again",
            param=param,
        )
