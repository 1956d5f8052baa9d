"""What every benchmark shares: a server to measure, the peer's turn after ours, and a result file that says where a number comes from."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TINKER_API_KEY", "tml-benchmark")
os.environ.setdefault("TINKER_TELEMETRY", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-16m", help="random-16m (made here), smollm2 (the embedded model), or a folder")
    parser.add_argument("--base-url", help="measure a Tinker server that runs already instead of starting everlearn")
    parser.add_argument("--base-model", help="the model's name on that server (default: the folder)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the server and of the peer")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds; ours and the peer's alternate")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-NAME.json)")
    return parser


def model_folder(name: str) -> Path:
    """The folder of a model by its short name; the random one is made once in the temporary folder."""
    if name == "smollm2":
        from everlearn.config import Settings
        from everlearn.models import embedded

        return embedded.ensure("smollm2", Settings().home)
    if name != "random-16m":
        return Path(name)
    return random_16m(Path(tempfile.gettempdir()) / "everlearn-random-16m")


def short(name: str) -> str:
    """The model's name in a result: a folder's own, without the places above it, which are this machine's."""
    return Path(name).absolute().name


def random_16m(folder: Path) -> Path:
    """A random Qwen3 of 16 M parameters with a vocabulary of 49,152: the head is most of its work."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


class Server:
    """A running server: its URL, the model's name on it, and its process tree (empty where it isn't ours)."""

    def __init__(self, url: str, model: str, pid: int | None, started: float):
        self.url, self.model, self.pid, self.started = url, model, pid, started

    def tree(self) -> list[int]:
        if self.pid is None:
            return []
        found, todo = [], [self.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                todo += [int(child) for child in path.read_text().split()]
        return found

    def memory(self) -> dict[str, float]:
        """MiB of the process tree: RSS summed, and PSS, which counts shared pages once."""
        rss = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in self.tree())
        pss = 0
        for pid in self.tree():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return {"rss_mib": rss / 2**20, "pss_mib": pss / 2**10}

    def cpu_seconds(self) -> float:
        total = 0
        for pid in self.tree():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS


@contextmanager
def server(args: argparse.Namespace, wait: bool = True, name: str = "bench", **settings: Any) -> Iterator[Server]:
    """Starts `everlearn serve` on `args.model`, or points at `args.base_url`."""
    folder = model_folder(args.model)
    if args.base_url:
        yield Server(args.base_url.rstrip("/"), args.base_model or str(folder), None, time.perf_counter())
        return
    home = Path(tempfile.mkdtemp(prefix="everlearn-bench-"))
    port = free_port()
    options = {"engine.threads": args.threads, **settings}
    lines = [f'models.default = "{name}"', *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    (home / "everlearn.toml").write_text("\n".join([*lines, "[[models.base]]", f'name = "{name}"', f'path = "{folder}"', ""]))
    command = [sys.executable, "-m", "everlearn.cli.main", "--config", str(home / "everlearn.toml"), "serve", "--port", str(port)]
    environment = {**os.environ, "EVERLEARN_HOME": str(home), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent)
    live = Server(f"http://127.0.0.1:{port}", name, process.pid, started)
    try:
        if wait:
            until(lambda: answers(live.url + "/readyz"), process)
        yield live
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def end_with_parent() -> None:
    """In a child: it is told to end when the benchmark ends, also by a signal. A server that is left over slows the next measurement."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def until(ready: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit("the server did not start; see server.log in its home folder")
        time.sleep(0.05)


def side_by_side(num: int, jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What the jobs give, as they are done, `num` of them at once. If one fails, those that haven't begun are left out."""
    pool = ThreadPoolExecutor(num)
    try:
        for future in as_completed([pool.submit(job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def random_rows(num: int, length: int | Callable[[random.Random], int], vocab: int, seed: int = 0) -> list[list[int]]:
    """Token rows, one longer than asked: a datum predicts each next token."""
    rng = random.Random(seed)
    lengths = [length(rng) if callable(length) else length for _ in range(num)]
    return [[rng.randrange(10, vocab) for _ in range(n + 1)] for n in lengths]


def as_datum(row: list[int]) -> Any:
    from tinker import types

    num = len(row) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=row[1:], dtype="int64", shape=[num]),
            "weights": types.TensorData(data=[1.0] * num, dtype="float32", shape=[num]),
        },
    )


def train_step(client: Any, datums: list[Any], learning_rate: float = 1e-4) -> None:
    """forward_backward and optim_step, sent together as a training loop does, and both answers."""
    from tinker import types

    gradient = client.forward_backward(datums, "cross_entropy")
    update = client.optim_step(types.AdamParams(learning_rate=learning_rate))
    gradient.result()
    update.result()


def alternate(ours: Callable[[], int], peer: Callable[[], int] | None, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens a second of each round, ours and the peer's in turn (A B A B), after one uncounted round of each."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for which, run in enumerate((ours, peer)):
            if run is None:
                continue
            started = time.perf_counter()
            tokens = run()
            if number:
                rates[which].append(tokens / (time.perf_counter() - started))
    return rates


def versus(name: str, ours: list[float], peer: list[float], unit: str = "tok/s") -> dict[str, Any]:
    """Prints the medians and their ratio; the row of the result file."""
    row: dict[str, Any] = {"everlearn": ours, "peer": peer, "median": statistics.median(ours)}
    line = f"{name:34} everlearn {row['median']:8.1f} {unit}"
    if peer:
        row["peer_median"] = statistics.median(peer)
        row["ratio"] = row["median"] / row["peer_median"]
        line += f"   peer {row['peer_median']:8.1f}   ratio {row['ratio']:.2f}"
    print(line, flush=True)
    return row


def origin(name: str, commit: str = "") -> dict[str, Any]:
    """Where numbers come from: command, time, commit, hardware, what else the machine did, versions. `commit` is for machines that have
    no git or no history beside the code."""
    import torch
    import transformers

    named = (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    hardware: dict[str, Any] = {"cpu": next(named, platform.processor()), "cores": os.cpu_count()}
    hardware["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        hardware |= {"gpu": gpu.name, "gpus": torch.cuda.device_count(), "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
        versions["cuda"] = str(torch.version.cuda)
    if importlib.util.find_spec("peft") is not None:
        versions["peft"] = importlib.metadata.version("peft")
    return {
        "benchmark": name,
        "command": "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "when": time.strftime("%F %T"),
        "commit": commit or commit_of_the_code(),
        "hardware": hardware,
        "load_average": os.getloadavg(),
        "versions": versions,
    }


def commit_of_the_code() -> str:
    """An empty text where the code is no git checkout, or there is no git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()


def write_result(args: argparse.Namespace, name: str, results: dict[str, Any]) -> None:
    """The raw numbers with their origin, as JSON."""
    out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(origin(name) | {"results": results}, indent=1) + "\n")
    print(f"written to {out}")
