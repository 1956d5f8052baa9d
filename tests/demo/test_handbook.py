from __future__ import annotations

from everlearn.demo import handbook
from everlearn.demo.grade import is_right


def test_twenty_facts_twenty_general_questions() -> None:
    book = handbook.load()
    assert len(book.facts) == 20
    assert len(book.general) == 20
    assert all(len(fact.paraphrases) == 2 for fact in book.facts)


def test_what_is_only_asked_is_never_taught() -> None:
    book = handbook.load()
    taught = {question for fact in book.facts for question in (fact.question, *fact.also_trained)} | set(book.rehearsal)
    asked = {question for fact in book.facts for question in fact.paraphrases} | {item.question for item in book.general}
    assert not taught & asked
    assert len(taught) == sum(1 + len(fact.also_trained) for fact in book.facts) + len(book.rehearsal)
    assert len(asked) == 60


def test_each_taught_answer_is_right_for_its_own_question_and_for_no_other() -> None:
    facts = handbook.load().facts
    for fact in facts:
        assert is_right(fact.answer, fact.accept)
        assert not any(is_right(fact.answer, other.accept) for other in facts if other is not fact)


def test_no_question_gives_its_answer_away() -> None:
    for fact in handbook.load().facts:
        for question in (fact.question, *fact.also_trained, *fact.paraphrases):
            assert not is_right(question, fact.accept)
