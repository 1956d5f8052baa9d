from __future__ import annotations

import re
from pathlib import Path

import pytest

from everlearn.errors import InvalidRequest
from everlearn.loop import description, measure, outcomes, rule
from everlearn.loop.evidence import Outcome
from everlearn.loop.watch import cusum

SHADOW = """base = "tiny"
[shadow]
answers = {answers}
share = {share}
[gate.shadow]
[gate.guardrails.length]
worse = "both"
margin = 0.1
[gate.guardrails.feedback_rate]
worse = "both"
margin = 0.1
min_num = 900
"""


def test_the_guide_s_example_is_one(root: Path) -> None:
    text = re.search(r"```toml\n(.*?)```", (root / "docs/guides/deploy.md").read_text(encoding="utf-8"), flags=re.S)
    assert text is not None
    name, found = description.read(text[1])
    assert (name, found.base, found.triggers.labels, found.triggers.at) == ("support", "smollm2", 20, "03:00")
    asked = rule.rule_of(found.gate)
    assert asked.shadow is not None and found.shadow.answers == 50
    assert asked.owner == "maria" and asked.canary is not None and [step.share for step in asked.canary.steps] == [0.05, 0.5]


def test_a_description_survives_json() -> None:
    _, found = description.read('base = "tiny"\n[update]\nstart = "champion"\n[gate.corrections]\nmin_right = 0.9')
    assert description.of(description.to_json(found)) == found
    assert description.to_json(found) == {"base": "tiny", "update": {"start": "champion"}, "gate": {"corrections": {"min_right": 0.9}}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base = ", "not valid TOML"),
        ("", "base"),
        ('base = "tiny"\n[triggers]\nlabel = 3', "label"),
        ('base = "tiny"\n[triggers]\nat = "3:00"', "03:00"),
        ('base = "tiny"\n[update]\nmethod = "magic"', "magic"),
        ('base = "tiny"\n[update]\nlearning_rate = 0.0', "update.learning_rate"),
        ('base = "tiny"\n[shadow]\nshare = 1.5', "shadow.share"),
        ('base = "tiny"\n[gate]\nown = "me"', "owner"),
        ('base = "tiny"\n[gate.guardrails.mood]\nworse = "up"\nmargin = 0.1', "feedback_rate"),
        ('base = "tiny"\n[gate.alarms]\nignore = ["drift"]', "no alarms"),
        ('base = "tiny"\n[gate.alarms]\nignore = ["cusum"]\n[gate.watch]\nlabels = 0', "no alarms"),
        ('base = "tiny"\n[gate.alarms]\nignore = ["drift"]\n[gate.watch]', "'drift'; there is cusum"),
        ('base = "tiny"\n[gate.retained]\nsuites = ["general", "arithmetic"]', "'arithmetic'; there is general, questions, instructions"),
        ('base = "tiny"\n[gate.guardrails.tool_error]\nworse = "up"\nmargin = 0.1', "'tool_error'"),
        ('base = "tiny"\n[gate.shadow]\nmin_hours = 9.0\nmax_hours = 8.0', "max_hours = 8 must be min_hours = 9"),
        ('base = "tiny"\n[shadow]\nanswers = 50', r"add \[gate.shadow\]"),
        ('base = "tiny"\n[gate.shadow]', "shadow.answers = 0 must be at least 1"),
        (SHADOW.format(answers=49, share=0.2), "at least 50: the guardrail length waits for 50"),
        (SHADOW.format(answers=50, share=0.0), "share above 0"),
        ('base = "tiny"\nsettle = -1.0', "settle"),
        ('base = "tiny"\nname = 3', "text"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        description.read(text)


def test_every_guardrail_that_may_be_asked_is_measured() -> None:
    assert set(description.GUARDRAILS) == {*outcomes.MEASURES, *outcomes.OF_FEEDBACK}
    assert set(description.IN_SHADOW) < set(outcomes.MEASURES)
    assert description.SUITES == measure.SUITES


def test_the_watch_s_alarm_can_be_ignored() -> None:
    _, found = description.read('base = "tiny"\n[gate.alarms]\nignore = ["cusum"]\n[gate.watch]')
    asked = rule.rule_of(found.gate)
    assert asked.alarms.ignore == description.ALARMS and asked.watch is not None
    half = [Outcome(candidate, float(number % (2 if candidate else 4) > 0)) for candidate in (False, True) for number in range(400)]
    assert [one.name for one in cusum(asked.watch, half[:400], half[400:])] == list(description.ALARMS)


def test_a_shadow_with_enough_answers_is_one() -> None:
    assert description.read(SHADOW.format(answers=50, share=0.2))[1].shadow.answers == 50, "what only people show isn't asked in it"
