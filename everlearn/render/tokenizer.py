"""A model folder's tokenizer, with what a chat needs of it: templates, special tokens, the bytes of a token.

Read from tokenizer.json and its neighbours alone; nothing of the model's code is run. It knows no messages and no tools. Text of
tokens is defined by bytes: the text of a sequence is its tokens' bytes as UTF-8, so a character that spans tokens is whole once its
last byte is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from everlearn.errors import Unsupported

TEMPLATE_BYTES = 1 << 20
LONG_CHARS = 4096
GUARD = "\ufdd0"  # a noncharacter: no text has it. Inside of a special token's text it keeps that text from becoming the token


def _byte_characters() -> dict[str, int]:
    """Byte-level tokenizers spell bytes as printable characters: those that are printable as themselves, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(rest)}


BYTE_OF = _byte_characters()


class ChatTokenizer:
    """`load` makes one. Safe to share between threads: nothing changes after it is made but caches."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], templates: dict[str, str]):
        self.tokenizer, self.config, self.templates = tokenizer, config, templates
        self.bos, self.eos = _content(config.get("bos_token")), _content(config.get("eos_token"))
        added = tokenizer.get_added_tokens_decoder()
        self.added: dict[str, int] = {token.content: number for number, token in added.items()}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self._spelling, self.strips_first_space = _spelling(tokenizer.decoder)
        self._bytes: dict[int, bytes] = {}
        spelled = sorted((token.content for token in added.values() if token.special and len(token.content) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spelled)) or "(?!)")

    @property
    def template(self) -> str | None:
        """The model's own chat template; None where it has none."""
        return self.templates.get("default")

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. Special tokens that stand in `text` become their ids, guarded ones (`guard`) what their letters are; `add_special`
        lets the tokenizer add its own around it."""
        if GUARD in text:
            first, *others = text.split(GUARD)
            return [*self.encode(first, add_special), *(number for piece in others for number in self.encode(piece))]
        if len(text) < LONG_CHARS:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special).ids
        else:  # a batch of one lets other threads of Python go on meanwhile, which `encode` doesn't
            ids = self.tokenizer.encode_batch([text], add_special_tokens=add_special)[0].ids
        return ids

    def guard(self, text: str) -> str:
        """`text` for a place where it is only text: a special token spelled out in it can't end a turn or begin another."""
        return self._special.sub(lambda found: found[0][0] + GUARD + found[0][1:], text.replace(GUARD, ""))

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, number: int) -> bytes:
        """What the token adds to a text. Ids beyond the vocabulary (a model's head may be padded) add nothing."""
        found = self._bytes.get(number)
        if found is None:
            token = self.tokenizer.id_to_token(number)
            found = b"" if token is None else self._spell(token)
            self._bytes[number] = found
        return found

    def token_text(self, number: int) -> str:
        """The token as text; part of a character shows as U+FFFD (its bytes are exact)."""
        return self.token_bytes(number).decode("utf-8", errors="replace")

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, special ones included."""
        number: int | None = self.tokenizer.token_to_id(token)
        return number

    def _spell(self, token: str) -> bytes:
        if self._spelling == "byte_level":
            if all(character in BYTE_OF for character in token):
                return bytes(BYTE_OF[character] for character in token)
            return token.encode("utf-8")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # a token that only looks like a byte
        return token.replace("\u2581", " ").encode("utf-8")


def load(folder: Path) -> ChatTokenizer:
    """Reads `folder`; tens of milliseconds, so callers keep the result. Raises Unsupported where there is no usable tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise Unsupported(f"the model in {folder.name} has no tokenizer.json, so text can't become tokens; send token ids", param="model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises the bare class
        raise Unsupported(f"the tokenizer of {folder.name} can't be read: {error}", param="model") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    return ChatTokenizer(tokenizer, config, _templates(folder, config))


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name; "default" is the one to use, "tool_use" (where there is one) when tools are given. A file wins over the settings."""
    found: dict[str, str] = {}
    written = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(written, str):
        found["default"] = written
    elif isinstance(written, list):
        found.update({entry["name"]: entry["template"] for entry in written})
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    found.update({name: path.read_text(encoding="utf-8") for name, path in files.items()})
    for name, template in found.items():
        if len(template) > TEMPLATE_BYTES:
            raise Unsupported(
                f"chat template {name!r} of {folder.name} has {len(template)} characters; {TEMPLATE_BYTES} is the limit", param="model"
            )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Unsupported(f"{path.parent.name}/{path.name} is not valid JSON: {error}", param="model") from None
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str:
    """A special token is written as its text, or as an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _spelling(decoder: Any) -> tuple[str, bool]:
    """How tokens spell bytes ("byte_level" or "sentencepiece"), and whether the first token of a text loses a leading space."""
    settings = json.loads(decoder.__getstate__()) if decoder is not None else {"decoders": []}  # as it stands in tokenizer.json
    steps = settings.get("decoders", [settings])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds:
        strips = any(
            (step["type"] == "Strip" and step.get("content") == " " and step.get("start"))
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        return "sentencepiece", strips
    raise Unsupported(
        f"this tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not known; byte-level and SentencePiece ones are",
        param="model",
    )
