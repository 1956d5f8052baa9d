"""Forward and backward for many adapters at once.

A job is one forward_backward request. It is cut into pieces (packing.py); each slice runs one packed row that holds pieces of one or
more jobs, and a job that has run its last piece is finished. A job is a transaction: its gradient joins the adapter's accumulator
only when all of it was computed and is finite, so a request that fails leaves the adapter as it was.

The loss sees log-probabilities only. For a loss whose token t depends on log-probability t alone, the gradient is taken chunk by
chunk inside the head; the others (sequence ratios) get a first pass without gradients over their piece.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from everlearn.engine import routes
from everlearn.engine.adapter import TrainingAdapter
from everlearn.engine.faults import as_error, whole
from everlearn.engine.packing import Piece, choose, cut
from everlearn.engine.protocol import ForwardBackward
from everlearn.engine.sight import Placed, of_datums, row_positions
from everlearn.engine.valuehead import ValueHead
from everlearn.errors import EverlearnError, InvalidRequest
from everlearn.faultpoints import around
from everlearn.losses.metrics import request_metrics
from everlearn.losses.spec import VALUE_TARGETS, Config
from everlearn.losses.table import LOSSES, Loss, pack_inputs
from everlearn.losses.terms import active
from everlearn.losses.value import value_gradient, value_loss, value_metrics
from everlearn.models.attention import PackedBatch, running
from everlearn.models.beginnings import Beginnings, shared
from everlearn.models.load import BaseModel
from everlearn.models.lora import AdapterWeights, Segment
from everlearn.models.routing import Watch, counts
from everlearn.models.vision import Visual, check_images
from everlearn.types import Array, Datum, ForwardBackwardResult


@dataclass(eq=False)
class Job:
    """A forward_backward request on its way through the model."""

    command: ForwardBackward
    adapter: TrainingAdapter
    loss: Loss
    config: Config
    plan: list[Piece]
    grad: torch.Tensor | None
    pieces: deque[Piece] = field(default_factory=deque)
    logprobs: list[torch.Tensor | None] = field(default_factory=list)
    loss_sums: list[float] = field(default_factory=list)
    head: ValueHead | None = None  # of requests with value_targets: the adapter's, or one that it gets if the request succeeds
    value_grad: torch.Tensor | None = None
    values: list[torch.Tensor | None] = field(default_factory=list)
    routed: routes.Routed = field(default_factory=routes.Routed)
    alone: bool = False  # shares no row any more
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    error: EverlearnError | None = None
    result: ForwardBackwardResult | None = None

    def begin(self) -> Job:
        """Nothing of it has run (any more)."""
        self.pieces, self.loss_sums = deque(self.plan), []
        self.logprobs = [None] * len(self.command.data)
        self.routed = routes.Routed()
        self.values = [None] * len(self.command.data)
        for buffer in (self.grad, self.value_grad):
            if buffer is not None:
                buffer.zero_()
        return self

    @property
    def finished(self) -> bool:
        return self.error is not None or not self.pieces

    def weights(self) -> AdapterWeights:
        """The adapter's weights, with the gradient buffer of this job where it trains."""
        return self.adapter.weights if self.grad is None else self.adapter.training_weights(self.grad)


@dataclass(eq=False)
class Part:
    """A piece inside a row: tokens [start, stop) belong to `job`."""

    job: Job
    piece: Piece
    start: int
    stop: int
    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor  # [t, K]
    flat_targets: bool
    spans: list[tuple[int, int]]  # each datum's [start, stop) within the piece
    values: torch.Tensor | None = None  # [t], where the request has value_targets

    @property
    def per_token(self) -> bool:
        return self.job.loss.spec.per_token_with(self.job.config)

    def shaped(self, logprobs_TK: torch.Tensor) -> torch.Tensor:
        return logprobs_TK[:, 0] if self.flat_targets else logprobs_TK


class Trainer:
    """Runs the jobs of one base model, one packed row at a time."""

    def __init__(self, base: BaseModel, micro_batch_tokens: int):
        self.base, self.budget = base, micro_batch_tokens
        self.jobs: list[Job] = []
        self.turn = 0
        self.trained_tokens = 0

    def start(self, command: ForwardBackward, adapter: TrainingAdapter) -> Job:
        """Takes a request in. Raises InvalidRequest where the loss is unknown or a datum is too long for the model."""
        loss = LOSSES.get(command.loss_fn)
        if loss is None:
            raise InvalidRequest(f"unknown loss_fn {command.loss_fn!r}; known: {', '.join(sorted(LOSSES))}", param="loss_fn")
        lengths = [d.tokens.shape[0] for d in command.data]
        for i, length in enumerate(lengths):
            if length > self.base.max_context:
                raise InvalidRequest(
                    f"datum {i} has {length} tokens; {self.base.info.name} takes at most {self.base.max_context}; cut it", param="data"
                )
            check_images(self.base.vision, self.base.info.name, length, command.data[i].images, f"data[{i}].model_input")
        widths = [d.inputs["target_tokens"].shape[1] if len(d.inputs["target_tokens"].shape) > 1 else 1 for d in command.data]
        routes.check(self.base, command.data, command.loss_fn)
        grad = None
        if not command.forward_only:
            grad = torch.zeros_like(adapter.grad) if adapter.has_grad else adapter.grad
        job = Job(command, adapter, loss, {**loss.spec.defaults, **command.config}, cut(lengths, widths, self.budget), grad)
        if VALUE_TARGETS in command.data[0].inputs:
            job.head = adapter.value or ValueHead(self.base.hidden_size, self.base.device)
            job.value_grad = None if command.forward_only else torch.zeros_like(job.head.params)
        self.jobs.append(job.begin())
        return job

    def has_work(self) -> bool:
        return bool(self.jobs)

    def run_slice(self) -> list[Job]:
        """Runs one row; returns the jobs that it finished (or broke)."""
        first = self.jobs[self.turn % len(self.jobs)]
        mode = first.command.forward_only
        fits = [job is first or (not (first.alone or job.alone) and job.command.forward_only == mode) for job in self.jobs]
        heads = [job.pieces[0] if job.pieces and fit else None for job, fit in zip(self.jobs, fits, strict=True)]
        chosen = [self.jobs[i] for i in choose(heads, self.budget, self.turn % len(self.jobs))]
        self.turn += 1
        started = time.perf_counter()
        if chosen:
            self._run(chosen, forward_only=mode)
        for job in chosen:
            job.seconds += (time.perf_counter() - started) / len(chosen)
        done = [job for job in self.jobs if job.finished]
        self.jobs = [job for job in self.jobs if not job.finished]
        for job in done:
            self._settle(job)
        return done

    def result(self, job: Job) -> ForwardBackwardResult:
        """Outputs in the order of the request's datums."""
        logprobs = [own.cpu() for own in job.logprobs if own is not None]
        shapes = [datum.inputs["target_tokens"].shape for datum in job.command.data]
        outputs = [{"logprobs": Array.of(own.numpy().reshape(shape))} for own, shape in zip(logprobs, shapes, strict=True)]
        metrics = {"loss:sum": float(np.sum(np.asarray(job.loss_sums, dtype=np.float64)))}
        metrics |= job.routed.metrics()
        if job.head is not None:
            values = [own.cpu() for own in job.values if own is not None]
            for output, own in zip(outputs, values, strict=True):
                output["values"] = Array.of(own.numpy())
            inputs, _ = pack_inputs(job.loss, job.command.data, job.config)
            routes.silence(job.loss.name, inputs, job.command.data)
            metrics |= value_metrics(torch.cat(values), inputs, job.config)
        return ForwardBackwardResult(outputs, metrics | request_metrics(job.loss, job.command.data, logprobs, job.config))

    # --- one row ---

    def _run(self, jobs: list[Job], forward_only: bool) -> None:
        """A row that breaks says nothing of whose fault it was: its jobs begin again, each alone; what breaks alone has failed."""
        try:
            self._row(jobs, forward_only)
        except Exception as error:
            reason = as_error(error, f"in a row of {self.budget} tokens", param="data")
            for job in jobs:
                if job.alone or len(jobs) == 1:
                    job.error = reason
                else:
                    job.begin().alone = True

    def _row(self, jobs: list[Job], forward_only: bool) -> None:
        parts, tokens, positions, lengths = self._assemble(jobs)
        segments = [Segment(p.job.weights(), p.start, p.stop, p.job.config.get("temperature", 1.0)) for p in parts]
        begun = self._beginnings(parts)
        batch = PackedBatch(lengths, segments if begun is None else begun.segments(segments), begun)
        num_tokens = tokens.shape[0]
        if begun is not None:
            tokens, positions = tokens[begun.firsts_U], positions[..., begun.firsts_U]
        batch.watch = routes.replay(self.base, [p.job.command.data[i] for p in parts for i in p.piece.datums])
        targets = torch.cat([p.targets for p in parts])
        if forward_only:
            with torch.no_grad():
                hidden = self.base.hidden(tokens, positions, batch, self._visual(parts, segments))
            hidden = hidden if begun is None else begun.spread(hidden)
            _look(parts, hidden)
            logprobs = self.base.head.logprobs(hidden, targets, segments)
        else:
            logprobs = self._backward(parts, tokens, positions, targets, segments, batch)
        self._count_experts(parts, batch.watch)
        self._collect(parts, logprobs)
        self.trained_tokens += num_tokens

    def _backward(
        self, parts: list[Part], tokens: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, segments: list[Segment],
        batch: PackedBatch,
    ) -> torch.Tensor:  # fmt: skip
        with torch.enable_grad():
            hidden = self.base.hidden(tokens, positions, batch, self._visual(parts, segments))
        begun = batch.beginnings
        detached = hidden.detach() if begun is None else begun.spread(hidden.detach())
        _look(parts, detached)
        whole: dict[int, torch.Tensor] = {}  # gradients of parts whose loss looks at whole sequences
        if any(not p.per_token for p in parts):
            first = self.base.head.logprobs(detached, targets, segments)
            whole = {p.start: _loss_gradient(p, first[p.start : p.stop]) for p in parts if not p.per_token}
        starts = [p.start for p in parts]

        def gradient_of(logprobs_tK: torch.Tensor, index_t: torch.Tensor) -> torch.Tensor:
            part = parts[bisect_right(starts, int(index_t[0])) - 1]
            if part.start in whole:
                return whole[part.start][index_t - part.start]
            return _loss_gradient(part, logprobs_tK, index_t - part.start)

        trains = torch.cat([_active(p) for p in parts])
        same = None if begun is None else begun.same(targets)
        logprobs, dhidden = self.base.head.backward(detached, targets, segments, trains, gradient_of, same)
        for part in parts:
            _add_value_gradient(part, detached, dhidden)
        dhidden = dhidden if begun is None else begun.gathered(dhidden)
        with running(batch):  # layers that are computed again look for their batch
            torch.autograd.backward(hidden, dhidden)
        return logprobs

    def _beginnings(self, parts: list[Part]) -> Beginnings | None:
        """What the row's sequences begin with in common, where the model is one that sees only what stands before (no experts, whose
        choices are counted and replayed token by token; no states; no images) and copies' gradients add up in one order and in full: on a
        CPU, in float32."""
        if self.base.device.type != "cpu" or self.base.dtype != torch.float32:
            return None
        if self.base.expert_modules or self.base.cache_form.state_layers:
            return None
        data = [[part.job.command.data[i] for i in part.piece.datums] for part in parts]
        if any(datum.images for datums in data for datum in datums):
            return None
        return shared([[datum.tokens.numpy() for datum in datums] for datums in data])

    def _assemble(self, jobs: Iterable[Job]) -> tuple[list[Part], torch.Tensor, torch.Tensor, list[int]]:
        parts: list[Part] = []
        tokens: list[np.ndarray] = []
        lengths: list[int] = []
        start = 0
        for job in jobs:
            piece = job.pieces.popleft()
            datums = [job.command.data[i] for i in piece.datums]
            tokens += [d.tokens.numpy() for d in datums]
            spans, at = [], 0
            for d in datums:
                spans.append((at, at + d.tokens.shape[0]))
                at += d.tokens.shape[0]
            lengths += [stop - begin for begin, stop in spans]
            parts.append(self._part(job, piece, datums, start, start + at, spans))
            start += at
        device = self.base.device
        row = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device)
        images = [part.job.command.data[i].images for part in parts for i in part.piece.datums]
        positions = row_positions(list(zip(lengths, images, strict=True)), self.base.position_axes)
        return parts, row, torch.from_numpy(positions).to(device), lengths

    def _visual(self, parts: list[Part], segments: list[Segment]) -> Visual | None:
        """What the row shows; segments are the parts', one each."""
        placed: list[Placed] = []
        for part, segment in zip(parts, segments, strict=True):
            datums = [part.job.command.data[i] for i in part.piece.datums]
            places = zip(part.spans, datums, strict=True)
            placed += [(part.start + begin, datum, part.job.adapter.tenant, segment.adapter) for (begin, _), datum in places]
        return of_datums(self.base.vision, placed)

    def _part(self, job: Job, piece: Piece, datums: list[Datum], start: int, stop: int, spans: list[tuple[int, int]]) -> Part:
        inputs, _ = pack_inputs(job.loss, datums, job.config, self.base.device)
        targets = inputs.pop("target_tokens")
        job.routed.replayed(*routes.silence(job.loss.name, inputs, datums))
        flat = targets.ndim == 1
        return Part(job, piece, start, stop, inputs, targets.unsqueeze(1) if flat else targets, flat, spans)

    def _count_experts(self, parts: list[Part], watch: Watch | None) -> None:
        if watch is not None:
            ids_TLK, num_experts = watch.ids(), routes.shape_of(self.base).experts
            for part in parts:
                part.job.routed.add(counts(ids_TLK[part.start : part.stop], num_experts))

    def _collect(self, parts: list[Part], logprobs: torch.Tensor) -> None:
        for part in parts:
            own = part.shaped(logprobs[part.start : part.stop])
            losses = part.job.loss.fn(own, part.inputs, part.job.config, part.spans)
            if part.values is not None:
                losses = losses + value_loss(part.values, part.inputs, part.job.config)
            for i, (begin, stop) in zip(part.piece.datums, part.spans, strict=True):
                part.job.logprobs[i] = own[begin:stop]
                part.job.values[i] = None if part.values is None else part.values[begin:stop]
            value = float(losses.double().sum())
            part.job.loss_sums.append(value)
            if not np.isfinite(value):
                part.job.error = InvalidRequest(
                    f"the loss {part.job.command.loss_fn!r} of datums {list(part.piece.datums)} is {value}; "
                    "nothing was added to the gradient. Check weights, advantages and "
                    "log-probabilities for values that are huge, and the learning rate for divergence",
                    param="data",
                )

    def _settle(self, job: Job) -> None:
        """Commits the job's gradient, or takes it back. A job whose result can't be made has no effect either."""
        adapter = job.adapter
        if job.error is None and job.grad is not None:
            # The sum, and its norm: finite gradients can overflow together, and an optimizer step on that could only fail.
            if job.grad is not adapter.grad:
                job.grad.add_(adapter.grad)
            if job.value_grad is not None and adapter.value is not None:
                job.value_grad.add_(adapter.value.grad)
            norms = [torch.linalg.vector_norm(buffer) for buffer in (job.grad, job.value_grad) if buffer is not None]
            if not all(bool(norm.isfinite()) for norm in norms):
                job.error = InvalidRequest(
                    "the gradient, with what was accumulated before, is not finite or its norm isn't; nothing was added to the adapter's "
                    "gradient. Use smaller weights and advantages, or fewer forward_backward calls between optimizer steps",
                    param="data",
                )
        if job.error is None:
            try:
                job.result = self.result(job)
            except Exception as error:
                job.error = as_error(error, "while its result was made")
        if job.grad is None:
            return
        if job.error is not None:
            if job.grad is adapter.grad:
                adapter.clear_gradient()
            return
        with whole(), around("gradient.join"):
            adapter.grad, adapter.has_grad = job.grad, True
            if job.head is not None and job.value_grad is not None:
                adapter.value = job.head
                adapter.value.grad = job.value_grad


def _active(part: Part) -> torch.Tensor:
    """Tokens that can have a gradient: where the loss declares an input that multiplies it, that input's non-zero places, and those of
    the terms that are added to it."""
    name = routes.ZERO_WITHOUT.get(part.job.loss.name)
    if name is None or name not in part.inputs:
        return torch.ones(part.stop - part.start, dtype=torch.bool, device=part.targets.device)
    values = part.inputs[name] != 0
    values = values if values.ndim == 1 else values.any(dim=1)
    others = active(part.inputs, part.job.config) if part.job.loss.spec.adds_terms else None
    return values if others is None else values | others


def _look(parts: list[Part], hidden_TD: torch.Tensor) -> None:
    """What the value heads say of the row, where a request asks."""
    for part in parts:
        if part.job.head is not None:
            part.values = part.job.head.values(hidden_TD[part.start : part.stop])


def _add_value_gradient(part: Part, hidden_TD: torch.Tensor, dhidden_TD: torch.Tensor) -> None:
    """Of the value head's loss: into the head's own gradient, and into the row's."""
    if part.job.head is None or part.values is None or part.job.value_grad is None:
        return
    rows = slice(part.start, part.stop)
    dvalues_t = value_gradient(part.values, part.inputs, part.job.config)
    part.job.head.add_gradient(part.job.value_grad, dvalues_t, hidden_TD[rows])
    dhidden_TD[rows] += (part.job.config["value_trunk"] * part.job.head.hidden_gradient(dvalues_t)).to(dhidden_TD.dtype)


def _loss_gradient(part: Part, logprobs_tK: torch.Tensor, index_t: torch.Tensor | None = None) -> torch.Tensor:
    """dloss/dlogprob [t, K] of some tokens of a part (all, if `index_t` is None)."""
    inputs = part.inputs if index_t is None else {name: values[index_t] for name, values in part.inputs.items()}
    spans = part.spans if index_t is None else [(0, len(index_t))]
    leaf = part.shaped(logprobs_tK).detach().requires_grad_()
    with torch.enable_grad():
        loss = part.job.loss.fn(leaf, inputs, part.job.config, spans).sum()
    if not loss.requires_grad:
        return torch.zeros_like(logprobs_tK)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.unsqueeze(1) if part.flat_targets else gradient
