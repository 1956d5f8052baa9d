"""An adapter in training: flat float32 buffers with a view for each matrix.

Weights, gradient and both Adam moments are one tensor each, so an optimizer step, a norm, a copy or a snapshot is one operation
whatever the number of layers. Moments exist from the first step on. Only the device thread touches an adapter.
"""

from __future__ import annotations

import hashlib
import math

import torch

from everlearn.engine.faults import whole
from everlearn.engine.valuehead import ValueHead
from everlearn.errors import InternalError
from everlearn.faultpoints import around
from everlearn.models.lora import AdapterWeights, Pair, PairShape, expert_scale
from everlearn.types import AdamParams, LoraSpec

Shapes = dict[str, PairShape]  # by module path


def split(flat: torch.Tensor, shapes: Shapes) -> dict[str, Pair]:
    """Views (A [..., rank, in], B [..., out, rank]) of a flat buffer, in the order of `shapes`."""
    pairs, at = {}, 0
    for path, shape in shapes.items():
        middle = at + math.prod(shape.a)
        stop = middle + math.prod(shape.b)
        pairs[path] = (flat[at:middle].view(shape.a), flat[middle:stop].view(shape.b))
        at = stop
    return pairs


def num_parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape.a) + math.prod(shape.b) for shape in shapes.values())


class TrainingAdapter:
    """Weights and optimizer state of one training run. `seq` is the last request whose effect is in the state."""

    def __init__(self, model_id: str, tenant: str, base: str, lora: LoraSpec, shapes: Shapes, device: torch.device, dtype: torch.dtype):
        self.model_id, self.tenant, self.base, self.lora, self.shapes = model_id, tenant, base, lora, shapes
        self.device, self.dtype = device, dtype
        size = num_parameters(shapes)
        self.params = torch.zeros(size, device=device)
        self.grad = torch.zeros(size, device=device)
        self.has_grad = False
        self.optimizer: torch.optim.AdamW | None = None
        self.value: ValueHead | None = None  # from the first request on that trains one
        self.step = 0
        self.seq = 0
        self.scale = lora.alpha / lora.rank
        self._compute = self.params if dtype == torch.float32 else torch.zeros(size, device=device, dtype=dtype)
        self._initialise()
        self.refresh()

    def _initialise(self) -> None:
        """A uniform in ±1/sqrt(in), B zero. Each matrix has its own stream, so the switches of LoraSpec don't move the others."""
        seed = self.lora.seed if self.lora.seed is not None else _digest(self.model_id)
        for path, (a, _) in self.pairs().items():
            generator = torch.Generator().manual_seed((seed ^ _digest(path)) & (2**63 - 1))
            bound = 1 / math.sqrt(a.shape[-1])
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))

    def refresh(self) -> None:
        """After the master weights changed: the copy in the base model's type follows."""
        if self._compute is not self.params:
            self._compute.copy_(self.params)
        pairs = split(self._compute, self.shapes)
        self.expert_scale = expert_scale(self.lora.alpha, pairs)
        self.weights = AdapterWeights(self.model_id, self.scale, pairs, expert_scale=self.expert_scale)

    def training_weights(self, grad: torch.Tensor) -> AdapterWeights:
        """The present weights with gradients added into `grad` (flat, float32)."""
        grads = split(grad, self.shapes)
        return AdapterWeights(self.model_id, self.scale, self.weights.pairs, grads, expert_scale=self.expert_scale)

    def pairs(self) -> dict[str, Pair]:
        """Float32 master weights by path (views)."""
        return split(self.params, self.shapes)

    # --- optimizer ---

    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """One AdamW step on the accumulated gradient, which is then cleared. Clipping is by the adapter's global norm,
        its value head included.
        It happens wholly, or not at all (an error), or the process ends."""
        norm = float(torch.linalg.vector_norm(self.grad))
        if self.value is not None:
            norm = math.hypot(norm, float(torch.linalg.vector_norm(self.value.grad)))
        if not math.isfinite(norm):  # one such step would leave moments that never recover
            raise InternalError(f"the norm of the accumulated gradient is {norm}, though only finite ones are added; nothing was changed")
        if self.moments() is None:  # now, where a lack of memory still changes nothing
            self.set_moments(torch.zeros_like(self.params), torch.zeros_like(self.params), step=0)
        optimizer = self._optimizer()
        optimizer.param_groups[0].update(
            lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )
        with whole(), around("optimizer.apply"):
            clips = adam.grad_clip_norm > 0 and norm > adam.grad_clip_norm
            if clips:
                self.grad.mul_(adam.grad_clip_norm / norm)
            if self.value is not None:
                self.value.optim_step(adam, adam.grad_clip_norm / norm if clips else 1.0)
            self.params.grad = self.grad
            optimizer.step()
            self.params.grad = None
            self.clear_gradient()
            self.step += 1
            self.refresh()
        return {"grad_norm:mean": norm, "learning_rate:mean": adam.learning_rate, "optimizer_step:max": float(self.step)}

    def clear_gradient(self) -> None:
        self.grad.zero_()
        if self.value is not None:
            self.value.grad.zero_()
        self.has_grad = False

    def moments(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """exp_avg and exp_avg_sq, flat; None before the first step."""
        state = self.optimizer.state.get(self.params) if self.optimizer is not None else None
        return (state["exp_avg"], state["exp_avg_sq"]) if state else None

    def set_moments(self, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: int) -> None:
        optimizer = self._optimizer()
        optimizer.state[self.params] = {
            "step": torch.tensor(float(step), device=self.device),
            "exp_avg": exp_avg.to(self.device),
            "exp_avg_sq": exp_avg_sq.to(self.device),
        }

    def reset_moments(self) -> None:
        self.optimizer = None

    def _optimizer(self) -> torch.optim.AdamW:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([self.params], fused=True)
        return self.optimizer


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
