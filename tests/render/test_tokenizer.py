"""A folder's tokenizer: bytes of tokens, special tokens, templates in all the places where folders keep them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from everlearn.errors import Unsupported
from everlearn.render.tokenizer import ChatTokenizer, load
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

TEXTS = ["Hello, world!", "naïve café 東京 🙂🙃 \u200d", "\t\n  x = {'a': 1}\r\n", "<|im_start|>user\nhi<|im_end|>", "\x00\x7f\u0600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, 512)
    return path


def test_bytes_of_tokens_are_the_text(tokenizer: ChatTokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.decode(ids) == text


def test_every_token_has_the_bytes_that_decoding_gives(tokenizer: ChatTokenizer):
    for number in range(tokenizer.tokenizer.get_vocab_size()):
        assert tokenizer.token_text(number) == tokenizer.decode([number])


def test_special_tokens(tokenizer: ChatTokenizer):
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    assert {start, end} <= tokenizer.special_ids and (tokenizer.bos, tokenizer.eos) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("<|im_start|>")[0] == start
    assert tokenizer.decode([start, *tokenizer.encode("hi"), end], skip_special=True) == "hi"
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.id_of("no such token") is None


def test_sentencepiece_spelling():
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x99>": 5, "<0x82>": 6, "<0xZZ>": 7}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = ChatTokenizer(inner, {}, {})
    assert tokenizer.strips_first_space
    assert tokenizer.decode([1, 2, 3, 4, 5, 6]) == "Hello world🙂"
    assert b"".join(map(tokenizer.token_bytes, [1, 2, 3, 4, 5, 6])).decode() == " Hello world🙂"
    assert tokenizer.token_bytes(7) == b"<0xZZ>" and tokenizer.token_text(3) == "\ufffd"


def test_added_tokens_are_spelled_as_they_stand(folder: Path):
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens([AddedToken("<｜tool▁sep｜>", special=True), AddedToken("two words", special=False)])
    tokenizer = ChatTokenizer(inner, {}, {})
    for token in ("<｜tool▁sep｜>", "two words"):
        assert tokenizer.token_bytes(tokenizer.added[token]).decode() == token == tokenizer.decode([tokenizer.added[token]])


def test_templates_are_found_wherever_folders_keep_them(folder: Path, tmp_path: Path):
    assert load(folder).template == CHAT_TEMPLATE
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert load(copy).templates == {"default": "D", "tool_use": "T"}
    (copy / "chat_template.jinja").write_text("F")
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load(copy).templates == {"default": "F", "tool_use": "T", "rag": "R"}


def test_tokens_may_be_written_as_objects_or_not_at_all(folder: Path, tmp_path: Path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<|im_end|>"}}))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.template) == ("", "<|im_end|>", None)


def test_a_folder_without_a_usable_tokenizer_says_so(tmp_path: Path):
    with pytest.raises(Unsupported, match=r"no tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Unsupported, match="can't be read"):
        load(tmp_path)
    with pytest.raises(Unsupported, match="decoder"):
        ChatTokenizer(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), {}, {})
