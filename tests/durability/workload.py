"""A training run as a user writes it, through the tinker SDK, whose every answer is kept.

The same `Plan` played on a disturbed and on an undisturbed server must leave the same `Trace` and the same final weights.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tinker
from safetensors.numpy import load_file
from tinker import types

from tests.live import KEY, LiveServer

PATIENCE = 280.0  # seconds for one answer: a few restarts of a server on a loaded machine
VOCABULARY = 512
# Called before each part of a step: "before" it, after its requests were sent ("training"), while something is "saving" or "sampling".
OnPhase = Callable[[int, str], None]


@dataclass(frozen=True)
class Plan:
    """What a run does: all of it follows from `seed`."""

    seed: int
    steps: int = 60
    rank: int = 4
    datums: int = 4

    def batch(self, step: int) -> list[types.Datum]:
        """Sequences of different lengths that repeat, so that there is something to learn."""
        rng = random.Random(f"{self.seed} {step % 7}")
        return [datum([rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(12, 40))]) for _ in range(self.datums)]

    def extra(self, step: int) -> str | None:
        """Every few steps something besides training."""
        return {3: "save_state", 7: "publish", 8: "sample"}.get(step % 10)


@dataclass
class Trace:
    """Everything the server answered. `requests`: training requests that the client sent, creation included; `records`: ids of answers."""

    run_id: str = ""
    losses: list[float] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    optimizer_steps: list[int] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    samples: list[tuple[list[int], list[float]]] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    requests: int = 0
    final: str = ""


def datum(tokens: list[int]) -> types.Datum:
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
        "weights": types.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def play(plan: Plan, url: str, model: str, on_phase: OnPhase = lambda step, phase: None) -> Trace:
    """Runs the plan to its end. Every future is waited for: an answer that never comes is an error here."""
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    client = service.create_lora_training_client(model, rank=plan.rank, seed=plan.seed).result(timeout=PATIENCE)
    trace = Trace(run_id=client.model_id, requests=1)
    sampler: tinker.SamplingClient | None = None
    for step in range(plan.steps):
        on_phase(step, "before")
        forward = client.forward_backward(plan.batch(step), "cross_entropy")
        update = client.optim_step(types.AdamParams(learning_rate=3e-3, grad_clip_norm=1.0))
        on_phase(step, "training")
        keep(trace, forward.result(timeout=PATIENCE), update.result(timeout=PATIENCE))
        extra = plan.extra(step)
        if extra == "save_state":
            saving = client.save_state(f"step-{step}")
            on_phase(step, "saving")
            trace.saved.append(saving.result(timeout=PATIENCE).path.removeprefix(f"tinker://{trace.run_id}/"))
        elif extra == "publish":
            publishing = client.save_weights_for_sampler(f"step-{step}")
            on_phase(step, "saving")
            path = publishing.result(timeout=PATIENCE).path
            trace.saved.append(path.removeprefix(f"tinker://{trace.run_id}/"))
            sampler = service.create_sampling_client(model_path=path)
        elif extra == "sample":
            assert sampler is not None
            parameters = types.SamplingParams(max_tokens=12, temperature=1.0, seed=step)
            prompt = types.ModelInput.from_ints([1, 40, 41, 42])
            sampling = sampler.sample(prompt=prompt, num_samples=1, sampling_params=parameters)
            on_phase(step, "sampling")
            sequence = sampling.result(timeout=PATIENCE).sequences[0]
            trace.samples.append((list(sequence.tokens), list(sequence.logprobs or [])))
        if extra in ("save_state", "publish"):
            trace.requests += 1
    trace.final = client.save_state("final").result(timeout=PATIENCE).path
    trace.requests += 1
    service.close("success").result(timeout=PATIENCE)
    return trace


def play_together(plans: list[Plan], url: str, model: str, on_phase: OnPhase = lambda step, phase: None) -> list[Trace]:
    """All plans at once, a thread each; `on_phase` hears of the first one's steps."""
    traces: dict[int, Trace] = {}
    failures: list[BaseException] = []

    def one(index: int) -> None:
        try:
            traces[index] = play(plans[index], url, model, on_phase if index == 0 else lambda step, phase: None)
        except BaseException as error:  # noqa: BLE001  # a thread's failure is the test's
            failures.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [traces[index] for index in range(len(plans))]


def final_weights(server: LiveServer, trace: Trace) -> dict[str, np.ndarray]:
    """The tensors of the run's last checkpoint, as they are on the disk."""
    return load_file(checkpoint_folder(server.home, trace.final) / "adapter.safetensors")


def checkpoint_folder(home: Path, path: str) -> Path:
    """The folder of a tinker:// path; its name ends in the number of the request that wrote it."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    (folder,) = (home / "checkpoints" / run.replace(":", "_") / kind).glob(f"{name}@*")
    return folder


def keep(trace: Trace, forward: types.ForwardBackwardOutput, update: types.OptimStepResponse) -> None:
    metrics = update.metrics or {}
    trace.losses.append(forward.metrics["loss:sum"])
    trace.logprobs.append([float(x) for output in forward.loss_fn_outputs for x in output["logprobs"].data])
    trace.gradient_norms.append(metrics["grad_norm:mean"])
    trace.optimizer_steps.append(int(metrics["optimizer_step:max"]))
    trace.requests += 2
