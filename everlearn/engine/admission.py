"""Can this sampling request be honoured? Asked once, before any work is done for it."""

from __future__ import annotations

import math

from everlearn.engine.protocol import Sample
from everlearn.engine.routes import shape_of
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.models.load import BaseModel
from everlearn.models.vision import check_images
from everlearn.types import SamplingParams

# What may be added to a logit: far beyond any use, and float32 stays finite.
MOST_ADDED = 1000
# Experts' ids that one request may have recorded: 1 GiB of them.
MOST_ROUTED = 2**28
# Likeliest tokens that one request may have listed beside those that it draws: 1 GiB of ids and log-probabilities.
MOST_LISTED = 2**27


def admit(command: Sample, base: BaseModel, cache_tokens: int) -> int:
    """How many tokens may be drawn: max_tokens, or what the context (and the cache, where the request lowers it) leaves. Raises a
    UserError where a rule is broken."""
    params, context, name = command.params, base.info.max_context, base.info.name
    prompt = command.prompt.numpy()
    if not len(prompt):
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    for token in (int(prompt.min()), int(prompt.max())):
        if not 0 <= token < base.vocab_size:
            raise InvalidRequest(f"the prompt holds token {token}; tokens of {name} are 0 to {base.vocab_size - 1}", param="prompt")
    check_images(base.vision, name, len(prompt), command.images, "prompt")
    if command.num_samples < 1:
        raise InvalidRequest(f"num_samples is {command.num_samples}; it must be at least 1", param="num_samples")
    if not (math.isfinite(command.deadline) and command.deadline >= 0):
        raise InvalidRequest(f"deadline is {command.deadline}; it must be a number of seconds, or 0 for none", param="deadline")
    if len(prompt) > context:
        raise TooLarge(f"the prompt has {len(prompt)} tokens; {name} takes {context}; shorten it", param="prompt")
    if len(prompt) > cache_tokens:
        raise TooLarge(
            f"the prompt has {len(prompt)} tokens; the KV cache of {name} holds {cache_tokens}; shorten it or raise engine.kv_tokens",
            param="prompt",
        )
    max_new = max(min(params.max_tokens, base.info.room(len(prompt))), 0)
    if params.lowers:
        max_new = min(max_new, cache_tokens - len(prompt) + 1)
    if len(prompt) + max_new - 1 > cache_tokens:
        raise TooLarge(
            f"prompt and max_tokens need {len(prompt) + max_new - 1} tokens of KV cache; it holds {cache_tokens}; "
            "lower max_tokens or raise engine.kv_tokens",
            param="max_tokens",
        )
    if command.topk_sample_logprobs and max_new:
        max_new = _listed(command, max_new)
    if params.routing:
        _check_routing(command, base, len(prompt) + max_new)
    if any(params.stop_strings) and base.tokenizer is None:
        raise Unsupported(f"{name} has no tokenizer, so stop strings can't be found; send stop tokens", param="stop")
    _check_edits(params, base.vocab_size)
    _check_targets(command, len(prompt) - 1, base.vocab_size)
    return max_new


def _listed(command: Sample, max_new: int) -> int:
    """`max_new`, lowered where the request lowers it, so that its lists of likeliest tokens stay within MOST_LISTED."""
    samples, k = command.num_samples, command.topk_sample_logprobs
    most = MOST_LISTED // (samples * k)
    if most < (1 if command.params.lowers else max_new):
        raise TooLarge(
            f"the {k} likeliest tokens at each of up to {max_new} places in {samples} samples are {k * max_new * samples}; a request lists "
            f"at most {MOST_LISTED}: lower topk_sample_logprobs, num_samples or max_tokens",
            param="topk_sample_logprobs",
        )
    return min(max_new, most)


def _check_routing(command: Sample, base: BaseModel, length: int) -> None:
    shape = shape_of(base)
    if (num := command.num_samples * length * shape.layers * shape.width) > MOST_ROUTED:
        raise TooLarge(
            f"routes of {command.num_samples} samples of up to {length} tokens are {num} numbers; a request records at most {MOST_ROUTED}: "
            "ask for fewer samples or a lower max_tokens, or leave routing out",
            param="routing",
        )


def _check_edits(params: SamplingParams, vocab: int) -> None:
    """The API has ranges of its own; these are the ones that the arithmetic needs."""
    rules = {
        "min_p": (0.0 <= params.min_p <= 1.0, "0 to 1"),
        "presence_penalty": (abs(params.presence_penalty) <= MOST_ADDED, f"-{MOST_ADDED} to {MOST_ADDED}"),
        "frequency_penalty": (abs(params.frequency_penalty) <= MOST_ADDED, f"-{MOST_ADDED} to {MOST_ADDED}"),
        "repetition_penalty": (1 / MOST_ADDED <= params.repetition_penalty <= MOST_ADDED, f"{1 / MOST_ADDED} to {MOST_ADDED}"),
        "min_tokens": (0 <= params.min_tokens <= params.max_tokens, f"0 to max_tokens ({params.max_tokens})"),
    }
    for name, (fine, rule) in rules.items():
        if not fine:
            raise InvalidRequest(f"{name} is {getattr(params, name)}; it must be {rule}", param=name)
    for token, bias in params.logit_bias.items():
        if not (0 <= token < vocab and abs(bias) <= MOST_ADDED):
            message = f"logit_bias gives token {token} {bias}; tokens are 0 to {vocab - 1} and biases -{MOST_ADDED} to {MOST_ADDED}"
            raise InvalidRequest(message, param="logit_bias")


def _check_targets(command: Sample, num_rows: int, vocab: int) -> None:
    if command.target_prompt_logprobs is None:
        return
    targets = command.target_prompt_logprobs.numpy()
    if targets.ndim != 2 or targets.shape[0] != num_rows:
        raise InvalidRequest(
            f"target_prompt_logprobs has shape {list(targets.shape)}; it must be [{num_rows}, K], "
            "a row for each prompt token after the first",
            param="target_prompt_logprobs",
        )
    if targets.size and not -1 <= targets.min() <= targets.max() < vocab:
        raise InvalidRequest(
            f"target_prompt_logprobs holds {targets.min()} to {targets.max()}; token ids are 0 to {vocab - 1}, and -1 asks for nothing",
            param="target_prompt_logprobs",
        )
