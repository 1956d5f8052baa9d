"""Adapters out and in: everlearn's checkpoint folder <-> a PEFT folder.

The checkpoint folder is the canonical form: `adapter.safetensors` (float32, `<module path>.lora_A` [rank, in] and `.lora_B` [out, rank])
and manifest.json; the update of a layer is alpha / rank · B A. PEFT's LoRA computes the same, so export renames tensors and import
renames them back; experts, which it keeps in a form of its own, are turned by export_experts.py and import_experts.py. merge.py writes
the update into full weights, parity.py proves either. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from everlearn.errors import Conflict, InvalidRequest, NotFound, Unsupported
from everlearn.models import export_experts, tensorfile
from everlearn.models.tensorfile import Tensor, TensorFile
from everlearn.store.folders import read_manifest, verify_folder, write_folder

WEIGHTS_FILE = "adapter.safetensors"
FORMAT = "everlearn-adapter-1"
PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "lm_head"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Settings of PEFT's LoRA that change what the adapter computes and that the canonical form can't say; each with its harmless values.
PEFT_EXTRAS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None), "modules_to_save": (None, []),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "fan_in_fan_out": (False, None), "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}), "use_qalora": (False, None), "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
}  # fmt: skip

PEFT_PATTERNS = ("rank_pattern", "alpha_pattern")  # understood where they speak of experts (import_experts.py)


class Adapter:
    """A checkpoint folder, read lazily: `paths` are the adapted modules, `pair` the matrices of one."""

    def __init__(self, folder: Path, verify: bool = True):
        if not (folder / WEIGHTS_FILE).is_file():
            raise NotFound(f"{folder} holds no {WEIGHTS_FILE}; name the folder of a checkpoint or its tinker:// path", param="path")
        self.folder = folder
        self.manifest = verify_folder(folder) if verify else read_manifest(folder)
        if self.manifest.get("format") != FORMAT:
            form = self.manifest.get("format")
            raise Unsupported(f"{folder} has format {form!r}; this version of everlearn reads {FORMAT}", param="path")
        self.rank, self.alpha = int(self.manifest["rank"]), float(self.manifest["alpha"])
        self.base = str(self.manifest["base"])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @cached_property
    def tensors(self) -> TensorFile:
        return TensorFile(self.folder / WEIGHTS_FILE)

    @cached_property
    def paths(self) -> list[str]:
        paths = [name.removesuffix(".lora_A") for name in self.tensors.names() if name.endswith(".lora_A")]
        for path in paths:
            if export_experts.is_expert(path) and export_experts.sizes(self, path) is not None:
                continue
            a = self.tensors.shape(f"{path}.lora_A")
            b = self.tensors.shape(f"{path}.lora_B") if f"{path}.lora_B" in self.tensors else ()
            if len(a) != 2 or len(b) != 2 or a[0] != self.rank or b[1] != self.rank:
                rule = f"rank {self.rank} needs [{self.rank}, in] and [out, {self.rank}]"
                raise InvalidRequest(f"{self.folder}: {path} has A {list(a)} and B {list(b)}; {rule}")
        return paths

    def pair(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """A [rank, in] and B [out, rank], float32; on experts with an axis in front, unless they share one."""
        return self.tensors.float32(f"{path}.lora_A"), self.tensors.float32(f"{path}.lora_B")

    def delta(self, path: str) -> np.ndarray:
        """What merging adds to the module's weight: scale · B A, float32 [out, in]. (Experts: export_experts.delta.)"""
        a_RI, b_OR = self.pair(path)
        return (b_OR * np.float32(self.scale)) @ a_RI


# ---- to PEFT ----


def export_peft(
    adapter: Adapter, out: Path, base: Path | None = None, base_name: str = "", dtype: str = "float32", overwrite: bool = False
) -> list[str]:
    """Writes a PEFT folder; gives warnings for the reader. `base` (the base model's folder) lets target_modules be checked for
    ambiguity; `base_name` is what PEFT will load the base from (default: that folder)."""
    kind = dtype_code(dtype)
    tensors = []
    linear = [path for path in adapter.paths if not export_experts.is_expert(path)]
    for path in linear:
        for side in "AB":
            name = f"{path}.lora_{side}"
            load = partial(_narrowed, adapter.tensors, name, kind)
            tensors.append(Tensor(f"{PEFT_PREFIX}{path}.lora_{side}.weight", kind, adapter.tensors.shape(name), load))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or str(base or adapter.base),
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": target_modules(linear, base),
    }
    if len(linear) < len(adapter.paths):
        if base is None:
            raise InvalidRequest("the adapter changes experts; name the base model's folder, which says how it keeps them", param="base")
        experts = export_experts.to_peft(adapter, export_experts.is_in_turn(base))
        tensors += [Tensor(f"{PEFT_PREFIX}{name}", kind, shape, partial(_cast, load, kind)) for name, shape, load in experts.tensors]
        # PEFT takes modules of these names for the experts' on some architectures; as parameters they are what they are.
        odd = sorted(path for path in linear if path.rsplit(".", 1)[-1] in export_experts.MISTAKEN)
        config["target_modules"] = sorted(set(linear) - set(odd))
        config["target_parameters"] = experts.parameters + [f"{path}.weight" for path in odd]
        config |= {"rank_pattern": experts.ranks, "alpha_pattern": experts.alphas}
    with new_folder(out, overwrite) as work:
        tensorfile.write(work / PEFT_WEIGHTS, tensors, {"format": "pt"})
        write_json(work / PEFT_CONFIG, config)
        write_json(work / "everlearn.json", provenance(adapter, "peft", dtype))
    return _peft_warnings(adapter, base)


def _peft_warnings(adapter: Adapter, base: Path | None) -> list[str]:
    if HEAD not in adapter.paths:
        return []
    warnings = ["the adapter changes lm_head too, which not every server does; merged weights work everywhere"]
    if base is not None and is_tied(base):
        warnings.append("the base model ties lm_head to its embeddings; merging with PEFT would change both: use --format merged")
    return warnings


def _cast(load: Callable[[], np.ndarray], kind: str) -> np.ndarray:
    return tensorfile.narrow(load(), kind)


def _narrowed(file: TensorFile, name: str, kind: str) -> np.ndarray:
    return file.raw(name) if file.dtype(name) == kind else tensorfile.narrow(file.float32(name), kind)


def target_modules(paths: list[str], base: Path | None) -> list[str]:
    """PEFT selects modules by the end of their names: the short names, unless the base has other modules of the same short name."""
    short = sorted({path.rsplit(".", 1)[-1] for path in paths})
    if base is not None:
        names = {name.removesuffix(".weight") for name in weight_files(base) if name.endswith(".weight")}
        if {name for name in names if name.rsplit(".", 1)[-1] in short} - set(paths):
            return sorted(paths)
    return short


# ---- from PEFT ----


def import_peft(folder: Path, out: Path, base_name: str, base: Path, seed: int = 0) -> list[str]:
    """Writes a PEFT LoRA as a checkpoint folder of base model `base_name`; gives the layers that the adapter lacked.

    A checkpoint adapts all layers of attention, of the MLPs, or the head. Layers that the PEFT adapter leaves out get a fresh A
    and B = 0: the function stays the same and they can be trained.
    """
    from everlearn.models import import_experts  # imports torch
    from everlearn.models.lora import ROUTERS, kind_of

    config = _read_peft_config(folder)
    given = TensorFile(folder / PEFT_WEIGHTS)
    rank = int(config["r"])
    # rank-stabilised LoRA divides by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732)
    alpha = float(config["lora_alpha"]) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    shapes = linear_shapes(base)
    experts = import_experts.from_peft(folder, given, config, base, PEFT_PREFIX, alpha, _hint(folder))
    tensors: dict[str, Tensor] = {}
    for name in given.names():
        if experts is not None and name in experts.names:
            continue
        path, side = _peft_name(name, folder)
        if import_experts.has_pattern(config, path):
            raise Unsupported(f"{folder}: rank_pattern or alpha_pattern speaks of {path!r}; a checkpoint has one rank and one alpha")
        shape, wanted = given.shape(name), shapes.get(path)
        if path.rsplit(".", 1)[-1] in ROUTERS:
            raise Unsupported(f"{folder}: {path!r} chooses experts, and routers stay frozen here; train an adapter that leaves it out")
        if wanted is None or (path != HEAD and kind_of(path) is None):
            raise Unsupported(f"{folder}: {path!r} isn't a linear layer of attention, MLP or head of {base_name!r}; it can't be imported")
        if shape != ((rank, wanted[1]) if side == "A" else (wanted[0], rank)):
            raise InvalidRequest(f"{folder}: {name} has shape {list(shape)}; that isn't rank {rank} on {wanted[1]} -> {wanted[0]}")
        tensors[f"{path}.lora_{side}"] = Tensor(f"{path}.lora_{side}", "F32", shape, partial(given.float32, name))
    adapted = {name.rsplit(".", 1)[0] for name in tensors}
    kinds = {HEAD if path == HEAD else kind_of(path) for path in adapted} | ({"mlp"} if experts is not None else set())
    complete = [path for path in shapes if (HEAD if path == HEAD else kind_of(path)) in kinds]
    missing = [path for path in complete if path not in adapted]
    for path in missing:
        rows, columns = shapes[path]
        tensors[f"{path}.lora_A"] = Tensor(f"{path}.lora_A", "F32", (rank, columns), partial(_fresh, seed, path, rank, columns))
        tensors[f"{path}.lora_B"] = Tensor(f"{path}.lora_B", "F32", (rows, rank), partial(np.zeros, (rows, rank), np.float32))
    if odd := [path for path in complete if f"{path}.lora_A" not in tensors or f"{path}.lora_B" not in tensors]:
        raise InvalidRequest(f"{folder}: {odd[0]} has only one of lora_A and lora_B; the file is incomplete")
    of_experts = import_experts.tensors_of(experts, base, seed, _fresh) if experts is not None else {}
    layout, rank = (experts.layout, experts.rank) if experts is not None else ("off", rank)
    manifest = {
        "format": FORMAT, "base": base_name, "model_id": "", "rank": rank, "alpha": alpha, "seed": seed,
        "train_attn": "attn" in kinds, "train_mlp": "mlp" in kinds, "train_unembed": HEAD in kinds, "expert_lora": layout,
        "train_vision": "vision" in kinds,
        "step": 0, "seq": 0, "optimizer": False, "metadata": {"imported_from": folder.name},
    }  # fmt: skip
    ordered = [tensors[f"{path}.lora_{side}"] for path in complete for side in "AB"] + list(of_experts.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.parent / f".{out.name}.{secrets.token_hex(4)}.safetensors"
    try:
        tensorfile.write(staged, ordered)
        write_folder(out, {WEIGHTS_FILE: staged}, manifest)
    finally:
        staged.unlink(missing_ok=True)
    return missing + (experts.missing if experts is not None else [])


def _hint(folder: Path) -> str:
    """The layout on experts of the checkpoint that a folder was exported from; "" where it doesn't say."""
    path = folder / "everlearn.json"
    return str(json.loads(path.read_text()).get("expert_lora", "")) if path.is_file() else ""


def _read_peft_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise NotFound(f"{folder} is no PEFT folder: {PEFT_CONFIG} can't be read ({error})", param="path") from None
    if not (folder / PEFT_WEIGHTS).is_file():
        raise Unsupported(f"{folder} holds no {PEFT_WEIGHTS}; pickled .bin files can run code and aren't read: save it again with PEFT")
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA can be imported")
    on_experts = bool(config.get("target_parameters"))
    for key, harmless in PEFT_EXTRAS.items():
        if config.get(key) not in harmless and not (on_experts and key in PEFT_PATTERNS):
            raise Unsupported(f"{folder}: {key} is {config[key]!r}, which a checkpoint can't express; train without it or merge with PEFT")
    return config


def _peft_name(name: str, folder: Path) -> tuple[str, str]:
    for side in "AB":
        ending = f".lora_{side}.weight"
        if name.startswith(PEFT_PREFIX) and name.endswith(ending):
            return name[len(PEFT_PREFIX) : -len(ending)], side
    raise Unsupported(f"{folder}: tensor {name!r} is no LoRA matrix ({PEFT_PREFIX}<module>.lora_A.weight); it can't be imported")


def _fresh(seed: int, path: str, rank: int, columns: int) -> np.ndarray:
    stream = np.random.default_rng([seed, *hashlib.sha256(path.encode()).digest()[:8]])
    bound = 1 / math.sqrt(columns)
    return stream.uniform(-bound, bound, (rank, columns)).astype(np.float32)


# ---- shared with merge.py ----


def dtype_code(dtype: str) -> str:
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}", param="dtype")
    return DTYPES[dtype]


def weight_files(base: Path) -> dict[str, TensorFile]:
    """Every tensor of a base folder and the (memory-mapped) file that holds it."""
    files = [TensorFile(path) for path in sorted(base.glob("*.safetensors"))]
    index = read_index(base)
    if index is not None:  # consolidated copies of the same weights may lie beside the shards that count
        listed = set(index.values())
        files = [file for file in files if file.path.name in listed]
    elif len(files) > 1:
        files = [file for file in files if file.path.name == "model.safetensors"] or files
    if not files:
        raise NotFound(f"{base} holds no .safetensors file; convert its weights to safetensors first", param="base")
    return {name: file for file in files for name in file.names()}


def read_index(base: Path) -> dict[str, str] | None:
    """The shard that each tensor lies in, as model.safetensors.index.json has it; None where there is no such file."""
    path = base / "model.safetensors.index.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read as JSON ({error}); download or convert the folder again", param="base") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise InvalidRequest(f"{path} holds no weight_map from tensors to files; download or convert the folder again", param="base")
    return names


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules with a matrix `weight`, by path; a tied head is listed with its embedding's shape."""
    files = weight_files(base)
    matrices = {_module_of(name): file.shape(name) for name, file in files.items() if name.endswith(".weight")}
    matrices |= _packed_shapes(files)
    shapes = {path: (shape[0], shape[1]) for path, shape in matrices.items() if len(shape) == 2 and ".experts." not in path}
    if HEAD not in shapes and is_tied(base):
        shapes[HEAD] = shapes[embedding_path(list(shapes))]
    return shapes


def _packed_shapes(files: dict[str, TensorFile]) -> dict[str, tuple[int, ...]]:
    """Of layers whose tensors on disk have another shape than the layer: INT4 and NF4 write it down beside them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, file in files.items():
        path, _, suffix = name.partition(".weight")
        if suffix == "_shape":
            shapes[_module_of(f"{path}.weight")] = tuple(file.raw(name).tolist())
        elif suffix == ".quant_state.bitsandbytes__nf4":
            shapes[_module_of(f"{path}.weight")] = tuple(json.loads(file.raw(name).tobytes())["shape"])
    return shapes


def _module_of(name: str) -> str:
    """The module that a weight on disk belongs to. Some multimodal models keep their language model as it is by itself."""
    path = name.removesuffix(".weight")
    if path.startswith("language_model.model."):
        return "model.language_model." + path.removeprefix("language_model.model.")
    return path.removeprefix("language_model.") if path == f"language_model.{HEAD}" else path


def embedding_path(paths: list[str]) -> str:
    found = [path for path in paths if path.rsplit(".", 1)[-1] in ("embed_tokens", "wte")]
    if len(found) != 1:
        raise Unsupported(f"the base model has {len(found)} token embeddings where one was expected; its tied head can't be found")
    return found[0]


def is_tied(base: Path) -> bool:
    config = json.loads((base / "config.json").read_text())
    value = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    return bool(value) or (value is None and f"{HEAD}.weight" not in weight_files(base))


def provenance(adapter: Adapter, form: str, dtype: str) -> dict[str, Any]:
    """What an export was made from; kept beside the weights."""
    digest = hashlib.sha256((adapter.folder / "manifest.json").read_bytes()).hexdigest()
    source = {key: adapter.manifest.get(key) for key in ("base", "model_id", "rank", "alpha", "expert_lora", "step", "seq")}
    return {"format": f"everlearn-export-{form}", "dtype": dtype, "manifest_sha256": digest, **source}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that becomes `out` by a rename at the end, or disappears."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise Conflict(f"{out} exists and isn't empty; choose another folder, or overwrite it with --yes", param="out")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.tmp-{secrets.token_hex(4)}"
    work.mkdir()
    try:
        yield work
        for path in work.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            doomed = out.parent / f".{out.name}.old-{secrets.token_hex(4)}"
            out.rename(doomed)
            work.rename(out)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
