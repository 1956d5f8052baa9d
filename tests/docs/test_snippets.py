"""The Python that the README and the quickstart show runs as it stands there, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import LiveServer


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_page_s_python_trains_and_samples(root: Path, server: LiveServer, page: str):
    blocks = re.findall(r"^```python\n(.*?)^```$", (root / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    program = "\n".join(blocks).replace('"smollm2"', f'"{server.model}"')
    environ = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env={"PATH": "/usr/bin:/bin", **environ}, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    losses = [float(line.split()[1]) for line in ran.stdout.splitlines() if re.fullmatch(r"\d+ [\d.]+", line)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
