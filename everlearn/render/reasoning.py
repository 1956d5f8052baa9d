"""Thoughts before the answer: `<think>...</think>`, written by the model or opened by its template.

A reply thinks only at its beginning: later, `<think>` is text like any other. Harmony's analysis channel is part of its message format
(`everlearn/render/syntaxes.py`).
"""

from __future__ import annotations

from everlearn.render.reader import Marks, Reader, Step
from everlearn.render.replies import Writer

OPEN, CLOSE = "<think>", "</think>"


def opened_by(prompt: str) -> bool:
    """Whether the prompt ends inside a thought, so that the reply begins there."""
    return prompt.rstrip().endswith(OPEN)


def closed_by(prompt: str) -> bool:
    """Whether the prompt ends with an empty thought: the template was told that the model shall not think."""
    return prompt.rstrip().endswith(CLOSE)


def thoughts(reader: Reader, out: Writer, opened: bool, ends: Marks) -> Step[str]:
    """Takes the thought, if the reply begins with one. Returns the mark of `ends` that ended it ("" where there was none, or no end)."""
    if not opened:
        reader.keep("")
        yield from reader.space()
        begins = yield from reader.comes(OPEN)
        before = reader.forget()
        if not begins:
            out.content(before)
            return ""
        out.separate()
    mark = yield from reader.until(ends, out.reasoning)
    out.separate()
    return mark
