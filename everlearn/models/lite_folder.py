"""From a language model's folder and a tower to a folder of Lite-VLM (lite_vlm.py) that everlearn serves.

The tokenizer stays as it is, but three of its special tokens get names for images: the language model must have three that it never
uses, as most vocabularies do. Its chat template is replaced by ChatML that shows images, without a system message of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from everlearn.errors import Unsupported
from everlearn.models.architecture import read_config
from everlearn.models.efficientnet_lite import EfficientNetLiteModel, image_settings
from everlearn.models.lite_vlm import LiteVlmConfig, LiteVlmForConditionalGeneration

NAMES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CHATML = ("<|im_start|>", "<|im_end|>")
KEPT = ("bos_token", "eos_token", "pad_token", "unk_token")


def assemble(text_folder: Path, tower_folder: Path, grid: int, seed: int = 0) -> LiteVlmForConditionalGeneration:
    """Both models in one, float32, with a projector that knows nothing yet. Its features begin as large as a token's embedding."""
    config = read_config(text_folder)
    if getattr(config, "vision_config", None) is not None:
        raise Unsupported(f"{text_folder} holds a model that sees already; name a folder of a language model")
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id"), free_tokens(text_folder), strict=True))
    tower = EfficientNetLiteModel.from_pretrained(tower_folder, local_files_only=True, use_safetensors=True)
    text = AutoModelForCausalLM.from_pretrained(text_folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    whole = LiteVlmConfig(text_config=config, vision_config=tower.config, grid=grid, **ids)
    model: Any = LiteVlmForConditionalGeneration(whole)
    model.model.visual.tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.get_decoder().state_dict())
    model.lm_head.weight = model.get_input_embeddings().weight if config.tie_word_embeddings else text.lm_head.weight
    model.eval().requires_grad_(False)
    projector, size = model.model.visual.projector, float(model.get_input_embeddings().weight.pow(2).mean().sqrt())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, gain in ((projector.linear_1, 1.4), (projector.linear_2, size / 0.6)):
            layer.weight.normal_(0.0, gain / layer.in_features**0.5, generator=generator)
            layer.bias.zero_()
    made: LiteVlmForConditionalGeneration = model
    return made


def write(model: LiteVlmForConditionalGeneration, text_folder: Path, folder: Path) -> Path:
    """The whole folder: weights, configuration, tokenizer, template, settings of images."""
    model.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    _write(folder / "config.json", config)
    settings = image_settings(model.config.vision_config)
    _write(folder / "preprocessor_config.json", settings)
    names = dict(zip(free_tokens(text_folder), NAMES, strict=True))
    tokenizer = json.loads((text_folder / "tokenizer.json").read_text(encoding="utf-8"))
    old = {token["content"]: names[token["id"]] for token in tokenizer["added_tokens"] if token["id"] in names}
    for token in tokenizer["added_tokens"]:
        token["content"] = old.get(token["content"], token["content"])
    tokenizer["model"]["vocab"] = {old.get(token, token): number for token, number in tokenizer["model"]["vocab"].items()}
    _write(folder / "tokenizer.json", tokenizer)
    given = json.loads((text_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {name: given[name] for name in (*KEPT, "tokenizer_class", "model_max_length", "add_prefix_space") if name in given}
    _write(folder / "tokenizer_config.json", {**kept, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE})
    if (text_folder / "generation_config.json").is_file():
        (folder / "generation_config.json").write_text((text_folder / "generation_config.json").read_text())
    return folder


def free_tokens(text_folder: Path) -> list[int]:
    """Three special tokens that no template and no setting of the language model names: the last ones. Where names for images are there
    already, it is those."""
    added = json.loads((text_folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or []
    ids = {token["content"]: int(token["id"]) for token in added if token.get("special")}
    if all(name in ids for name in NAMES):
        return [ids[name] for name in NAMES]
    settings = json.loads((text_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    used = {value.get("content") if isinstance(value, dict) else value for value in (settings.get(name) for name in KEPT)}
    template = str(settings.get("chat_template") or "")
    free = sorted(number for token, number in ids.items() if token not in used and token not in CHATML and token not in template)
    if len(free) < len(NAMES) or any(token not in ids for token in CHATML):
        raise Unsupported(
            f"{text_folder}: its tokenizer needs {' and '.join(CHATML)} and {len(NAMES)} special tokens that nothing uses, and has "
            f"{len(free)} of those; choose a language model like SmolLM2"
        )
    return free[-len(NAMES) :]


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
