"""Names of base models: what the owner named can be used, nothing else is opened."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from everlearn.config import BaseModelSettings, ModelsSettings, Settings
from everlearn.errors import InvalidRequest, NotFound
from everlearn.models import catalog, embedded, tensorfile
from everlearn.models.catalog import Catalog


def write_model(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "max_position_embeddings": 64, "eos_token_id": 5, **config}
    (folder / "config.json").write_text(json.dumps(values))
    weight = tensorfile.Tensor("model.embed_tokens.weight", "F32", (32, 4), lambda: np.zeros((32, 4), np.float32))
    tensorfile.write(folder / "model.safetensors", [weight])
    return folder


def settings(home: Path, *base: BaseModelSettings, **models: object) -> Settings:
    return Settings(home=home, models=ModelsSettings(base=list(base), **models))


def test_embedded_model_is_known_before_it_is_converted(tmp_path: Path) -> None:
    known = Catalog(settings(tmp_path))
    info = known.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (info.name, info.vocab_size, info.max_context, info.eos_token_ids) == ("smollm2", 49152, 8192, [2])
    assert known.default == info and not known.is_ready("smollm2")
    assert info.path == str(tmp_path / "models" / "smollm2") and not Path(info.path).exists()


def test_configured_folder_by_name_alias_public_alias_and_path(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "weights")
    base = BaseModelSettings(name="tiny", path=str(folder), aliases=["org/tiny"])
    known = Catalog(settings(tmp_path / "home", base, default="org/tiny", aliases={"Qwen/Qwen3-8B": "tiny"}))
    infos = [known.resolve(name) for name in ("tiny", "org/tiny", "Qwen/Qwen3-8B", str(folder))]
    assert all(info == infos[0] for info in infos) and known.default == infos[0]
    assert infos[0].aliases == ["Qwen/Qwen3-8B", "org/tiny"] and infos[0].num_parameters == 128 and infos[0].eos_token_ids == [5]
    assert [info.name for info in known.list()] == ["tiny", "smollm2"] and known.is_ready("tiny")


@pytest.mark.parametrize("name", ["", "nope", "/", "..", "../weights", "weights/../weights", "smollm2/", "a" * 5000, "tiny\n"])
def test_unknown_names_are_refused_and_name_the_known_ones(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "weights")
    with pytest.raises(NotFound, match=r"known are .*smollm2") as error:
        Catalog(settings(tmp_path)).resolve(name)
    assert len(error.value.message) < 600


def test_a_folder_that_nobody_configured_is_never_opened(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "secret")
    with pytest.raises(NotFound):
        Catalog(settings(tmp_path / "home")).resolve(str(folder))


def test_default_may_be_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "my-model")
    assert Catalog(settings(tmp_path, default=str(folder))).default.name == "my-model"
    with pytest.raises(NotFound, match="name a Hugging Face folder"):
        Catalog(settings(tmp_path, default=str(tmp_path / "absent")))


def test_a_folder_named_like_another_model_is_refused_with_a_way_out_that_works(tmp_path: Path) -> None:
    """Adapters of the embedded model must not come to stand on a folder that happens to have its name."""
    folder = write_model(tmp_path / "own models" / "smollm2")
    with pytest.raises(InvalidRequest, match="would be called 'smollm2'.*is the embedded model here") as refused:
        Catalog(settings(tmp_path, default=str(folder)))
    way = refused.value.message.partition("everlearn model add ")[2]
    path, _, name = shlex.split(way.partition(", and then")[0])
    catalog.add(settings(tmp_path), path, name=name)
    assert way.endswith(f"everlearn serve {name}") and Catalog(settings(tmp_path, default=name)).default.path == str(folder)
    assert Catalog(settings(tmp_path, default=str(folder))).default.name == name, "by its folder as well, now that it is known"
    assert Catalog(settings(tmp_path)).default.name == "smollm2"
    other = write_model(tmp_path / "elsewhere" / name)
    with pytest.raises(InvalidRequest, match=f"'{name}' is the model of .*own models.*model add .* --name my-{name}"):
        Catalog(settings(tmp_path, default=str(other)))


def test_cached_hub_id_is_found_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    snapshot = write_model(repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert Catalog(settings(tmp_path / "home", default="org/tiny")).default.path == str(snapshot)
    (repository / "refs" / "main").write_text("../../../../etc")
    with pytest.raises(NotFound, match="hf download org/tiny"):
        catalog.find_folder("org/tiny")


def test_nested_text_config_and_generation_config(tmp_path: Path) -> None:
    nested = {"vocab_size": 99, "max_position_embeddings": 77}
    folder = write_model(tmp_path / "vl", vocab_size=None, max_position_embeddings=None, text_config=nested)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    info = catalog.read_info("vl", folder, [])
    assert (info.vocab_size, info.max_context, info.eos_token_ids) == (99, 77, [7, 8])


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"vocab_size": "many", "max_position_embeddings": 1}'])
def test_broken_config_is_a_problem_of_that_entry_only(tmp_path: Path, content: str) -> None:
    folder = write_model(tmp_path / "broken")
    (folder / "config.json").write_text(content)
    known = Catalog(settings(tmp_path, BaseModelSettings(name="broken", path=str(folder))))
    assert [info.name for info in known.list()] == ["smollm2"]
    assert "config.json" in next(entry.problem for entry in known.entries() if entry.name == "broken")
    with pytest.raises(NotFound, match="broken"):
        known.resolve("broken")


def test_clashing_names_are_refused(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    first = BaseModelSettings(name="a", path=str(a), aliases=["x"])
    with pytest.raises(InvalidRequest, match="named twice"):
        Catalog(settings(tmp_path, first, BaseModelSettings(name="a", path=str(b))))
    with pytest.raises(InvalidRequest, match="'x' already means 'a'"):
        Catalog(settings(tmp_path, first, BaseModelSettings(name="b", path=str(b), aliases=["x"])))
    with pytest.raises(InvalidRequest, match="'ghost'"):
        Catalog(settings(tmp_path, first, aliases={"y": "ghost"}))
    with pytest.raises(InvalidRequest, match="no path"):
        Catalog(settings(tmp_path, BaseModelSettings(name="c")))


def test_added_models_are_kept_and_replaced(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "weights")
    home = settings(tmp_path / "home")
    catalog.add(home, str(folder), "mine", ["m"])
    assert Catalog(home).resolve("m").name == "mine"
    entry = catalog.add(home, str(folder), "mine", ["n"])
    assert entry.source == "added" and Catalog(home).resolve("n").name == "mine"
    with pytest.raises(NotFound):
        Catalog(home).resolve("m")
    with pytest.raises(InvalidRequest, match="already means"):
        catalog.add(home, str(folder), "other", ["n"])
    assert [item.name for item in catalog.added(home.home)] == ["mine"]
    with pytest.raises(InvalidRequest, match="is taken"):
        catalog.add(home, str(folder), "smollm2")


def test_announced_values_are_those_of_the_converted_folder(smollm2: Path) -> None:
    model = embedded.MODELS["smollm2"]
    info = catalog.read_info("smollm2", smollm2, [])
    assert (info.architecture, info.vocab_size, info.max_context) == (model.architecture, model.vocab_size, model.max_context)
    assert (tuple(info.eos_token_ids), info.num_parameters) == (model.eos_token_ids, model.num_parameters)
