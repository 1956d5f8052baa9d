"""Environments that hold an older SDK or another client each, with the dependencies that it asked for itself.

They are made with pip on first use, in EVERLEARN_TEST_SDK_CACHE or the user's cache folder, and kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SECONDS = 900


def cache() -> Path:
    given = os.environ.get("EVERLEARN_TEST_SDK_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "everlearn-tests"


def sdk_python(version: str) -> Path:
    """The interpreter of an environment with tinker==version; skips the test where pip can't make one."""
    return python_in(f"sdk-{version}", "tinker", version)


def python_with(package: str, version: str, *more: str) -> Path:
    """The same for another package; `more` is what it needs beside it, and doesn't ask for itself."""
    return python_in(f"{package}-{version}", package, version, *more)


def python_in(name: str, package: str, version: str, *more: str) -> Path:
    folder = cache() / name
    python = folder / "bin" / "python"
    if installed(python, package) == version and all(installed(python, one) for one in more):
        return python
    try:
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{package}=={version}", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no environment for {package} {version}: {error}")
    if done.returncode:
        pytest.skip(f"pip can't install {package} {version}: {done.stderr.strip()[-300:]}")
    return python


def installed(python: Path, package: str) -> str | None:
    if not python.is_file():
        return None
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def run_script(python: Path, script: Path, *arguments: str, timeout: float = 280) -> str:
    """Runs a script in that environment, with nothing of ours on its path; its output, or an AssertionError with all it said."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TINKER_", "EVERLEARN_"))}
    environment |= {"TINKER_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([str(python), str(script), *arguments], capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, (
        f"{sys.executable} {script.name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout
