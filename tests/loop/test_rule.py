from __future__ import annotations

import tomllib

import msgspec
import pytest

from everlearn.errors import InvalidRequest
from everlearn.loop import description
from everlearn.loop.rule import DEFAULT_RULE, Rule, Step, read_rule, rule_of


def test_the_default_rule_reads_and_promotes_nobody_by_itself():
    rule = read_rule(DEFAULT_RULE)
    assert (rule.owner, rule.promote) == ("", "ask")
    assert [step.share for step in rule.canary.steps] == [0.01, 0.05, 0.25, 0.5]
    assert set(rule.guardrails) == {"refusal", "length", "feedback_rate"}
    assert description.of({"base": "tiny", "gate": tomllib.loads(DEFAULT_RULE)}).base == "tiny", "a deployment takes it"
    assert msgspec.json.decode(msgspec.json.encode(rule), type=Rule) == rule


def test_what_isn_t_named_isn_t_asked():
    rule = rule_of({"owner": "ana", "kl": {"most": 0.2}})
    assert rule.kl.most == 0.2 and rule.held_out is None and rule.canary is None and rule.guardrails == {}
    assert read_rule("[canary]").canary.steps[0] == Step(share=0.01, min_feedback=5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[canary]\nalhpa = 0.1", r"canary\.alhpa is no setting; did you mean alpha\?"),
        ("[guardrail.refusal]\nworse = 'up'", r"guardrail is no setting; did you mean guardrails\?"),
        ("[guardrails.refusal]\nworse = 'up'\nmargins = 0.1", r"margins is no setting; did you mean margin\?"),
        ("[canary]\nsteps = [{shares = 0.1}]", r"shares is no setting; did you mean share\?"),
        ("[canary]\nalpha = 0.6", r"< 0\.5.*canary\.alpha"),
        ("[kl]\nmost = 'much'", r"float.*str.*kl\.most"),
        ("promote = 'always'", r"always"),
        ("[canary]\nsteps = []", r"shares \[\]; give at least one"),
        ("[canary]\nsteps = [{share = 0.5, min_feedback = 1}, {share = 0.1, min_feedback = 2}]", r"each larger than the one before"),
        ("owner = ", r"no TOML"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(text: str, told: str):
    with pytest.raises(InvalidRequest, match=told):
        read_rule(text)
