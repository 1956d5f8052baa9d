"""What config.json says, as transformers understands it, and the model it describes without its weights.

Some makers give a known architecture a name of their own and ship code for it, which is never run here: ALIASES says what they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everlearn.errors import Unsupported

ALIASES = {"kimi_k2": "deepseek_v3"}  # model_type -> the one that transformers has


def read_json(path: Path) -> dict[str, Any]:
    """The config.json of a folder, or that file itself."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unsupported(f"{file} can't be read as JSON: {error}; name a folder in Hugging Face format, or its config.json") from error
    if not isinstance(values, dict) or not values.get("model_type"):
        raise Unsupported(f"{file} names no model_type; name a folder in Hugging Face format, or its config.json")
    return values


def read_config(path: Path) -> Any:
    """transformers' configuration object. Raises Unsupported for an architecture that it doesn't have."""
    from transformers import AutoConfig

    _register_ours()
    values = read_json(path)
    kind = values.pop("model_type")
    for key in ("auto_map", "quantization_config", "transformers_version"):
        values.pop(key, None)  # code that is never run; and what is quantised is read by weights.py
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = {key: value for key, value in values["text_config"].items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(ALIASES.get(kind, kind), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise Unsupported(f"{path}: transformers can't read this configuration of a {kind!r}: {str(error)[:300]}") from error


def _register_ours() -> None:
    """Architectures that are ours, not transformers'."""
    from everlearn.models import lite_vlm

    lite_vlm.register()


def auto_class(config: Any) -> Any:
    """The class of transformers that builds models of this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if getattr(config, "vision_config", None) is not None else AutoModelForCausalLM


def outline(config: Any) -> nn.Module:
    """The model on the meta device: every shape, no memory."""
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, dtype=torch.bfloat16)
    return model
