"""What loading a folder costs: the model's own memory and little more, whatever the folder's files look like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from everlearn.models.architecture import read_config
from tests.models.quantised import quantise, write_shards

CHILD = """
import json, sys
from pathlib import Path
import torch
from everlearn.errors import Unsupported
from everlearn.models import load
from everlearn.types import BaseModelInfo

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def measured(folder):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    try:
        base = load.load_base(BaseModelInfo("m", folder, [], "", 1024, 256, []), torch.device("cpu"), torch.float32)
    except Unsupported as error:
        return {"refused": str(error), "peak": memory("VmHWM") - before}
    share = sum(t.nbytes for t in [*base.model.parameters(), *base.model.buffers()])
    return {"share": share, "peak": memory("VmHWM") - before, "kept": memory("VmRSS") - before}

measured(sys.argv[1])  # everything is imported and warm
print(json.dumps([measured(folder) for folder in sys.argv[2:]]))
"""
SIZES = {
    "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 1024, "num_experts_per_tok": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def model(folder: Path, layers: int, experts: int) -> Path:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=layers, num_experts=experts)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_loading_takes_the_models_share_and_little_more(tmp_path: Path) -> None:
    """Converted from bfloat16 to float32 on the way, and packed as it is on disk. A folder that is refused takes nothing, even where a
    tensor that is missing might be one that is too much."""
    plain = model(tmp_path / "plain", layers=3, experts=20)
    packed, _ = quantise(plain, tmp_path, "int4", lambda path: ".experts." in path, shards=4)
    write_shards(plain, load_file(plain / "model.safetensors"), 6)
    (plain / "model.safetensors").unlink()
    small = model(tmp_path / "small", layers=1, experts=2)
    odd, gone = model(tmp_path / "odd", layers=2, experts=20), "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(odd / "model.safetensors")
    write_shards(odd, {name.replace(gone, "model.layers.1.other"): tensor for name, tensor in tensors.items()}, 1)
    arguments = [sys.executable, "-c", CHILD, *map(str, (small, plain, packed, odd))]
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=280, check=True)
    *loaded, refused = json.loads(answer.stdout.splitlines()[-1])
    assert gone in refused["refused"] and refused["peak"] < 0.1 * (odd / "model.safetensors").stat().st_size, refused
    for folder, found in zip((plain, packed), loaded, strict=True):
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert found["share"] > 2 * largest  # the files are smaller than the model, or nothing would be shown
        assert found["peak"] <= found["share"] + 1.2 * largest, found
        assert found["kept"] <= 1.1 * found["share"], found


def test_a_known_architecture_under_its_makers_name(tmp_path: Path) -> None:
    values = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.Config"}, "n_routed_experts": 384}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert config.model_type == "deepseek_v3" and config.n_routed_experts == 384
    assert read_config(tmp_path / "config.json").n_routed_experts == 384
