"""A real PostgreSQL server in a temporary folder, for the tests that must hold on both databases.

Import the two fixtures into a conftest.py: `from tests.postgres import postgres_server, postgres_url`. The server runs as
the user `postgres` (or `nobody`) when the tests run as root, because PostgreSQL refuses root; without a binary the tests skip.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

# The tests kill our processes, never the machine, so the server may skip its fsyncs.
OPTIONS = {"fsync": "off", "shared_buffers": "32MB", "listen_addresses": "", "max_connections": "60", "autovacuum": "off"}


def find_binaries() -> Path | None:
    """The folder with `initdb` and `postgres`: the newest of Debian's, else what PATH names."""
    found = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists() and (path / "initdb").exists()]
    if found:
        return max(found, key=lambda path: float(path.parent.name))
    which = shutil.which("postgres")
    folder = Path(which).resolve().parent if which else None
    return folder if folder and (folder / "initdb").exists() else None


def server_user() -> str | None:
    """Whom to become; None: stay who we are."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The folder with the socket of a running server; its superuser is `everlearn`, without a password."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server here: neither /usr/lib/postgresql/*/bin nor a postgres with its initdb on PATH")
    folder = Path(tempfile.mkdtemp(prefix="everlearn-pg-", dir="/tmp"))  # socket paths are short and another user must get there
    user = server_user()
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    data = folder / "data"
    init = [binaries / "initdb", "-D", data, "-U", "everlearn", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(init, user=user, cwd=folder, check=True, capture_output=True)
    settings = [part for name, value in OPTIONS.items() for part in ("-c", f"{name}={value}")]
    command = [binaries / "postgres", "-D", data, "-k", folder, *settings]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        process = subprocess.Popen(command, user=user, cwd=folder, stdout=log, stderr=log)
    try:
        wait_until_up(folder, process)
        yield folder
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
        Path(log.name).unlink(missing_ok=True)


@pytest.fixture
def postgres_url(postgres_server: Path) -> Iterator[str]:
    with new_database(postgres_server) as url:
        yield url


@contextlib.contextmanager
def new_database(postgres_server: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a new, empty database; dropped afterwards."""
    name = f"test_{time.time_ns()}"
    with psycopg.connect(host=str(postgres_server), user="everlearn", dbname="postgres", autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield f"postgresql+psycopg://everlearn@/{name}?host={postgres_server}"
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def wait_until_up(folder: Path, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(host=str(folder), user="everlearn", dbname="postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
