"""A process that speaks the engine's protocol without a model, for tests of the API's side of it: it starts in a moment, remembers
every effect in order, writes down what it was sent, and dies on request. `python -m tests.api.peer ENDPOINT`.

The state of an adapter is the list of seqs whose effect it has; every optim_step answers with it, so a lost, doubled or misplaced
effect is visible in an answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import zmq

from everlearn.config import Settings
from everlearn.engine import protocol as p
from everlearn.store.folders import write_folder
from everlearn.types import Array, DoneResult, ForwardBackwardResult, OptimStepResult, SampledSequence, SampleResult, SavedResult


def main() -> None:
    ctypes.CDLL(None).prctl(1, 9)
    settings = Settings.model_validate_json(sys.stdin.read())
    socket = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    Peer(socket, settings.home).run()


class Peer:
    def __init__(self, socket: zmq.Socket[bytes], home: Path):
        self.socket, self.home = socket, home
        self.states: dict[str, list[int]] = {}
        self.heard = (home / "heard.jsonl").open("a")

    def emit(self, event: p.AnyEvent) -> None:
        self.socket.send(p.encode(event))

    def run(self) -> None:
        (self.home / "peer.pid").write_text(str(os.getpid()))
        while (self.home / "no-load").exists():
            self.emit(self.beat("loading m", time.time()))
            time.sleep(0.1)
        while (self.home / "no-start").exists():
            time.sleep(0.1)
        self.emit(p.Ready(os.getpid(), "cpu", "float32", 64, [], 0.0))
        while True:
            stuck = (self.home / "stuck").exists()
            self.emit(self.beat("train", time.time() - 1000) if stuck else self.beat("idle", time.time()))
            if not self.socket.poll(200):
                continue
            command = p.decode_command(self.socket.recv())
            name = type(command).__name__
            told = {k: getattr(command, k) for k in ("request_id", "model_id", "seq", "seqs", "folder") if hasattr(command, k)}
            self.heard.write(json.dumps({"op": name, "pid": os.getpid(), **told}) + "\n")
            self.heard.flush()
            if isinstance(command, p.Shutdown):
                os._exit(0)
            self.apply(command)

    def beat(self, activity: str, last_progress: float) -> p.Heartbeat:
        return p.Heartbeat(time.time(), 0, 0, 0, 0, 1, 7, 0, 0, 0, 0, activity, last_progress, 1)

    def apply(self, command: p.AnyCommand) -> None:
        match command:
            case p.Create() if (self.home / "no-create").exists():
                self.emit(p.Failed(command.request_id, "invalid_request", "as you wished"))
            case p.Create():
                self.states[command.model_id] = [0]
                self.emit(p.Completed(command.request_id, DoneResult()))
            case p.Restore() if (self.home / "no-restore").exists():
                self.emit(p.RestoreFailed(command.model_id, "as you wished"))
            case p.Restore():
                self.states[command.model_id] = json.loads((Path(command.folder) / "state.json").read_text())
            case p.OptimStep() if (self.home / "loses").exists():
                self.emit(p.RestoreFailed(command.model_id, "request 1, which succeeded before, has not come again"))
            case p.Unload():
                self.states.pop(command.model_id, None)
            case p.ForwardBackward():
                self.forward_backward(command)
            case p.OptimStep() if command.model_id not in self.states:
                self.emit(p.Failed(command.request_id, "not_found", "it is not loaded"))
            case p.OptimStep():
                self.states[command.model_id].append(command.seq)
                metrics = {f"{i}:{seq}": 1.0 for i, seq in enumerate(self.states[command.model_id])}
                self.emit(p.Completed(command.request_id, OptimStepResult(metrics)))
            case p.Save():
                size, digest = self.write(command.model_id, Path(command.folder))
                self.emit(p.Completed(command.request_id, SavedResult(size, digest)))
            case p.TakeSnapshot():
                state = self.states[command.model_id]
                folder = self.home / "snapshots" / command.model_id.replace(":", "_") / str(state[-1])
                size, _ = self.write(command.model_id, folder)
                self.emit(p.Snapshotted(command.model_id, state[-1], str(folder), size))
            case p.Sample():
                self.sample(command)

    def write(self, model_id: str, folder: Path) -> tuple[int, str]:
        return write_folder(folder, {"state.json": json.dumps(self.states[model_id]).encode()}, {"format": "peer"})

    def forward_backward(self, command: p.ForwardBackward) -> None:
        wish = command.loss_fn
        if wish == "die":
            os._exit(3)
        if wish == "fail":
            return self.emit(p.Failed(command.request_id, "invalid_request", "as you wished"))
        if wish == "replay fails" and (self.home / "no-replay").exists():
            return self.emit(p.Failed(command.request_id, "too_large", "as you wished"))
        if wish == "slow":
            time.sleep(float(command.config["seconds"]))
        if not command.forward_only:
            self.states[command.model_id].append(command.seq)
        self.emit(p.Completed(command.request_id, ForwardBackwardResult([], {"loss:sum": 0.0})))
        return None

    def sample(self, command: p.Sample) -> None:
        if command.params.max_tokens == 666:
            return  # never answers
        if command.params.max_tokens == 667:
            os._exit(3)
        if command.stream:
            self.stream(command)
            return
        tokens = Array("int32", [1], command.params.seed.to_bytes(4, "little"))
        sequence = SampledSequence("length", tokens, Array("float32", [1], bytes(4)))
        self.emit(p.Completed(command.request_id, SampleResult([sequence] * command.num_samples)))

    def stream(self, command: p.Sample) -> None:
        """Tokens 0, 1, 2, ... in pieces of two; half of them, and then its end, where the file "dies" says so. Tokens are others where
        the file "differs" says so."""
        number = command.params.max_tokens
        first = 100 if (self.home / "differs").exists() else 0
        tokens = list(range(first, first + number))
        for start in range(0, number, 2):
            if start >= number // 2 and (self.home / "dies").exists():
                (self.home / "dies").unlink()
                time.sleep(0.1)  # what was sent is on its way
                os._exit(3)
            piece = tokens[start : start + 2]
            reason = "length" if start + 2 >= number else ""
            self.emit(p.Tokens(command.request_id, [p.TokenPart(0, piece, [-1.0] * len(piece), stop_reason=reason)]))
        data = b"".join(token.to_bytes(4, "little") for token in tokens)
        sequence = SampledSequence("length", Array("int32", [number], data), Array("float32", [number], bytes(4 * number)))
        self.emit(p.Completed(command.request_id, SampleResult([sequence])))


if __name__ == "__main__":
    main()
