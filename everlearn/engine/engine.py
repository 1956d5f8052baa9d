"""The engine: one thread that owns the device.

Commands come in, events go out. Each training run has a queue that is worked off in order; the heads of all queues train together
(trainer.py), sampling runs beside them (sampler.py), and the scheduler says whose turn it is. Nothing here is durable: the log
and the snapshots that this thread hands to the writer rebuild it after a crash.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from everlearn.config import Settings
from everlearn.engine import persist
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.faults import as_error, whole
from everlearn.engine.protocol import (
    AnyCommand,
    AnyEvent,
    Cancel,
    Completed,
    Create,
    Failed,
    ForwardBackward,
    Load,
    Loaded,
    OptimStep,
    Publish,
    Replay,
    Restore,
    RestoreFailed,
    Sample,
    Save,
    Shutdown,
    Snapshotted,
    TakeSnapshot,
    Unload,
)
from everlearn.engine.run import QUEUED, Run
from everlearn.engine.sampler import Sampler
from everlearn.engine.scheduler import SAMPLE, TRAIN, Scheduler
from everlearn.engine.trainer import Job, Trainer
from everlearn.errors import InternalError, NotFound
from everlearn.faultpoints import around
from everlearn.models.bank import Bank
from everlearn.models.catalog import Catalog
from everlearn.models.load import BaseModel, load_base, pick_device
from everlearn.types import DoneResult, LoraSpec, OptimStepResult, Result, SavedResult

log = logging.getLogger(__name__)
CPU_MICRO_BATCH, GPU_MICRO_BATCH = 512, 8192
RECENT_SECONDS = 2.0
COMPILING_WAIT = 0.005


class Served:
    """A base model with everything that works on it."""

    def __init__(self, base: BaseModel, settings: Settings):
        self.base = base
        self.bank = Bank(settings.engine.adapter_slots, base.device, base.dtype)
        if base.vision is not None and settings.images.cache_bytes:
            base.vision.limit = settings.images.cache_bytes
        if settings.engine.recompute:
            base.enable_recompute()
        tokens = settings.engine.micro_batch_tokens or (CPU_MICRO_BATCH if base.device.type == "cpu" else GPU_MICRO_BATCH)
        self.trainer = Trainer(base, tokens)
        self.sampler = Sampler(base, settings, self.bank)


class Engine:
    """`emit` is called with events from this thread and from the writer's; it must be thread-safe."""

    def __init__(self, settings: Settings, emit: Callable[[AnyEvent], None]):
        self.settings, self.emit = settings, emit
        self.device, self.dtype = pick_device(settings.engine.device, settings.engine.dtype)
        self.catalog = Catalog(settings)
        self.served: dict[str, Served] = {}
        self.runs: dict[str, Run] = {}
        self.replays: dict[str, list[int]] = {}  # of runs that are about to be made again
        self.writer = persist.Writer()
        self.scheduler = Scheduler(settings.engine.sampling_share)
        self.optimizer_steps = 0
        self.activity = "idle"
        self.last_progress = time.time()
        self.stopping = False

    def serve(self, name: str) -> Served:
        """The base model of that name, loaded at first use."""
        info = self.catalog.resolve(name)
        if info.name not in self.served:
            self.activity = f"loading {info.name}"
            self.served[info.name] = served = Served(load_base(info, self.device, self.dtype, self.settings.engine.weights), self.settings)
            self.emit(Loaded(info.name, served.sampler.pool.num_tokens))
        return self.served[info.name]

    # --- commands ---

    def accept(self, command: AnyCommand) -> None:
        """Takes a command; whatever goes wrong with it is answered to its sender and harms nobody else."""
        try:
            self._dispatch(command)
        except Exception as error:
            self._fail(getattr(command, "request_id", ""), error)

    def _dispatch(self, command: AnyCommand) -> None:
        match command:
            case Sample():
                self.serve(command.base).sampler.add(command)
            case Cancel():
                for served in self.served.values():
                    served.sampler.cancel(command.request_id)
            case Create():
                with around("run.create"):
                    self._add_run(command.model_id, command.tenant, command.base, command.lora)
                self._complete(command.request_id, DoneResult())
            case Restore():
                self._restore(command)
            case Replay():
                self.replays[command.model_id] = command.seqs
            case Unload():
                self.runs.pop(command.model_id, None)
                self.replays.pop(command.model_id, None)
            case Shutdown():
                self.stopping = True
            case Load() if command.create:
                run = self._add_run(command.model_id, command.tenant, command.base, command.lora)
                try:
                    self._load(run, command)
                except Exception:
                    del self.runs[command.model_id]
                    raise
            case _:
                run = self._run(command.model_id)
                run.queue.append(command)
                self._advance(run)

    def _run(self, model_id: str) -> Run:
        if model_id not in self.runs:
            raise NotFound(f"training run {model_id!r} is not loaded; its creation failed or it was unloaded", param="model_id")
        return self.runs[model_id]

    def _add_run(self, model_id: str, tenant: str, base_name: str, lora: LoraSpec) -> Run:
        served = self.serve(base_name)
        shapes = served.base.adapter_shapes(lora)
        adapter = TrainingAdapter(model_id, tenant, served.base.info.name, lora, shapes, self.device, self.dtype)
        self.runs[model_id] = Run(adapter, self.replays.pop(model_id, ()))
        return self.runs[model_id]

    def _restore(self, command: Restore) -> None:
        """Whole or not at all: what follows must never be applied to an adapter that only looks like the restored one."""
        try:
            run = self._add_run(command.model_id, command.tenant, command.base, command.lora)
            persist.restore(run.adapter, Path(command.folder), optimizer=True)
            run.adapter.seq = int(persist.read_manifest(Path(command.folder))["seq"])
        except Exception as error:
            self.runs.pop(command.model_id, None)
            self.emit(RestoreFailed(command.model_id, f"{type(error).__name__}: {error}"))

    def _advance(self, run: Run) -> None:
        """Works off the run's queue up to the next forward_backward, which goes to the trainer. Of a lost run nothing is run."""
        while run.queue and run.job is None:
            command = run.queue.popleft()
            if run.lacks(command):
                self._lose(run, f"request {run.replays[0]}, which succeeded before, has not come again")
            if run.lost:
                continue
            try:
                self._execute(run, command)
            except Exception as error:
                self._fail(getattr(command, "request_id", ""), error)
                self._applied(run, command, succeeded=False)

    def _execute(self, run: Run, command: QUEUED) -> None:
        adapter = run.adapter
        match command:
            case ForwardBackward():
                run.job = self.served[adapter.base].trainer.start(command, adapter)
                run.last_job = time.monotonic()
                return
            case OptimStep():
                metrics = adapter.optim_step(command.adam)
                self.optimizer_steps += 1
                run.steps_since_snapshot += 1
                self._complete(command.request_id, OptimStepResult(metrics))
            case Save():
                state = persist.State(adapter, command.optimizer, gradient=False, metadata=command.metadata)
                self._write(state, command.folder, command.request_id)
            case Publish():
                bank = self.served[adapter.base].bank
                state = persist.State(adapter, optimizer=False, gradient=False, metadata=command.metadata)
                with around("version.publish"):
                    bank.publish(command.version, adapter.scale, adapter.pairs(), adapter.expert_scale)
                self._write(state, command.folder, command.request_id, on_disk=lambda: bank.written(command.version))
            case Load():
                self._load(run, command)
            case TakeSnapshot():
                self._snapshot(run)
                return
        self._applied(run, command)

    def _load(self, run: Run, command: Load) -> None:
        found = persist.find(run.adapter, Path(command.folder), command.optimizer)
        with whole(), around("weights.load"):
            persist.put(run.adapter, found)
        run.seconds_since_snapshot = float("inf")  # a snapshot soon, so that the checkpoint it came from may be deleted
        self._complete(command.request_id, DoneResult())

    def _applied(self, run: Run, command: QUEUED, succeeded: bool = True) -> None:
        if isinstance(command, TakeSnapshot):
            return
        if not run.settle(command.seq, succeeded):
            self._lose(run, f"request {command.seq} succeeded before and fails in the replay")
        elif isinstance(command, OptimStep):
            self._maybe_snapshot(run)

    def _lose(self, run: Run, problem: str) -> None:
        """The adapter lacks an effect that the log says it has. What has been sent already, 64 requests maybe, must not run upon it."""
        if not run.lost:
            run.lost = True
            self.emit(RestoreFailed(run.adapter.model_id, problem))

    # --- snapshots and folders ---

    def _maybe_snapshot(self, run: Run) -> None:
        """A snapshot when it costs less than a share of the work that a replay would have to repeat."""
        settings = self.settings.engine
        cost = 4 * run.adapter.params.numel() * 3 / self.writer.rate
        if run.steps_since_snapshot >= settings.snapshot_min_steps and cost <= settings.snapshot_overhead * run.seconds_since_snapshot:
            self._snapshot(run)

    def _snapshot(self, run: Run) -> None:
        if run.snapshot_running:
            return
        adapter = run.adapter
        run.steps_since_snapshot, run.seconds_since_snapshot = 0, 0.0
        try:
            with around("snapshot.copy"):
                seq, state = adapter.seq, persist.State(adapter, optimizer=True, gradient=True)
        except Exception as error:  # no memory for a copy: the request behind which it was wanted has its answer
            reason = as_error(error, "while a snapshot was copied")
            log.warning("no snapshot of %s at %d: %s", adapter.model_id, adapter.seq, reason.message)
            return
        run.snapshot_running = True
        folder = self.settings.home / "snapshots" / adapter.model_id.replace(":", "_") / f"{seq:012d}"

        def report(size: int, digest: str, seconds: float, error: Exception | None) -> None:
            run.snapshot_running = False
            if error is None:
                self.emit(Snapshotted(adapter.model_id, seq, str(folder), size))
            else:
                log.warning("snapshot %s can't be written: %s", folder, error)  # the log holds what it would have covered

        self.writer.write(state, folder, report)

    def _write(self, state: persist.State, folder: str, request_id: str, on_disk: Callable[[], None] = lambda: None) -> None:
        def report(size: int, digest: str, seconds: float, error: Exception | None) -> None:
            on_disk()  # or it never will be: then nobody is told of it, and it may leave memory as well
            if error is None:
                self._complete(request_id, SavedResult(size, digest))
            else:
                self._fail(request_id, error)

        self.writer.write(state, Path(folder), report)

    # --- work ---

    def step(self) -> float:
        """One unit of work. Returns how long the caller may wait for commands before the next call (0: not at all)."""
        training = [s for s in self.served.values() if s.trainer.has_work()]
        sampling = [s for s in self.served.values() if s.sampler.has_work()]
        wants = ({TRAIN} if training else set()) | ({SAMPLE} if sampling else set())
        side = self.scheduler.pick(wants)
        if side is None:
            self.activity = "idle"
            return COMPILING_WAIT if any(s.sampler.compiling for s in self.served.values()) else 0.5
        if side == TRAIN and not sampling and (wait := self._window(training)) > 0:
            return wait
        started = time.perf_counter()
        self.activity = side
        if side == TRAIN:
            for served in training:
                for job in served.trainer.run_slice():
                    self._finish(job)
        else:
            with torch.inference_mode():
                for served in sampling:
                    for event in served.sampler.step():
                        with around("result.emit"):
                            self.emit(event)
        self.scheduler.charge(side, time.perf_counter() - started)
        self.last_progress = time.time()
        return 0.0

    def _window(self, training: list[Served]) -> float:
        """How much longer to wait so that tenants that train side by side meet in one row: only before a lone job's first slice,
        and only if another run was training a moment ago."""
        now = time.monotonic()
        jobs = [job for served in training for job in served.trainer.jobs]
        recent = [run for run in self.runs.values() if now - run.last_job < RECENT_SECONDS]
        if len(jobs) != 1 or jobs[0].seconds > 0 or len(recent) < 2:
            return 0.0
        return max(0.0, self.settings.engine.batch_window_ms / 1000 - (now - jobs[0].started))

    def _finish(self, job: Job) -> None:
        run = self.runs.get(job.adapter.model_id)
        if job.result is None:
            self._fail(job.command.request_id, job.error or InternalError("it has no result"))
        else:
            self._complete(job.command.request_id, job.result)
        if run is not None and run.job is job:
            run.job = None
            run.last_job = time.monotonic()
            run.seconds_since_snapshot += job.seconds
            self._applied(run, job.command, succeeded=job.result is not None)
            self._advance(run)

    # --- answers ---

    def _complete(self, request_id: str, result: Result) -> None:
        with around("result.emit"):
            self.emit(Completed(request_id, result))

    def _fail(self, request_id: str, error: Exception) -> None:
        answer = as_error(error, "in the engine")
        self.emit(Failed(request_id, answer.code, answer.message, answer.param))

    def close(self) -> None:
        self.writer.close()
