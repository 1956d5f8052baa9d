"""A tiny model that thinks and fills in: the tests' model with `<think>`, `</think>` and three marks of a gap as tokens, and a template
that opens a thought in the prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}<think>\n{{ message['reasoning_content'] }}\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def make_thinking_model(tiny: Path, folder: Path) -> Path:
    """A copy of the tiny model in `folder`. The mark that ends a thought is likely, so that thoughts are short."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    shutil.copytree(tiny, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<think>", "</think>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    end = tokenizer.token_to_id("</think>")
    weights = load_file(folder / "model.safetensors")
    assert tokenizer.get_vocab_size() <= len(weights["lm_head.weight"])
    weights["lm_head.weight"][end] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder
