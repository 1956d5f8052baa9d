"""What the gate is told before any traffic: both versions asked the same things, and judged.

What users corrected is asked again, what was held out is asked of both, general questions too, and how far the candidate went from the
champion is measured in nats per token. All by greedy or seeded sampling over the Tinker API; nothing is recorded as an answer to anybody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev
from typing import Any

import tinker

from everlearn.errors import NotFound
from everlearn.loop import general, lesson
from everlearn.loop.corrected import accepted, right
from everlearn.loop.evidence import Evidence, Interval, Measure, Pair, Retained
from everlearn.loop.paired import proportion
from everlearn.loop.service import Api, Deployed, Tokens, path_of

MOST_ASKED = 400  # of corrections, and of held-out items: the newest
ANSWER_TOKENS = 64
GENERAL_TOKENS = 24
KL_PROMPTS = 40
SUITE = "general"
ALPHA = 0.05  # of the intervals of shares


def offline(api: Api, service: Any, now: Deployed, candidate: str, trained: Sequence[Any], held_out: Sequence[Any]) -> Evidence:
    """The evidence of stage "offline" for `candidate` (name@number). `trained` and `held_out` are items of the cycle's dataset."""
    tokens = Tokens(api, now.base_model)
    old, new = (sampler(api, service, now, version) for version in (now.champion, candidate))
    return Evidence(
        stage="offline",
        champion=now.champion,
        candidate=candidate,
        corrections=again(api, tokens, old, new, trained),
        held_out=again(api, tokens, old, new, held_out),
        retained=(retained(tokens, old, new),),
        kl=divergence(tokens, old, new),
    )


def sampler(api: Api, service: Any, now: Deployed, version: str) -> Any:
    path = path_of(api, version)
    made = service.create_sampling_client(base_model=now.base_model) if path is None else service.create_sampling_client(model_path=path)
    return made.result()


def again(api: Api, tokens: Tokens, old: Any, new: Any, items: Sequence[Any]) -> tuple[Pair, ...]:
    """Each item's prompt answered by both, and judged by its correction."""
    asked = sorted(items, key=lambda item: max(item["feedback_ids"], default=""))[-MOST_ASKED:]
    prompts = [item["prompt_token_ids"] for item in asked]
    asked_both = lesson.ask_each((old, new), prompts, [tokens.end], ANSWER_TOKENS)
    answers = [[tokens.text(answer.tokens) for answer in own] for own in asked_both]
    pairs = []
    for item, before, after in zip(asked, *answers, strict=True):
        *said, correction = item["messages"]
        question = " ".join(str(message.get("content") or "") for message in said)
        mistake = mistaken(api, item["record_id"])
        pairs.append(Pair(*(right(question, mistake, str(correction["content"]), text) for text in (before, after))))
    return tuple(pairs)


def mistaken(api: Api, record_id: str) -> str:
    """What had been answered; "" where the record is gone or has no content."""
    try:
        content = api.get(f"/v1/records/{record_id}")["content"]
    except NotFound:
        return ""
    return str(content["answer"][0].get("content") or "") if content and content.get("answer") else ""


def retained(tokens: Tokens, old: Any, new: Any) -> Retained:
    """The graded general questions."""
    graded = general.load().graded
    prompts = [tokens.prompt([{"role": "user", "content": item.question}]) for item in graded]
    shares = []
    for answers in lesson.ask_each((old, new), prompts, [tokens.end], GENERAL_TOKENS):
        hits = sum(accepted(tokens.text(answer.tokens), item.accept) for answer, item in zip(answers, graded, strict=True))
        shares.append(Interval(hits / len(graded), *proportion(hits, len(graded), ALPHA / 2), len(graded)))
    return Retained(SUITE, *shares)


def divergence(tokens: Tokens, old: Any, new: Any) -> Measure:
    """KL(new || old) per token on general questions: the mean of log new - log old over what the new one samples at temperature 1. The
    standard error is that of means of answers, since an answer's tokens hang together."""
    questions = general.load().rehearsed[:KL_PROMPTS]
    prompts = [tokens.prompt([{"role": "user", "content": text}]) for text in questions]
    answers = lesson.ask(new, prompts, [tokens.end], GENERAL_TOKENS, temperature=1.0, seed=1)
    waiting = [
        old.compute_logprobs(tinker.ModelInput.from_ints([*prompt, *answer.tokens]))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    sums, counts = [], []
    for answer, future in zip(answers, waiting, strict=True):
        if not len(answer.tokens):
            continue
        theirs = future.result()[-len(answer.tokens) :]
        sums.append(math.fsum(ours - before for ours, before in zip(answer.logprobs, theirs, strict=True)))
        counts.append(len(answer.tokens))
    num, mean = sum(counts), math.fsum(sums) / sum(counts)
    # A ratio of sums: its error is that of the answers' deviations from it.
    deviations = [total - mean * count for total, count in zip(sums, counts, strict=True)]
    error = stdev(deviations) * math.sqrt(len(deviations)) / num if len(deviations) > 1 else math.inf
    return Measure(mean, error, num)
