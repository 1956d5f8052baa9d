"""Instructions whose following a rule can decide: "no commas", "at least 300 words", "end with this sentence".

The 25 kinds and their parameters are those of IFEval (Zhou et al. 2023, arXiv 2311.07911), judged strictly: the answer as it stands. Two
things differ from its published code, which needs a tokenizer of sentences and words for English: sentences and words are told apart by the
rules below, and the two instructions on case judge the case alone, not whether the text is English besides. Texts in, truth out.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from everlearn.errors import InvalidRequest, Unsupported

LANGUAGE = "language:response_language"  # the one kind that needs a package
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "inc", "ltd", "no", "e.g", "i.e", "a.m", "p.m", "u.s"}
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
CAPITAL_WORD = re.compile(r"[^\W\d_][\w'’-]*")


def follows(answer: str, instruction: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the answer follows one instruction. An empty answer follows none.

    Raises InvalidRequest for an instruction that isn't known or lacks a parameter, Unsupported for a language without py3langid.
    """
    if instruction not in CHECKS:
        raise InvalidRequest(f"there is no instruction {instruction!r}; there are {', '.join(sorted(CHECKS))}", param="instruction_id_list")
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        return bool(answer.strip()) and bool(CHECKS[instruction](answer, **given))
    except TypeError as error:
        raise InvalidRequest(f"{instruction} was given {given}: {error}", param="kwargs") from None


def can_tell_languages() -> bool:
    return importlib.util.find_spec("py3langid") is not None


def sentences(text: str) -> int:
    """How many: a full stop, an exclamation or a question mark ends one, but not after an initial, a number in a list or an abbreviation.
    What stands behind the last end is one more."""
    count, begin = 0, 0
    for match in SENTENCE_END.finditer(text):
        told = text[begin : match.start()]
        last = told.split()[-1].strip("(\"'“‘[").lower() if told.split() else ""
        inner = match[0] == "." and match.end() < len(text)
        if not re.search(r"\w", told) or (inner and (last in ABBREVIATIONS or re.fullmatch(r"[a-z]|\d{1,2}", last))):
            continue
        count, begin = count + 1, match.end()
    return count + bool(re.search(r"\w", text[begin:]))


def words(text: str) -> int:
    """How many runs of letters, digits and underscores; "don't" is two, as in IFEval."""
    return len(re.findall(r"\w+", text))


def _compare(found: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise InvalidRequest(f"the relation {relation!r} is none; there are 'at least' and 'less than'", param="kwargs")
    return found >= wanted if relation == "at least" else found < wanted


# ---- words and letters ----


def _existence(answer: str, keywords: list[str]) -> bool:
    return all(keyword.casefold() in answer.casefold() for keyword in keywords)


def _frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(answer.casefold().count(keyword.strip().casefold()), relation, frequency)


def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in forbidden_words)


def _letters(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(answer.lower().count(letter.lower()), let_relation, let_frequency)


def _capital_words(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in CAPITAL_WORD.findall(answer)), capital_relation, capital_frequency)


# ---- length ----


def _num_words(answer: str, num_words: int, relation: str) -> bool:
    return _compare(words(answer), relation, num_words)


def _num_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _compare(sentences(answer), relation, num_sentences)


def _num_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs stand between lines of three asterisks. One between two such lines may not be empty."""
    paragraphs = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(paragraphs[1:-1]) and sum(map(bool, paragraphs)) == num_paragraphs


def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between empty lines here."""
    paragraphs = [part.strip() for part in answer.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or nth_paragraph > len(paragraphs) or not paragraphs[nth_paragraph - 1]:
        return False
    first = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", first)[0].lower() == first_word.lower()


# ---- form ----


def _highlights(answer: str, num_highlights: int) -> bool:
    found = [*re.findall(r"\*[^\n*]*\*", answer), *re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return sum(bool(part.strip("* \t")) for part in found) >= num_highlights


def _bullets(answer: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*\*[^*].*$|^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", answer)) >= num_sections


def _json(answer: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str) -> bool:
    return any(title.strip("<> \t") for title in re.findall(r"<<[^\n]+>>", answer))


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _postscript(answer: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, answer.lower()) is not None


def _ends(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def _repeats(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _two_responses(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    told = [part for part in parts if part]
    return all(parts[1:-1]) and len(told) == 2 and told[0] != told[1]


# ---- language ----


def _language(answer: str, language: str) -> bool:
    if not can_tell_languages():
        raise Unsupported("telling languages apart needs the package py3langid, which isn't installed: pip install py3langid")
    return _classifier()(answer)[0] == language


@functools.cache
def _classifier() -> Callable[[str], tuple[str, float]]:
    import py3langid

    classify: Callable[[str], tuple[str, float]] = py3langid.classify
    return classify


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    LANGUAGE: _language,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:number_words": _num_words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda answer: any(one in answer for one in CONSTRAINED),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda answer: "," not in answer,
}
