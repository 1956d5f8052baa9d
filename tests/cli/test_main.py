"""What every command shares: two output formats, two lines for an error, the exit codes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from everlearn.cli.main import ACTS, NOUNS, run

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path: Path) -> None:
    """Neither a settings file nor a home of the machine plays a part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("path", [[], *([name] for name in (*ACTS, *NOUNS))])
def test_help_of_everything(path, capsys):
    assert run([*path, "--help"]) == 0
    assert "Usage: everlearn" in capsys.readouterr().out


@pytest.mark.parametrize("path", [[], *([name] for name in NOUNS)])
def test_without_a_verb_the_help_is_no_error_message(path, capsys):
    assert run(path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Usage: {' '.join(['everlearn', *path])} ")


@pytest.mark.parametrize(
    ("argv", "code", "what"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["chatt"], 2, "No such command 'chatt'. Did you mean 'chat'?"),
        (["checkpoint", "exprot"], 2, "No such command 'exprot'. Did you mean 'export'"),
        (["chat", "support", "some", "words"], 2, "-m 'some words'"),
        (["chat", "support", "--set", "temperature", "nan"], 2, "temperature nan is no finite number"),
        (["chat", "support", "--set", "temperature", "1e999"], 2, "temperature 1e999 is no finite number"),
        (["chat", "support", "--set", "logit_bias", '{"5": Infinity}'], 2, "is no finite number"),
        (["chat", "support", "--set", "stop", '["END"'], 2, 'stop ["END" begins as JSON does and is none'),
        (["run", "show"], 2, "Missing argument 'RUN_ID'"),
        (["run", "list", "--limit", "0"], 2, "0 is not in the range"),
        (["-f", "xml", "ps"], 2, "'xml' is not one of"),
        (["run", "list", "--url", NOBODY], 3, f"no server answers at {NOBODY}"),
        (["ps", "--url", "nonsense://x"], 3, "no server answers"),
        (["config", "check", "absent.toml"], 4, "absent.toml does not exist"),
        (["config", "check", "."], 2, "config file . is a folder"),
        (["feedback", "add", "rec_1"], 2, "nothing is said"),
        (["feedback", "add", "rec_1", "--up", "--stars", "3"], 2, "2 things are said at once"),
        (["serve", "--port", "70000"], 2, "api.port = 70000"),
        (["serve", "no/such-model"], 4, "no/such-model"),
        (["serve", "--host", "0.0.0.0"], 2, "there is no key"),
        (["checkpoint", "delete", "--yes", "weights/x"], 2, "is no checkpoint path"),
        (["checkpoint", "delete", "tinker://r/weights/x"], 2, "add --yes"),
        (["checkpoint", "set-ttl", "tinker://r/weights/x"], 2, "either --ttl DURATION or --remove"),
        (["checkpoint", "set-ttl", "tinker://r/weights/x", "--ttl", "soon"], 2, "is no duration"),
    ],
)
def test_an_error_is_two_lines_and_an_exit_code(argv, code, what, capsys):
    assert run(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert lines[1].strip()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ('"42"', "42"),
        ("0.5", 0.5),
        ("true", True),
        ("END", "END"),
        ('["a", "b"]', ["a", "b"]),
        ('{"type": "json_schema", "json_schema": {"name": "x"}}', {"type": "json_schema", "json_schema": {"name": "x"}}),
    ],
)
def test_a_parameter_of_the_api_may_be_any_json(text, value):
    from everlearn.cli.chat import parsed

    found = parsed("name", text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "content", "what"),
    [
        (["deploy", "create", "given"], b'base = "smollm2"', "the deployment has no name"),
        (["deploy", "change", "given"], b'base = "smollm2"', "the deployment has no name"),
        (["deploy", "create", "given"], "name = 'caf\xe9'".encode("latin-1"), "given is not UTF-8"),
        (["checkpoint", "export", "tinker://r/weights/x", "--format", "peft", "--out", "given"], b"", "given is a file"),
        (["checkpoint", "export", "tinker://r/weights/x", "--format", "merged", "--out", "given/in/it"], b"", "given is a file"),
        (["checkpoint", "import", ".", "--base", "smollm2", "--out", "given"], b"", "given is a file"),
    ],
)
def test_a_file_that_is_not_what_is_asked_for_is_named(argv, content, what, capsys):
    Path("given").write_bytes(content)
    assert run(argv) == 2
    err = capsys.readouterr().err
    assert what in err and len(err.splitlines()) == 2
    assert Path("given").read_bytes() == content


def test_debug_shows_the_traceback():
    from everlearn.errors import NotFound

    with pytest.raises(NotFound):
        run(["--debug", "config", "check", "absent.toml"])


def test_results_are_tables_or_json(capsys):
    assert run(["config", "show", "--home", "/x", "--changed"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["setting", "value", "origin"]
    assert table[1].split() == ["home", "/x", "flag"]
    assert run(["-f", "json", "config", "show", "--home", "/x", "--changed"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"setting": "home", "value": "/x", "origin": "flag"}]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:s3cret@db:5432/x", "postgresql+psycopg://me:***@db:5432/x"),
        ("postgresql://me:s3/c@r:3t@db/x?connect_timeout=3", "postgresql://me:***@db/x?connect_timeout=3"),
        (
            "postgresql:///x?user=me&password=s3cret&sslpassword=s3cret&host=/run",
            "postgresql:///x?user=me&password=***&sslpassword=***&host=/run",
        ),
        ("postgresql://me@db/x", "postgresql://me@db/x"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
    ],
)
def test_the_database_s_password_is_not_shown(url, shown, monkeypatch, capsys):
    monkeypatch.setenv("EVERLEARN_STORE__URL", url)
    assert run(["-f", "json", "config", "show", "--changed"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"setting": "store.url", "value": shown, "origin": "env EVERLEARN_STORE__URL"}]
    assert run(["config", "show"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("url", ["mysql://me:s3cret@db/x", "postgresql://me:s3cret@db:s3cret@x/y", "//me:s3cret@db"])
def test_a_refused_database_s_password_is_not_shown(url, monkeypatch, capsys):
    monkeypatch.setenv("EVERLEARN_STORE__URL", url)
    assert run(["key", "list"]) == 2
    err = capsys.readouterr().err
    assert "store.url '" in err and "s3cret" not in err and len(err.splitlines()) == 2


def test_config_schema_and_check(capsys, tmp_path: Path):
    assert run(["config", "schema"]) == 0
    assert "EngineSettings" in json.loads(capsys.readouterr().out)["$defs"]
    (tmp_path / "everlearn.toml").write_text("[engine]\nthreads = 1\n")
    assert run(["config", "check"]) == 0
    assert "everlearn.toml: ok" in capsys.readouterr().err
    (tmp_path / "everlearn.toml").write_text("[engine]\nthread = 1\n")
    assert run(["config", "check"]) == 2
    assert "did you mean engine.threads?" in capsys.readouterr().err


def test_keys_from_making_to_revoking(capsys, tmp_path: Path):
    home = ["--home", str(tmp_path / "home"), "-f", "json"]
    assert run(["key", "create", "laptop", "--tenant", "research", "--scope", "sample", *home]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("tml-")
    assert (made["tenant"], made["scopes"]) == ("research", "sample")
    assert run(["key", "list", *home]) == 0
    listed = capsys.readouterr().out
    assert made["key"] not in listed
    assert json.loads(listed)[0]["revoked"] is None
    assert run(["key", "revoke", made["key_id"], *home]) == 2  # nobody is there to confirm
    assert run(["key", "revoke", made["key_id"], "--yes", *home]) == 0
    capsys.readouterr()
    assert run(["key", "list", *home]) == 0
    assert json.loads(capsys.readouterr().out)[0]["revoked"] is not None
    assert run(["key", "revoke", "key-unknown", "--yes", *home]) == 4


def test_a_key_of_another_tenant_says_what_it_does_not_see(capsys, tmp_path: Path):
    from everlearn.config import Settings
    from everlearn.store.db import open_database
    from tests.store.acts import new_run

    home = tmp_path / "home"
    assert run(["key", "create", "first", "--tenant", "research", "--home", str(home)]) == 0
    assert "warning" not in capsys.readouterr().err
    database = open_database(Settings(home=home).store_url)
    new_run(database, "default")
    database.close()
    assert run(["key", "create", "second", "--tenant", "research", "--home", str(home)]) == 0
    assert "doesn't see the training runs (1) and names of adapters (0) of tenant default" in capsys.readouterr().err
    assert run(["key", "create", "third", "--home", str(home)]) == 0
    assert "warning" not in capsys.readouterr().err


def test_keys_with_limits(capsys, tmp_path: Path):
    home = ["--home", str(tmp_path / "home"), "-f", "json"]
    limits = ["--rpm", "60", "--tpm", "1000", "--concurrency", "2", "--models", "support,tiny", "--models", "x@3", "--no-content"]
    assert run(["key", "create", "shop", "--scope", "read", *limits, *home]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["rpm"], made["tpm"], made["concurrency"], made["models"], made["content"]) == (60, 1000, 2, "support,tiny,x@3", False)
    assert run(["key", "limit", made["key_id"], "--rpm", "5", *home]) == 0
    now = json.loads(capsys.readouterr().out)
    assert (now["rpm"], now["tpm"], now["models"], now["content"]) == (5, None, None, False)
    assert run(["key", "limit", made["key_id"], "--rpm", "5", "--content", *home]) == 0
    assert json.loads(capsys.readouterr().out)["content"] is True
    assert run(["key", "create", "plain", *home]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["content"] is True
    assert run(["key", "limit", plain["key_id"], "--no-content", *home]) == 0
    assert json.loads(capsys.readouterr().out)["content"] is False
    assert run(["key", "list", *home]) == 0
    assert json.loads(capsys.readouterr().out)[0]["rpm"] == 5
    assert run(["key", "create", "bad", "--rpm", "0", *home]) == 2
    assert run(["key", "create", "bad", "--models", "x" * 400, *home]) == 2
    assert run(["key", "limit", "key-unknown", *home]) == 4


@pytest.mark.parametrize(("status", "code"), [("ready", 0), ("not ready", 1)])
def test_ps_fails_while_the_server_is_not_ready(status, code, monkeypatch, capsys):
    from everlearn.cli.client import Client

    monkeypatch.setattr(Client, "document", lambda _self, _path: {"status": status, "reason": "loading"})
    assert run(["ps", "--url", NOBODY]) == code
    assert "loading" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "code"), [(200, 0), (429, 1)])
def test_a_bench_with_any_error_fails(status, code, monkeypatch, capsys):
    from everlearn.cli import load

    async def half(*_given):
        return [load.Seen("a", 0.0, 200, seconds=1.0, tokens=2), load.Seen("a", 0.0, status, seconds=1.0, tokens=2)], 1.0

    monkeypatch.setattr(load, "run", half)
    assert run(["bench", "serve", "a", "--url", NOBODY]) == code
    assert f"{2 - code} of 2 answered" in capsys.readouterr().out


def test_every_exit_code_is_listed(capsys):
    from everlearn.cli.main import EXIT_CODES
    from everlearn.cli.retained import FELL

    assert run(["--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split()).partition("Exit codes: ")[2]
    assert {int(part.split()[0]) for part in listed.split(", ") if part[0].isdigit()} == {0, 1, *EXIT_CODES.values(), FELL, 130}


def test_names_from_clients_can_not_steer_the_terminal(capsys):
    from everlearn.cli.console import Console

    Console().table([{"name": "a\x1b[2Jb\n"}], ["name"])
    assert "\x1b" not in capsys.readouterr().out


def test_doctor_finds_a_home_that_can_not_be_written(capsys, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert run(["doctor", "--home", str(tmp_path / "file" / "home"), "-f", "json"]) == 1
    out, err = capsys.readouterr()
    checks = {check["check"]: check for check in json.loads(out)}
    assert checks["home"]["state"] == "fail"
    assert "--home" in checks["home"]["fix"]
    assert checks["torch"]["state"] == "ok"
    assert "checks failed" in err


def test_progress_is_lines_where_no_terminal_is(capsys):
    from everlearn.cli.console import Console

    console = Console()
    with console.progress("teaching", 40, lines=True) as bar:
        for step in range(40):
            bar.update(step + 1, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [f"teaching: {10 * tenth}% loss 0.5" for tenth in range(1, 10)]
    with console.progress("merging", 40) as bar:
        bar.update(20)
    console.quiet = True
    with console.progress("teaching", 40, lines=True) as bar:
        bar.update(20)
    assert capsys.readouterr().err == ""


def test_the_demo_s_last_line_leads_to_the_dashboard(capsys, tmp_path: Path):
    from everlearn.cli.console import Console
    from everlearn.cli.demo import end

    console = Console()
    console.home = tmp_path / "my home"
    end(console, "http://127.0.0.1:4711", stays=False)  # its own server, which ends
    line = capsys.readouterr().err
    assert f"everlearn serve --home '{console.home}'" in line and "http://127.0.0.1:8000/dashboard/deploys" in line
    console.url = "http://127.0.0.1:4711/"
    end(console, console.url, stays=False)
    assert capsys.readouterr().err.endswith(" http://127.0.0.1:4711/dashboard/deploys\n")


def test_commands_that_would_start_a_server_use_the_one_that_the_environment_names(monkeypatch):
    from contextlib import ExitStack
    from types import SimpleNamespace
    from typing import Any, cast

    from everlearn.cli import demo, own_server
    from everlearn.cli.console import Console

    asked: list[dict[str, Any]] = []

    class Service(ExitStack):
        def __init__(self, **given: Any):
            super().__init__()
            asked.append(given)

    monkeypatch.setitem(sys.modules, "tinker", SimpleNamespace(ServiceClient=Service))
    monkeypatch.setenv("EVERLEARN_URL", NOBODY)
    monkeypatch.setenv("EVERLEARN_API_KEY", "tml-environ")
    console = Console()
    for url, key in ((NOBODY, "tml-environ"), ("http://127.0.0.1:4711", "tml-flag")):
        with ExitStack() as stack:
            own_server.service(console, stack, cast("Any", None), "eval", "a test")
            assert stack.enter_context(demo._server(console, Path(), cast("Any", None))) == url
        assert (asked[-1]["base_url"], asked[-1]["api_key"]) == (url, key)
        console.url, console.key = "http://127.0.0.1:4711", "tml-flag"


def test_why_a_server_did_not_start_is_told_with_its_way_out(tmp_path: Path):
    from everlearn.demo.server import _last_words

    log = tmp_path / "log"
    for text, words in (
        ("", ("it printed nothing", "")),
        ("INFO a\n  last\n\n", ("last", "")),
        ("INFO a\nerror: port 1 is taken\n       choose another\nINFO b\n", ("port 1 is taken", "choose another")),
        ("error: no\nINFO b\n", ("no", "")),
    ):
        log.write_text(text)
        assert _last_words(log) == words


def test_the_demo_ends_with_what_to_type_next(capsys, tmp_path: Path):
    from everlearn.cli.console import Console
    from everlearn.cli.demo import next_steps
    from everlearn.demo.grade import Row
    from everlearn.demo.run import Outcome

    row = Row("taught", "Who's there?", ["a dog"], "", "", False, True)
    outcome, console = Outcome([], [row], [], "tinker://r/sampler_weights/handbook", {}), Console()
    next_steps(console, outcome)
    lines = capsys.readouterr().err.splitlines()
    assert [shlex.split(line) for line in lines[1:]] == [["everlearn", "serve"], ["everlearn", "chat", outcome.path, "-m", "Who's there?"]]
    console.home = tmp_path / "my home"
    next_steps(console, outcome)
    assert all(shlex.split(line)[-2:] == ["--home", str(console.home)] for line in capsys.readouterr().err.splitlines()[1:])
