from __future__ import annotations

import re
from html.parser import HTMLParser

from everlearn.demo.grade import Question, grade, scores
from everlearn.demo.report import loss_curve, render
from everlearn.demo.teach import Step


def test_the_report_is_one_file_that_escapes_what_the_model_said() -> None:
    rows = grade([Question("taught", "who?", ["me"])], ["<script>alert(1)</script>"], ["me & you"])
    page = render("Acme <Kites>", {"model": "m"}, scores(rows), rows, [Step(0, 2.0, 10), Step(1, 0.5, 10)])
    assert "<script" not in page
    assert "&lt;script&gt;" in page and "me &amp; you" in page and "Acme &lt;Kites&gt;" in page
    assert not re.search(r"(src|href)\s*=|url\(|https?://", page), "the report must not need the network"
    assert_balanced(page)


def test_the_loss_curve_has_a_mark_for_every_step_and_stays_in_its_frame() -> None:
    svg = loss_curve([Step(number, 3.0 / (number + 1), 10) for number in range(30)])
    assert svg.count("<circle") == 30
    assert all(0 <= float(x) <= 880 and 0 <= float(y) <= 260 for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg))


def test_a_curve_of_one_step_or_none_is_drawn_too() -> None:
    assert "<circle" in loss_curve([Step(0, 0.0, 1)])
    assert "<svg" not in loss_curve([])


class Balance(HTMLParser):
    VOID = {"meta", "line", "circle", "path"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def assert_balanced(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
