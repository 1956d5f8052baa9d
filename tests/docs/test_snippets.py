"""The Python that the README, the quickstart and the guide to reinforcement learning show runs as it stands there, on a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import LiveServer, came_to_its_end


def printed_by(text: str, server: LiveServer, folder: Path, **replaced: str) -> str:
    """What the Python of a page prints, run in `folder` with the server's address and model in place of those shown."""
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S))
    program = program.replace('"smollm2"', f'"{server.model}"').replace("http://127.0.0.1:8000", server.url)
    for name, value in replaced.items():
        assert f"{name}=" in program
        program = re.sub(rf"\b{name}=\d+", f"{name}={value}", program)
    environ = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    environ |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    environ["PYTHONUNBUFFERED"] = "1"  # what was printed is not lost to an abort after the last line (came_to_its_end)
    command = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environ, cwd=folder, check=False)
    assert came_to_its_end(ran), ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_page_s_python_trains_and_samples(root: Path, server: LiveServer, tmp_path: Path, page: str):
    printed = printed_by((root / page).read_text(encoding="utf-8"), server, tmp_path)
    losses = [float(line.split()[1]) for line in printed.splitlines() if re.fullmatch(r"\d+ [\d.]+", line)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_the_guide_to_reinforcement_learning_plays_and_trains(root: Path, server: LiveServer, tmp_path: Path):
    """Up to the environments of others, which need packages and models that aren't everywhere; two steps instead of forty."""
    text = (root / "docs/guides/reinforcement-learning.md").read_text(encoding="utf-8")
    printed = printed_by(text.partition("## Environments of others")[0], server, tmp_path, steps="2")
    assert "'episodes': 16" in printed and "'failed': 0" in printed
    assert len((tmp_path / "runs/sums/metrics.jsonl").read_text().splitlines()) >= 2
