"""`everlearn checkpoint export` and `import`, from a folder, from the home folder, and from a running server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from everlearn.cli.main import run
from tests.live import KEY, LiveServer


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def saved(server: LiveServer) -> dict[str, str]:
    """tinker:// paths of a run's training state and sampler weights after one step."""
    import tinker
    from tinker import types

    tokens = [5, 6, 7, 8, 9, 10]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 5}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        training = service.create_lora_training_client(server.model, rank=4).result()
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.05)).result()
        state, sampler = training.save_state("one").result(), training.save_weights_for_sampler("two").result()
    return {"weights": state.path, "sampler_weights": sampler.path}


def export(server: LiveServer, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    capsys.readouterr()
    code = run(["-f", "json", "--config", str(server.home / "everlearn.toml"), "checkpoint", "export", *argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_export_from_the_home_folder(form: str, kind: str, server: LiveServer, saved: dict[str, str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    report = export(server, capsys, saved[kind], "--format", form, "--out", str(out), "--home", str(server.home))
    assert report["largest_logprob_difference"] < 1e-4 < report["adapter_effect"] and report["base"] == "tiny"  # type: ignore[operator]
    assert (out / ("adapter_config.json" if form == "peft" else "config.json")).exists()


def test_export_from_the_server_then_import(server: LiveServer, saved: dict[str, str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "merged"
    report = export(server, capsys, saved["weights"], "--format", "merged", "--out", str(out), "--url", server.url, "--key", KEY)
    assert report["largest_logprob_difference"] < 1e-4 < report["adapter_effect"]  # type: ignore[operator]
    export(server, capsys, saved["weights"], "--format", "peft", "--out", str(tmp_path / "peft"), "--home", str(server.home), "--no-check")
    config = ["--config", str(server.home / "everlearn.toml")]
    assert run([*config, "checkpoint", "import", str(tmp_path / "peft"), "--base", "tiny", "--out", str(tmp_path / "back")]) == 0
    again = export(server, capsys, str(tmp_path / "back"), "--format", "peft", "--out", str(tmp_path / "peft2"))
    assert again["adapter_effect"] == report["adapter_effect"]


def test_export_for_vllm_says_how_to_serve_it(server: LiveServer, saved: dict[str, str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "support"
    report = export(
        server, capsys, saved["sampler_weights"], "--format", "vllm", "--out", str(out), "--home", str(server.home), "--no-check"
    )
    assert str(report["serve"]).endswith(f"--enable-lora --max-lora-rank 8 --lora-modules support={out}")
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "everlearn.json"}


@pytest.mark.parametrize(
    ("argv", "code", "what"),
    [
        (["tinker://x", "--format", "peft", "--out", "o"], 2, "is no checkpoint path"),
        (["absent", "--format", "peft", "--out", "o"], 4, "holds no adapter.safetensors"),
        (["tinker://r/weights/x", "--format", "peft", "--out", "o", "--url", "http://127.0.0.1:9"], 3, "no server answers"),
        (["absent", "--format", "gguf", "--out", "o"], 2, "is not one of"),
    ],
)
def test_refusals(argv: list[str], code: int, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "export", *argv]) == code
    assert what in capsys.readouterr().err
    assert not Path("o").exists()


def test_an_unknown_path_is_not_found(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["checkpoint", "export", "tinker://nobody/weights/x", "--format", "peft", "--out", "o", "--url", server.url, "--key", KEY]
    assert run(argv) == 4


def test_a_full_folder_is_kept(server: LiveServer, saved: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    config = ["--config", str(server.home / "everlearn.toml"), "--home", str(server.home)]
    assert run([*config, "checkpoint", "export", saved["weights"], "--format", "peft", "--out", "mine"]) == 2
    assert "isn't empty" in capsys.readouterr().err and Path("mine/thesis.txt").exists()


def test_without_peft_nothing_is_written(server: LiveServer, saved: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    config = ["--config", str(server.home / "everlearn.toml"), "--home", str(server.home)]
    argv = [*config, "checkpoint", "export", saved["weights"], "--out", "o"]
    assert run([*argv, "--format", "peft"]) == 1
    assert "pip install peft" in capsys.readouterr().err and not Path("o").exists()
    assert run([*argv, "--format", "peft", "--no-check"]) == 0
