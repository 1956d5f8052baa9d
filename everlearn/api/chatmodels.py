"""What the API process needs to talk with a base model: its tokenizer and template, and how it writes tool calls and thoughts.

Read from the model's folder once, in a thread, when first asked for; kept for the life of the server. No weights are touched.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from everlearn.errors import NotFound, Unavailable, Unsupported
from everlearn.models.catalog import Catalog
from everlearn.render import template, tools
from everlearn.render import tokenizer as tokenizers
from everlearn.render.tokenizer import ChatTokenizer
from everlearn.render.tools import ToolFormat
from everlearn.types import BaseModelInfo

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # OpenAI's words
GRADES = frozenset({"low", "medium", "high"})  # what models whose template grades it were trained on (gpt-oss), unless it names others


class ChatModel:
    """One base model's way with text. Safe to share: nothing here changes but how often the template took too long for the event loop
    (`overruns`), and how many requests are `rendering` beside it for that reason."""

    def __init__(self, base: BaseModelInfo, tokenizer: ChatTokenizer, format: ToolFormat):
        self.base, self.tokenizer, self.format = base, tokenizer, format
        self.overruns, self.rendering = 0, 0
        # What ends a turn may be another token than what ends a text; the tokenizer knows the first, the model's config the second.
        self.eos_id = tokenizer.id_of(tokenizer.eos) if tokenizer.eos else None

    def switches(self, effort: str) -> dict[str, Any] | None:
        """The template's switches for an effort of reasoning; None where it has none for that."""
        known = template.switches(self.tokenizer)
        switch = next((name for name in ("enable_thinking", "thinking") if name in known), None)
        graded = "reasoning_effort" in known
        if effort == "none" and switch is not None:
            return {switch: False}
        if effort not in EFFORTS or (graded and effort not in GRADES | template.efforts(self.tokenizer)):
            return None
        if switch is None and not graded:
            return {} if effort == "none" and not self.format.thinks else None
        return {**({"reasoning_effort": effort} if graded else {}), **({} if switch is None else {switch: True})}

    def thinking(self, effort: str, field: str = "reasoning_effort") -> dict[str, Any]:
        """The same for the request's `field`. Raises Unsupported where the model has no such thing."""
        found = self.switches(effort)
        if found is not None:
            return found
        taken = [name for name in EFFORTS if self.switches(name) is not None]
        if taken not in ([], ["none"]):
            raise Unsupported(f"{field} {effort[:40]!r}: {self.base.name} takes {', '.join(taken)}; send one of them", param=field)
        what = "doesn't think before it answers" if taken else "always thinks as much as it likes"
        raise Unsupported(f"{field} {effort[:40]!r}: {self.base.name} {what}; leave it out", param=field)


class ChatModels:
    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self._known: dict[str, ChatModel] = {}
        self._loading: dict[str, asyncio.Task[ChatModel]] = {}

    async def get(self, base: BaseModelInfo) -> ChatModel:
        """Raises Unavailable while an embedded model is still being converted, Unsupported where there is no usable tokenizer."""
        known = self._known.get(base.name)
        if known is not None:
            return known
        task = self._loading.get(base.name)
        if task is None:
            task = self._loading[base.name] = asyncio.create_task(asyncio.to_thread(self._load, base))
            task.add_done_callback(lambda _: self._loading.pop(base.name, None))
        self._known[base.name] = found = await asyncio.shield(task)
        return found

    def _load(self, base: BaseModelInfo) -> ChatModel:
        if not self.catalog.is_ready(base.name):
            raise Unavailable(f"base model {base.name} is being prepared; try again in a moment", retry_after=2)
        folder = Path(base.path)
        tokenizer = tokenizers.load(folder)
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
        except (OSError, ValueError) as error:
            raise NotFound(f"base model {base.name} can't be read: {error}", param="model") from None
        return ChatModel(base, tokenizer, tools.format_for(tokenizer, base.architecture, str(kind)))
