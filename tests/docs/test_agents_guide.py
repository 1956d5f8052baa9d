"""The Python of the guide to agents runs as it stands there, on a real server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.docs.test_snippets import printed_by
from tests.live import LiveServer


def test_the_guide_to_agents_plays_trains_and_resumes(root: Path, server: LiveServer, tmp_path: Path):
    text = (root / "docs/guides/agents-and-tools.md").read_text(encoding="utf-8").replace("http://127.0.0.1:8000", server.url)
    printed = printed_by(text, server, tmp_path).splitlines()
    assert "'maxLength': 20" in printed[0] and printed[1] == "12" and printed[2].startswith("error: the arguments of price don't fit")
    assert printed[3].startswith("{'episodes': 8, 'failed': 0") and printed[-1].endswith("answers were taken from before")
    assert int(printed[-1].split()[0]) >= 1
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[0]["members"][0]["turns"][0]["logs"]["record"].startswith("rec_")
