"""Default < file < environment < flag, and refusals that name the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everlearn.config import client_environ, find_file, leaves, load, schema
from everlearn.errors import InvalidRequest, NotFound


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('home = "/data"\n[api]\nport = 1001\nhost = "::1"\n[engine]\nthreads = 3\n')
    return path


def test_each_source_wins_over_the_one_before(file: Path):
    environ = {"EVERLEARN_API__PORT": "1002", "EVERLEARN_ENGINE__THREADS": "4", "UNRELATED": "x"}
    settings, origins = load(file, environ, {"api.port": 1003, "engine.dtype": None})
    assert (settings.api.port, settings.engine.threads, settings.api.host, settings.engine.dtype) == (1003, 4, "::1", "auto")
    assert origins["api.port"] == "flag"
    assert origins["engine.threads"] == "env EVERLEARN_ENGINE__THREADS"
    assert origins["api.host"] == f"file {file}"
    assert origins["engine.dtype"] == "default"
    assert list(origins) == leaves()


def test_home_from_the_environment_is_absolute(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert load(None, {"EVERLEARN_HOME": "here"}).settings.home == tmp_path / "here"
    assert load(None, {"EVERLEARN_HOME": "~/x"}).settings.home == Path.home() / "x"


def test_the_working_folder_s_file_is_found(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert find_file() is None
    (tmp_path / "everlearn.toml").write_text("[api]\nport = 7\n")
    assert load(None, {}).settings.api.port == 7


def test_lists_and_tables_come_as_json():
    environ = {"EVERLEARN_MODELS__BASE": json.dumps([{"name": "a", "path": "/m"}]), "EVERLEARN_MODELS__ALIASES": '{"Qwen/Q": "a"}'}
    models = load(None, environ).settings.models
    assert models.base[0].name == "a"
    assert models.aliases == {"Qwen/Q": "a"}


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        ({"EVERLEARN_API__PROT": "1"}, {}, ["api.prot", "EVERLEARN_API__PROT", "did you mean api.port?"]),
        ({"EVERLEARN_THREADS": "1"}, {}, ["did you mean engine.threads?"]),
        ({"EVERLEARN_API": "1"}, {}, ["api", "is a section"]),
        ({"EVERLEARN_API__PORT": "many"}, {}, ["api.port = 'many'", "EVERLEARN_API__PORT", "valid integer"]),
        ({"EVERLEARN_MODELS__ALIASES": "{oops"}, {}, ["EVERLEARN_MODELS__ALIASES", "JSON"]),
        ({}, {"api.port": 70_000}, ["api.port = 70000", "flag", "65535"]),
        ({}, {"engine.dtype": "float16"}, ["engine.dtype = 'float16'", "float32"]),
        ({}, {"models.base": [{"name": "a", "pth": "x"}]}, ["models.base.0.pth", "known there: name, path, aliases"]),
        ({}, {"models.base": [{"path": "x"}]}, ["models.base.0.name", "required"]),
    ],
)
def test_a_refusal_names_key_value_rule_and_way_out(environ, flags, words):
    with pytest.raises(InvalidRequest) as caught:
        load(None, environ, flags)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_file_with_an_unknown_key_or_bad_syntax_is_refused(tmp_path: Path):
    path = tmp_path / "everlearn.toml"
    path.write_text("[engine]\nthread = 1\n")
    with pytest.raises(InvalidRequest, match=r"unknown setting engine\.thread .*did you mean engine\.threads"):
        load(path, {})
    path.write_text("[engine\n")
    with pytest.raises(InvalidRequest, match="not valid TOML"):
        load(path, {})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="not valid TOML"):
        load(path, {})
    with pytest.raises(NotFound, match="does not exist"):
        load(tmp_path / "other.toml", {})


def test_every_setting_says_what_it_is():
    described = json.dumps(schema())
    assert described.count('"description"') >= len(leaves())


def test_the_client_s_part_of_the_environment_is_no_setting():
    environ = {"EVERLEARN_URL": "http://h:1", "EVERLEARN_API_KEY": "tml-x"}
    assert client_environ(environ) == ("http://h:1", "tml-x", False)
    assert client_environ({"NO_COLOR": "1"}) == ("", "", True)
    assert load(None, environ).settings.api.port == 8000


def test_what_the_test_suite_reads_is_no_setting():
    assert load(None, {"EVERLEARN_TEST_HOME": "/x", "EVERLEARN_TEST_THREADS": "2"}).settings.api.port == 8000
    with pytest.raises(InvalidRequest, match="unknown setting testing"):
        load(None, {"EVERLEARN_TESTING": "1"})
