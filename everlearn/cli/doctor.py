"""`everlearn doctor`: checks this machine before any time is spent on it. Each failure comes with its fix.

torch is asked in a process of its own: the command line never imports it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from everlearn.cli.console import Console, Verb, pass_console
from everlearn.errors import EverlearnError

if TYPE_CHECKING:
    from everlearn.config import Settings

GIB = 2**30
ASK_TORCH = """
import torch
torch.ones(8, 8) @ torch.ones(8, 8)
cuda = torch.cuda.is_available()
names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if cuda else "cpu"
print(f"torch {torch.__version__} on {names}, {torch.get_num_threads()} threads")
"""


class Check(NamedTuple):
    """`state` is ok, note (works, but know this) or fail."""

    check: str
    state: str
    finding: str
    fix: str = ""


@click.command("doctor", cls=Verb)
@pass_console
def command(console: Console) -> None:
    """Check this machine; each failure comes with its fix."""
    checks = list(run_checks(console.settings()))
    console.table([check._asdict() for check in checks], ["check", "state", "finding", "fix"])
    failed = [check.check for check in checks if check.state == "fail"]
    if failed:
        raise EverlearnError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; apply the fixes above, then run it again")


def run_checks(settings: Settings) -> Iterator[Check]:
    yield _python()
    yield from _packages()
    yield _torch()
    yield _memory()
    yield _home(settings.home)
    yield _port(settings.api.host, settings.api.port)
    yield _store(settings.store_url)
    yield _model(settings)
    yield from _faults()


def _python() -> Check:
    return Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def _packages() -> Iterator[Check]:
    for name, why in (("tinker", "its types are the wire format"), ("transformers", "its models are the base models")):
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "fail", f"not installed ({why})", "pip install everlearn into this environment again")


def _torch() -> Check:
    try:
        answer = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Check("torch", "fail", "no answer within 120 s", "look at the load of this machine and of its GPU driver")
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        return Check("torch", "fail", last, "pip install --force-reinstall torch==2.13.0")
    return Check("torch", "ok", answer.stdout.strip())


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < 3 * GIB:
        return Check("memory", "note", f"{total / GIB:.1f} GiB", "the embedded model wants 3 GiB while it trains: close something large")
    return Check("memory", "ok", f"{total / GIB:.1f} GiB")


def _home(home: Path) -> Check:
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".doctor-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return Check("home", "fail", f"{home}: {error.strerror}", "choose a folder that you may write to with --home or EVERLEARN_HOME")
    free = shutil.disk_usage(home).free
    if free < 2 * GIB:
        return Check("home", "fail", f"{home}: {free / GIB:.1f} GiB free", "make 2 GiB free there, or choose another folder with --home")
    return Check("home", "ok", f"{home}: {free / GIB:.0f} GiB free")


def _port(host: str, port: int) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check(
                "port", "note", f"{host}:{port}: {error.strerror}", "see `everlearn ps` for a server there, or choose another --port"
            )
    return Check("port", "ok", f"{host}:{port} is free")


def _faults() -> Iterator[Check]:
    """Only where a test left them behind."""
    from everlearn.config import faults

    try:
        armed = [f"{fault.point} ({fault.kind})" for fault in faults()]
    except EverlearnError as error:
        yield Check("faults", "fail", error.message, "unset EVERLEARN_FAULT")
        return
    if armed:
        yield Check("faults", "note", f"a server will come to harm at {', '.join(armed)}", "unset EVERLEARN_FAULT, unless that is wanted")


def _guarded(name: str, probe: Callable[[], str], usual_fix: str) -> Check:
    try:
        return Check(name, "ok", probe())
    except EverlearnError as error:
        what, _, fix = error.message.rpartition("; ")
        return Check(name, "fail", what or fix, fix if what else usual_fix)
    except OSError as error:
        return Check(name, "fail", str(error), usual_fix)


def _store(url: str) -> Check:
    def probe() -> str:
        from everlearn.store.db import open_database

        database = open_database(url)
        try:
            return f"{database.dialect} opens, its tables are up to date"
        finally:
            database.close()

    return _guarded("store", probe, "see that the home folder, or the database of store.url, can be written")


def _model(settings: Settings) -> Check:
    from everlearn.models.catalog import Catalog

    waiting = ""

    def probe() -> str:
        nonlocal waiting
        catalog = Catalog(settings)
        info = catalog.default
        if not catalog.is_ready(info.name):
            waiting = info.name
        return f"{info.name}: {info.architecture}, context {info.max_context}"

    check = _guarded("model", probe, "name a usable one as models.default, or leave it out")
    if waiting:
        return Check("model", "note", f"{waiting} is not converted yet", f"the first start does it; or now: everlearn model add {waiting}")
    return check
