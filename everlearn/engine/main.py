"""The engine's process: `python -m everlearn.engine.main ENDPOINT`, settings as JSON on standard input.

Two threads besides the writer: this one owns the device, the other one the socket (ZeroMQ sockets have one owner too). The process
ends with its parent: an engine without an API process would hold the device for nobody.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from everlearn import faultpoints
from everlearn.config import Settings, faults
from everlearn.engine import protocol
from everlearn.engine.protocol import AnyCommand, AnyEvent, Failed, Heartbeat, Ready, RestoreFailed, Shutdown
from everlearn.errors import UserError

if TYPE_CHECKING:
    from everlearn.engine.engine import Engine

HEARTBEAT_SECONDS = 0.5
UNLOADABLE = 78  # exit status: the base model can't be served as it is, and another start wouldn't change that
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Mailbox:
    """Commands in, events out. Any thread may `emit`; the socket's thread does the rest."""

    def __init__(self, endpoint: str):
        self.context = zmq.Context()
        self.endpoint = endpoint
        self.inbox: queue.SimpleQueue[AnyCommand] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[AnyEvent] = queue.SimpleQueue()
        self.wake_in = self._pair(bind=True)
        self.wake_out = self._pair(bind=False)
        self.wake_lock = threading.Lock()
        self.heartbeat: Heartbeat | None = None
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="mailbox", daemon=True)

    def _pair(self, bind: bool) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.PAIR)
        socket.bind("inproc://wake") if bind else socket.connect("inproc://wake")
        return socket

    def emit(self, event: AnyEvent) -> None:
        self.outbox.put(event)
        with self.wake_lock, suppress(zmq.Again):
            self.wake_out.send(b"", zmq.DONTWAIT)

    def close(self) -> None:
        self.closing = True
        with self.wake_lock:
            self.wake_out.send(b"")
        self.thread.join(5)

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = self.context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 2000)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(self.endpoint)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self.wake_in, zmq.POLLIN)
        while not self.closing or not self.outbox.empty():
            ready = dict(poller.poll(100))
            if self.wake_in in ready:
                with suppress(zmq.Again):
                    while True:
                        self.wake_in.recv(zmq.DONTWAIT)
            if socket in ready:
                self._take(socket.recv())
            while not self.outbox.empty():
                socket.send(protocol.encode(self.outbox.get()))
        socket.close()

    def _take(self, message: bytes) -> None:
        """A command that can't be read (logged by another version of everlearn) fails; the thread lives for all others."""
        try:
            self.inbox.put(protocol.decode_command(message))
        except msgspec.MsgspecError as error:
            fields = msgspec.msgpack.decode(message, type=dict[str, Any])
            text = f"the engine can't read this {fields.get('op')} command: {error}"
            if fields.get("op") == "restore":
                self.outbox.put(RestoreFailed(fields.get("model_id", ""), text))
            else:
                self.outbox.put(Failed(fields.get("request_id", ""), "internal", text))


def main() -> None:
    """Loads the default base model, says Ready, then works until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the API process decides
    parent = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    keep_freed_memory(libc)
    started = time.perf_counter()
    settings = Settings.model_validate_json(sys.stdin.read())
    faultpoints.arm(faults(), settings.home)
    threads = settings.engine.threads or os.cpu_count() or 1

    import torch

    torch.set_num_threads(threads)
    from everlearn.models.imports import import_lean

    import_lean()
    from everlearn.engine.engine import Engine  # after set_num_threads: its import starts torch's pools

    mailbox = Mailbox(sys.argv[1])
    try:
        engine = Engine(settings, mailbox.emit)
        mailbox.thread.start()
        _beat_in_background(engine, mailbox, parent)  # from here on, silence means that it hangs
        served = engine.serve(settings.models.default)
    except UserError as error:
        sys.stderr.write(error.message + "\n")
        sys.exit(UNLOADABLE)
    mailbox.emit(
        Ready(
            pid=os.getpid(),
            device=str(engine.device),
            dtype=str(engine.dtype).removeprefix("torch."),
            kv_tokens=served.sampler.pool.num_tokens,
            models=engine.catalog.list(),
            load_seconds=time.perf_counter() - started,
            kv_token_bytes=served.sampler.token_bytes,
        )
    )
    _work(engine, mailbox)
    engine.close()
    mailbox.close()
    end()


def keep_freed_memory(libc: ctypes.CDLL) -> None:
    """What large tensors took stays with the process when they are freed. The C library would give their pages back, layer by layer, and
    the system would clear them again: half of the time of decoding over long contexts on a CPU. Does nothing where it isn't glibc."""
    if not hasattr(libc, "mallopt"):
        return
    # Older ones take no more than 32 MiB. Where none is taken, the other setting would keep glibc from finding its own threshold.
    if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25):
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def end() -> None:
    """Ends the process where a grammar still compiles, without taking the interpreter apart: its thread would come back from the library
    into what is no more, and the library's own code (xgrammar's) ends that with an abort."""
    from everlearn.engine.grammar import THREAD_NAME  # with torch, which main sets up first

    if any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _work(engine: Engine, mailbox: Mailbox) -> None:
    wait = 0.0
    while not engine.stopping:
        with suppress(queue.Empty):
            command = mailbox.inbox.get(timeout=wait) if wait > 0 else mailbox.inbox.get_nowait()
            while True:
                if isinstance(command, Shutdown):
                    engine.stopping = True
                engine.accept(command)
                command = mailbox.inbox.get_nowait()
        wait = engine.step()


def _beat_in_background(engine: Engine, mailbox: Mailbox, parent: int) -> None:
    """Heartbeats come from a thread of their own, so that a long batch is no silence; it also watches the parent."""

    def beat() -> None:
        while True:
            if os.getppid() != parent:
                os._exit(0)
            mailbox.emit(_heartbeat(engine))
            time.sleep(HEARTBEAT_SECONDS)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def _heartbeat(engine: Engine) -> Heartbeat:
    totals: dict[str, int] = {}
    for served in list(engine.served.values()):
        for name, value in served.sampler.stats().items():
            totals[name] = totals.get(name, 0) + value
    device_bytes, device_total = _device_memory(engine)
    return Heartbeat(
        unix_time=time.time(),
        training_queued=sum(len(run.queue) + (run.job is not None) for run in list(engine.runs.values())),
        sampling_running=totals.get("running", 0),
        sampling_waiting=totals.get("waiting", 0),
        kv_blocks_used=totals.get("kv_blocks_used", 0),
        kv_blocks_total=totals.get("kv_blocks_total", 0),
        trained_tokens=sum(served.trainer.trained_tokens for served in list(engine.served.values())),
        sampled_tokens=totals.get("sampled_tokens", 0),
        prefix_hit_tokens=totals.get("prefix_hit_tokens", 0),
        prompt_tokens=totals.get("prompt_tokens", 0),
        optimizer_steps=engine.optimizer_steps,
        activity=engine.activity,
        last_progress=engine.last_progress,
        preemptions=totals.get("preemptions", 0),
        grammar_compiles=totals.get("grammar_compiles", 0),
        sampling_compiling=totals.get("compiling", 0),
        deadlines_passed=totals.get("deadlines_passed", 0),
        step_tokens=totals.get("step_tokens", 0),
        step_sizes=[sum(sizes) for sizes in zip(*(served.sampler.step_sizes for served in list(engine.served.values())), strict=True)],
        device_bytes=device_bytes,
        device_total_bytes=device_total,
        rss_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _device_memory(engine: Engine) -> tuple[int, int]:
    """What torch's allocator holds of the GPU's memory, and how much that has; nothing of a CPU. The driver isn't asked what is free: this
    thread runs beside captures of graphs, which calls of other threads can spoil."""
    if engine.device.type != "cuda":
        return 0, 0
    import torch

    return torch.cuda.memory_reserved(engine.device), torch.cuda.get_device_properties(engine.device).total_memory


if __name__ == "__main__":
    main()
