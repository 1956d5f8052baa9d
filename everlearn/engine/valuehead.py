"""An adapter's value head: a linear function of the final hidden state, learned beside the policy (losses/value.py).

V(h) = w h + b, float32, zero at birth. It comes into being with the first request that trains it and is stepped whenever its adapter
is, with the same parameters and moments of its own. It is saved and loaded with the adapter, in a file of its own, and samplers never
see it. Only the device thread touches it.

Axes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch

from everlearn.types import AdamParams


class ValueHead:
    """`params` and `grad` float32 [D + 1]: the weight, and the bias last."""

    def __init__(self, hidden_size: int, device: torch.device):
        self.params = torch.zeros(hidden_size + 1, device=device)
        self.grad = torch.zeros_like(self.params)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.params), torch.zeros_like(self.params)
        self.step = 0

    def values(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """V [T], no gradient."""
        return torch.addmv(self.params[-1:].expand(hidden_TD.shape[0]), hidden_TD.detach().float(), self.params[:-1])

    def add_gradient(self, buffer: torch.Tensor, dvalues_T: torch.Tensor, hidden_TD: torch.Tensor) -> None:
        """Adds the gradient of the weight and of the bias for dloss/dV [T] into `buffer`, shaped like params."""
        buffer[:-1].addmv_(hidden_TD.detach().float().t(), dvalues_T)
        buffer[-1] += dvalues_T.sum()

    def hidden_gradient(self, dvalues_T: torch.Tensor) -> torch.Tensor:
        """dloss/dhidden [T, D]."""
        return torch.outer(dvalues_T, self.params[:-1])

    def optim_step(self, adam: AdamParams, scale: float) -> None:
        """One AdamW step (decoupled weight decay) on the gradient times `scale`, which is then cleared."""
        self.step += 1
        gradient = self.grad * scale
        self.exp_avg.lerp_(gradient, 1 - adam.beta1)
        self.exp_avg_sq.mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
        root = (self.exp_avg_sq / (1 - adam.beta2**self.step)).sqrt_().add_(adam.eps)
        self.params.mul_(1 - adam.learning_rate * adam.weight_decay)
        self.params.addcdiv_(self.exp_avg, root, value=-adam.learning_rate / (1 - adam.beta1**self.step))
        self.grad.zero_()

    # --- on disk ---

    def state(self, optimizer: bool, gradient: bool) -> dict[str, torch.Tensor]:
        """Copies of what a folder holds."""
        tensors = {"params": self.params}
        if optimizer:
            tensors |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": torch.tensor([self.step])}
        if gradient:
            tensors["grad"] = self.grad
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    @classmethod
    def of(cls, state: dict[str, torch.Tensor], optimizer: bool, device: torch.device) -> ValueHead:
        """The head that `state` tells of; moments, step and a pending gradient too if `optimizer`."""
        head = cls(len(state["params"]) - 1, device)
        head.params.copy_(state["params"])
        if optimizer and "step" in state:
            head.exp_avg.copy_(state["exp_avg"])
            head.exp_avg_sq.copy_(state["exp_avg_sq"])
            head.step = int(state["step"])
        if optimizer and "grad" in state:
            head.grad.copy_(state["grad"])
        return head
