"""A correction of a part: the recorded answer with other words in the place of some of its tokens."""

from __future__ import annotations

import asyncio
import json
from array import array

from everlearn.api.services import Services
from everlearn.errors import InvalidRequest, Unsupported
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.store.records import Body, Row

WHOLE = "correct the whole answer instead (leave span out)"


async def spliced(svc: Services, row: Row, body: Body | None, choice: int, span: tuple[int, int], text: str) -> str:
    """The whole answer of `choice` with `text` in the place of its tokens [first, end). Raises Unsupported where the answer is more than
    these tokens' text (thoughts, calls of tools), InvalidRequest for a span that cuts a character."""
    if body is None:
        raise Unsupported("text: the content of this record isn't kept, so no text about it is either; leave it out", param="text")
    if not 0 <= choice < len(body.choices):
        raise InvalidRequest(f"choice {choice}: record {row.record_id} has choices 0 to {len(body.choices) - 1}", param="choice")
    ids = array("i", body.choices[choice].tokens.data).tolist()
    if not 0 <= span[0] < span[1] <= len(ids):
        rule = f"must lie in the answer's {len(ids)} tokens: [first, end) with 0 <= first < end <= {len(ids)}"
        raise InvalidRequest(f"span [{span[0]}, {span[1]}] {rule}", param="span")
    answers = json.loads(body.texts).get("answer") or []
    message = answers[choice] if choice < len(answers) else {}
    chat = await svc.chat_models.get(svc.catalog.resolve(row.base_model))
    return await asyncio.to_thread(_spliced, chat.tokenizer, ids, span, str(message.get("content") or ""), text)


def _spliced(tokenizer: ChatTokenizer, ids: list[int], span: tuple[int, int], content: str, text: str) -> str:
    first, end = span
    # Prefixes, not pieces: some decoders drop the space in front of what they are given.
    whole, before, upto = (tokenizer.decode(part, skip_special=True) for part in (ids, ids[:first], ids[:end]))
    if whole.strip() != content.strip():
        raise Unsupported(f"span: this answer is more than the text of its tokens (thoughts or calls of tools); {WHOLE}", param="span")
    if not (whole.startswith(before) and whole.startswith(upto)):
        raise InvalidRequest(f"span [{first}, {end}] cuts a character in two; move it by a token, or {WHOLE}", param="span")
    after = whole[len(upto) :]
    made = before + text + after
    return made.strip() if content == whole.strip() else made
