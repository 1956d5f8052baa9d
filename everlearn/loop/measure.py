"""What the gate is told before any traffic: both versions asked the same things, and judged.

What users corrected is asked again, what was held out is asked of both, general questions too, and whatever else the rule asks: probes of
safety, suites of general ability, how far the candidate went from the champion in nats per token, and whether the engine that samples it
and the one forward pass that scores it agree. All by greedy or seeded sampling over the Tinker API; nothing is recorded as an answer to
anybody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev
from typing import Any

import tinker

from everlearn.errors import NotFound
from everlearn.evals import safety
from everlearn.evals.asked import Instructed, Question, read_suite
from everlearn.loop import general, lesson
from everlearn.loop.corrected import accepted, right
from everlearn.loop.evidence import Evidence, Interval, Measure, Pair, Retained
from everlearn.loop.paired import proportion
from everlearn.loop.rule import Rule
from everlearn.loop.service import Api, Deployed, Tokens, path_of

MOST_ASKED = 400  # of corrections, and of held-out items: the newest
ANSWER_TOKENS = 64
GENERAL_TOKENS = 24
KL_PROMPTS = 40
SUITE = "general"
SUITES = (SUITE, "questions", "instructions")  # the last two are those of `everlearn eval retained`
ALPHA = 0.05  # of the intervals of shares


def offline(
    api: Api, service: Any, now: Deployed, candidate: str, trained: Sequence[Any], held_out: Sequence[Any], asked: Rule
) -> Evidence:
    """The evidence of stage "offline" for `candidate` (name@number). `trained` and `held_out` are items of the cycle's dataset. What takes
    long is measured only where the rule asks for it."""
    tokens = Tokens(api, now.base_model)
    old, new = (sampler(api, service, now, version) for version in (now.champion, candidate))
    suites = asked.retained.suites if asked.retained is not None else ()
    kl, parity = divergence(tokens, old, new) if asked.kl is not None or asked.parity is not None else (None, None)
    return Evidence(
        stage="offline",
        champion=now.champion,
        candidate=candidate,
        corrections=again(api, tokens, old, new, trained),
        held_out=again(api, tokens, old, new, held_out),
        safety=probed(tokens, old, new) if asked.safety is not None else (),
        retained=(retained(tokens, old, new), *(measured(tokens, old, new, suite) for suite in suites if suite != SUITE)),
        kl=kl,
        parity=parity,
    )


def sampler(api: Api, service: Any, now: Deployed, version: str) -> Any:
    path = path_of(api, version)
    made = service.create_sampling_client(base_model=now.base_model) if path is None else service.create_sampling_client(model_path=path)
    return made.result()


def again(api: Api, tokens: Tokens, old: Any, new: Any, items: Sequence[Any]) -> tuple[Pair, ...]:
    """Each item's prompt answered by both, and judged by its correction; what is longer than the context isn't asked, nor learned."""
    asked = sorted(items, key=lambda item: max(item["feedback_ids"], default=""))[-MOST_ASKED:]
    asked = [item for item in asked if tokens.fits(item["prompt_token_ids"], tokens.answer(str(item["messages"][-1]["content"])))]
    prompts = [item["prompt_token_ids"] for item in asked]
    asked_both = lesson.ask_each((old, new), prompts, [tokens.end], ANSWER_TOKENS, tokens.room)
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


def probed(tokens: Tokens, old: Any, new: Any) -> tuple[Pair, ...]:
    """The probes of everlearn/evals/safety.py; 1 is good."""
    probes = safety.load()
    prompts = [tokens.prompt(probe.messages) for probe in probes]
    answers = [[tokens.text(answer.tokens) for answer in lesson.ask(one, prompts, [tokens.end], safety.TOKENS)] for one in (old, new)]
    return tuple(Pair(*(float(probe.good(text)) for text in both)) for probe, *both in zip(probes, *answers, strict=True))


def measured(tokens: Tokens, old: Any, new: Any, suite: str) -> Retained:
    """A suite of `everlearn eval retained`: the share of its questions that are answered rightly, or of its prompts whose instructions are
    all followed."""
    found = read_suite()
    rows = next(one.rows for one in found.sets if one.name == suite)
    most = found.question_tokens if suite == "questions" else found.instruction_tokens
    texts = [row.question if isinstance(row, Question) else row.prompt for row in rows if isinstance(row, Question | Instructed)]
    prompts = [tokens.prompt([{"role": "user", "content": text}]) for text in texts]
    shares = []
    for one in (old, new):
        said = [tokens.text(answer.tokens) for answer in lesson.ask(one, prompts, [tokens.end], most)]
        hits = sum(_is_good(row, text) for row, text in zip(rows, said, strict=True))
        shares.append(Interval(hits / len(rows), *proportion(hits, len(rows), ALPHA / 2), len(rows)))
    return Retained(suite, *shares)


def _is_good(row: Any, text: str) -> bool:
    return bool(row.right(text)) if isinstance(row, Question) else all(row.followed(text))


def divergence(tokens: Tokens, old: Any, new: Any) -> tuple[Measure, Measure]:
    """Of what the new one samples at temperature 1 to general questions:

    - KL(new || old) per token: the mean of log new - log old
    - parity: the mean of |sampled - scored|, the log-probabilities that came with the new one's tokens, made one by one on its paged keys
      and values, against those of one forward pass over the whole, as training computes them

    Standard errors are those of means of answers, since an answer's tokens hang together.
    """
    questions = general.load().rehearsed[:KL_PROMPTS]
    prompts = [tokens.prompt([{"role": "user", "content": text}]) for text in questions]
    answers = lesson.ask(new, prompts, [tokens.end], GENERAL_TOKENS, temperature=1.0, seed=1)
    whole = [tinker.ModelInput.from_ints([*prompt, *answer.tokens]) for prompt, answer in zip(prompts, answers, strict=True)]
    scored = [[one.compute_logprobs(text) for text in whole] for one in (old, new)]
    gains, gaps = [], []
    for answer, before, after in zip(answers, *scored, strict=True):
        if num := len(answer.tokens):
            gains.append([ours - theirs for ours, theirs in zip(answer.logprobs, before.result()[-num:], strict=True)])
            gaps.append([abs(ours - theirs) for ours, theirs in zip(answer.logprobs, after.result()[-num:], strict=True)])
    return _mean(gains), _mean(gaps)


def _mean(answers: Sequence[Sequence[float]]) -> Measure:
    """Per token. A ratio of sums: its error is that of the answers' deviations from it. Of no token at all nothing is known."""
    num = sum(map(len, answers))
    if not num:
        return Measure(0.0, math.inf, 0)
    mean = math.fsum(map(math.fsum, answers)) / num
    deviations = [math.fsum(values) - mean * len(values) for values in answers]
    error = stdev(deviations) * math.sqrt(len(deviations)) / num if len(deviations) > 1 else math.inf
    return Measure(mean, error, num)
