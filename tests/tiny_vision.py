"""A model that sees, small enough for every test: Qwen3-VL's architecture with random weights, a real tokenizer, its way with images."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from everlearn.types import ImageSpan, VisionInfo
from tests.tiny import make_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
START, END, PAD, VIDEO = 3, 4, 5, 6
VOCAB, CONTEXT = 512, 512
PATCH, MERGE, FRAMES = 8, 2, 2
LEAST, MOST = 1024, 16384  # pixels: 4 to 64 tokens
VISION = VisionInfo(PATCH, MERGE, FRAMES, LEAST, MOST, [0.5] * 3, [0.5] * 3, PAD, START, END)
# As Qwen3-VL's own goes through a message.
CHAT_TEMPLATE = """{%- set image_count = namespace(value=0) -%}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                {%- set image_count.value = image_count.value + 1 %}
                {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.15,
}


def make_tiny_vision_model(folder: Path, experts: bool = False) -> Path:
    """Writes config, weights, tokenizer, template and image settings into `folder`; the seed is fixed."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    ids = {"image_token_id": PAD, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if experts:
            moe = Qwen3VLMoeConfig(text_config={**TEXT, **EXPERTS}, vision_config=TOWER, tie_word_embeddings=False, **ids)
            Qwen3VLMoeForConditionalGeneration(moe).save_pretrained(folder)
        else:
            config = Qwen3VLConfig(text_config=TEXT, vision_config=TOWER, tie_word_embeddings=False, **ids)
            Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer(folder, VOCAB, SPECIAL)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    processor: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": LEAST, "longest_edge": MOST},
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGE,
        "image_mean": VISION.mean,
        "image_std": VISION.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def picture(seed: int, width: int = 40, height: int = 32, format: str = "PNG") -> bytes:
    """A file of random colours in blocks, so that it survives being resized."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    out = BytesIO()
    blocks.resize((width, height), Image.Resampling.NEAREST).save(out, format)
    return out.getvalue()


def span(start: int, data: bytes, vision: VisionInfo = VISION) -> ImageSpan:
    from everlearn.render.patches import grid_of

    with Image.open(BytesIO(data)) as image:
        return ImageSpan(start, *grid_of(*image.size, vision, "image"), data)


def row_of(parts: list[list[int] | bytes], vision: VisionInfo = VISION) -> tuple[list[int], list[ImageSpan]]:
    """Tokens and images of a row: texts are token ids, images are files (and stand between START and END)."""
    tokens: list[int] = []
    images: list[ImageSpan] = []
    for part in parts:
        if isinstance(part, bytes):
            tokens.append(START)
            images.append(span(len(tokens), part, vision))
            tokens += [PAD] * images[-1].num_tokens + [END]
        else:
            tokens += part
    return tokens, images
