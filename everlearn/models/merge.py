"""A checkpoint merged into its base model's weights: a Hugging Face folder that any server loads.

One tensor is in memory at a time: shards are read by memory map and written tensor by tensor. W + alpha/rank · B A is computed in
float32 and rounded once. A head that is tied to the embeddings is untied when the adapter changes it. No torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.models import export_experts, tensorfile
from everlearn.models.export import HEAD, Adapter, dtype_code, embedding_path, is_tied, new_folder, provenance, weight_files, write_json
from everlearn.models.tensorfile import FLOATS, Tensor, TensorFile

HEAD_WEIGHT = f"{HEAD}.weight"
INDEX = "model.safetensors.index.json"
# What makes a model folder besides weights. Code (.py) is never copied.
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
NOT_COPIED = ("config.json", "everlearn.json", INDEX)


def export_merged(adapter: Adapter, base: Path, out: Path, dtype: str = "keep", overwrite: bool = False,
                  progress: Callable[[int, int], None] | None = None) -> list[str]:  # fmt: skip
    """Writes base + adapter into `out`; gives warnings. `dtype` keep leaves every tensor's type as the base has it."""
    kind = None if dtype == "keep" else dtype_code(dtype)
    config = json.loads((base / "config.json").read_text())
    if config.get("quantization_config"):
        raise Unsupported(f"{base} holds quantized weights; merge into the unquantized model (--base FOLDER) or use --format peft")
    files = weight_files(base)
    untie = HEAD in adapter.paths and is_tied(base)
    if untie:
        files.pop(HEAD_WEIGHT, None)  # a copy that loading ignores; the true head is the embedding
    linear = [path for path in adapter.paths if not export_experts.is_expert(path)]
    weights = {path: _weight_of(path, files) for path in linear if not (untie and path == HEAD)}
    by_weight = {weight: path for path, weight in weights.items()}
    owners, in_turn = export_experts.owners(adapter, files, _spellings), export_experts.is_in_turn(base)
    shards: dict[str, list[Tensor]] = {}
    for name, file in files.items():
        tensor = _merged(adapter, by_weight[name], name, file, kind) if name in by_weight else None
        tensor = tensor or export_experts.merged(adapter, name, file, kind, in_turn, owners) or _converted(name, file, kind)
        shards.setdefault(file.path.name, []).append(tensor)
    if untie:
        embedding = embedding_path([name.removesuffix(".weight") for name in files if name.endswith(".weight")]) + ".weight"
        head = _merged(adapter, HEAD, embedding, files[embedding], kind)._replace(name=HEAD_WEIGHT)
        shards[files[embedding].path.name].append(head)
        for part in (config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))):
            part["tie_word_embeddings"] = False
    if kind is not None:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
        config.setdefault("dtype", dtype)
    with new_folder(out, overwrite) as work:
        _write_shards(work, shards, progress)
        write_json(work / "config.json", config)
        write_json(work / "everlearn.json", provenance(adapter, "merged", dtype))
        for path in base.iterdir():
            wanted = path.suffix in COPIED or path.name.split(".")[0] in ("LICENSE", "NOTICE")
            if wanted and path.is_file() and path.name not in NOT_COPIED:
                shutil.copyfile(path, work / path.name)
    return ["lm_head was tied to the embeddings and isn't any more: the folder holds both"] if untie else []


def _write_shards(work: Path, shards: dict[str, list[Tensor]], progress: Callable[[int, int], None] | None) -> None:
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    done = 0
    for file, tensors in shards.items():
        tensorfile.write(work / file, tensors, {"format": "pt"}, partial(_report, progress, done, total) if progress else None)
        done += sum(tensor.nbytes for tensor in tensors)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int, _of: int) -> None:
    progress(before + done, total)


def _weight_of(path: str, files: dict[str, TensorFile]) -> str:
    """The tensor on disk that a module's weight is. transformers renames the parts of multimodal models while it loads them."""
    tail = path.partition("layers.")[2]
    for spelling in _spellings(path):
        if f"{spelling}.weight" in files:
            return f"{spelling}.weight"
    hint = next((name for name in files if tail and name.endswith(f"layers.{tail}.weight")), "none alike")
    raise Unsupported(f"the base folder has no weight for {path!r} (nearest: {hint}); is it the adapter's base model?")


def _spellings(path: str) -> list[str]:
    return [path, f"language_model.{path}", path.replace("model.language_model.", "language_model.model."),
            path.replace("model.language_model.", "model.")]  # fmt: skip


def _merged(adapter: Adapter, path: str, name: str, file: TensorFile, kind: str | None) -> Tensor:
    stored, shape = file.dtype(name), file.shape(name)
    if stored not in FLOATS:
        raise Unsupported(f"{name} of the base is stored as {stored}; an adapter can only be merged into {', '.join(FLOATS)}")
    needed = (adapter.tensors.shape(f"{path}.lora_B")[0], adapter.tensors.shape(f"{path}.lora_A")[1])
    if shape != needed:
        raise InvalidRequest(f"{name} has shape {list(shape)}, the adapter's update {list(needed)}; name its own base model", param="base")
    target = kind or stored
    return Tensor(name, target, shape, lambda: tensorfile.narrow(file.float32(name) + adapter.delta(path), target))


def _converted(name: str, file: TensorFile, kind: str | None) -> Tensor:
    stored = file.dtype(name)
    if kind is None or stored == kind or stored not in FLOATS:
        return file.copy(name)
    return Tensor(name, kind, file.shape(name), lambda: tensorfile.narrow(file.float32(name), kind))
