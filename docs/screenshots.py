"""Takes the pictures of the dashboard in docs/images: `python docs/screenshots.py`.

A server on the embedded model answers, is trained and plays; then a real Chromium opens each page in SHOTS. Needs the extra `test`,
Debian's chromium, and the embedded model; takes some minutes. With `--url` the pages of a server that runs are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from everlearn.store.placing import split_of

IMAGES = Path(__file__).parent / "images"
MAX_BYTES = 120_000
QUESTIONS = ("When does the workshop open?", "Who keeps the keys?", "What colour is the door?")


class Shot(NamedTuple):
    """A picture `dashboard-NAME.png` of `path`, where `{run}` is a run that learned, `{played}` one that played, and `{episode}` one that
    was corrected; `act` prepares the page."""

    name: str
    path: str
    scheme: str = "light"
    width: int = 1100
    height: int = 720
    act: Callable[[Page], Any] = lambda page: None


def correct(page: Page) -> None:
    """As it looks while somebody corrects the first answer."""
    page.keyboard.press("e")
    page.keyboard.type("At seven, on weekdays.")


SHOTS = [
    Shot("overview", "/dashboard"),
    Shot("phone", "/dashboard", "dark", 400, 720),
    Shot("runs", "/dashboard/runs"),
    Shot("run", "/dashboard/runs/{played}?show=reward/total&show=entropy&show=kl/k3&show=tokens/mean"),
    Shot("rollouts", "/dashboard/rollouts?run={played}"),
    Shot("episode", "/dashboard/episodes/{episode}", height=900),
    Shot("review", "/dashboard/review?model=support", act=correct),
    Shot("reward-model", "/dashboard/reward-model/support", height=900),
    Shot("deploy", "/dashboard/deploys/support", height=1100),
    Shot("system", "/dashboard/system", "dark"),
]


@contextmanager
def server(home: Path) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "everlearn.cli.main", "serve", "--home", str(home), "--port", str(port)])
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(url + "/readyz", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.loads(reply.read() or b"null")


def work(url: str, folder: Path) -> dict[str, str]:
    """Some of everything: answers with thumbs, a run that learns a sentence, and one that plays arithmetic."""
    import tinker
    from tinker import types

    from everlearn.rl.envs.arithmetic import Sums
    from everlearn.rl.prompts import ChatMl
    from everlearn.rl.server_sink import ServerSink
    from everlearn.rl.settings import Settings
    from everlearn.rl.sinks import Sinks
    from everlearn.rl.train import train

    model = json.loads(urllib.request.urlopen(url + "/v1/models", timeout=30).read())["data"][0]["id"]
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        request = urllib.request.Request(
            url + "/v1/chat/completions",
            json.dumps({"model": model, "messages": [message], "max_tokens": 24}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            record = reply.headers["x-everlearn-record"]
            reply.read()
        post(url + "/v1/feedback", {"record_id": record, "kind": "boolean", "value": True})
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    trainer = service.create_lora_training_client(base_model=model, rank=16, user_metadata={"lesson": "the workshop"}).result()
    tokenizer = trainer.get_tokenizer()
    tokens = tokenizer.encode("The workshop opens at seven.")
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    for _ in range(12):
        trainer.forward_backward([datum], "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    saved = trainer.save_weights_for_sampler("lesson").result().path
    post(url + "/v1/adapters", {"name": "workshop", "path": saved})
    settings = Settings(model, steps=8, rank=16, learning_rate=1e-4, max_tokens=8, seed=3)
    dataset = Sums(ChatMl.of(tokenizer), seed=3, below=20, groups_per_batch=4, group_size=4)
    with Sinks([ServerSink(folder, url)]) as sinks:
        train(service, settings, dataset, folder, decode=tokenizer.decode, on_step=sinks)
    run = {"run": trainer.model_id, "played": json.loads((folder / "run.json").read_text())["run_id"]}
    service.close("success").result()
    return run | {"episode": use(url, model)}


TRUTHS = {
    "When does the workshop open?": "At seven.",
    "Who keeps the keys?": "Maria keeps the keys.",
    "What colour is the door?": "The door is green.",
    "Where is the kiln?": "The kiln is in the yard.",
    "How long does glazing take?": "Glazing takes two days.",
    "Who teaches on Mondays?": "Jonas teaches on Mondays.",
}
RULE = {
    "owner": "maria",
    "corrections": {"min_right": 0.5},
    "canary": {"steps": [{"share": 0.5, "min_feedback": 1000}]},
    "guardrails": {"length": {"worse": "up", "margin": 0.1, "limit": 64.0, "min_num": 10}},
}


def use(url: str, model: str, rounds: int = 8) -> str:
    """A deployment whose users ask, judge and correct, up to a canary; an episode that was corrected."""
    import tinker

    from everlearn.cli.client import Client
    from everlearn.loop.runner import Runner

    update = {"paraphrases": 0, "rehearsed": 0, "epochs": 10, "batch": 6}  # the very questions come again: no other wordings are needed
    post(url + "/v1/deployments", {"name": "support", "description": {"base": model, "update": update, "gate": RULE, "settle": 0.0}})

    def ask(question: str, episode: str) -> tuple[str, bool]:
        body = {"model": "support", "messages": [{"role": "user", "content": question}], "max_tokens": 16, "temperature": 0}
        headers = {"content-type": "application/json", "x-everlearn-episode": episode}
        request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body | {"user": "anna"}).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as reply:
            record, answer = reply.headers["x-everlearn-record"], json.loads(reply.read())["choices"][0]["message"]["content"]
        good = TRUTHS[question].rstrip(".").lower() in answer.lower()
        post(url + "/v1/feedback", {"record_id": record, "kind": "boolean", "value": good})
        return record, good

    tickets = [f"ticket-{number}" for number in range(100) if split_of("default", f"ticket-{number}", 0.2) == "train"]
    for question, ticket in zip(TRUTHS, tickets, strict=False):
        post(url + "/v1/feedback", {"record_id": ask(question, ticket)[0], "kind": "demonstration", "text": TRUTHS[question]})
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        runner = Runner(Client(url, "tml-local"), service, "support")
        runner.begin("by hand")
        print(f"the deployment is in {runner.run().state}")
    for number in range(rounds):
        for question in TRUTHS:
            ask(question, f"visit-{number}-{question[:9]}".replace(" ", "-"))
    time.sleep(10)  # the reward model follows
    return tickets[0]


def take(page: Page, url: str, shot: Shot, runs: dict[str, str]) -> None:
    page.set_viewport_size({"width": shot.width, "height": shot.height})
    page.emulate_media(color_scheme=shot.scheme)  # type: ignore[arg-type]
    page.goto(url + shot.path.format(**runs))
    page.wait_for_timeout(1500)  # curves are drawn
    shot.act(page)
    image = Image.open(BytesIO(page.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
    path = IMAGES / f"dashboard-{shot.name}.png"
    image.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} is larger than {MAX_BYTES:,} bytes; show less")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a server that runs; without it one is started and put to work")
    parser.add_argument("--run", default="", help="with --url: a run that learned")
    parser.add_argument("--played", default="", help="with --url: a run that played")
    parser.add_argument("--episode", default="", help="with --url: an episode that was corrected")
    parser.add_argument("--only", nargs="*", default=[], help="names of pictures")
    parser.add_argument("--home", type=Path, help="a home folder whose embedded model is converted already")
    given = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if given.url:
            return shoot(given.url, {"run": given.run, "played": given.played, "episode": given.episode}, given.only)
        with server(given.home or Path(scratch) / "home") as url:
            shoot(url, work(url, Path(scratch) / "played"), given.only)


def shoot(url: str, runs: dict[str, str], only: list[str]) -> None:
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        for shot in SHOTS:
            if not only or shot.name in only:
                take(page, url, shot, runs)
        browser.close()


if __name__ == "__main__":
    main()
