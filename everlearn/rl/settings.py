"""What a run of train.py or asynchronous.py is told to do, and what its folder keeps to go on from."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import msgspec

from everlearn.errors import InvalidRequest
from everlearn.rl.advantages import NAMES
from everlearn.rl.rollouts import Limits
from everlearn.rl.temperature import Temperature, check_temperature
from everlearn.rl.values import GAE, ValueFunction

Distance: TypeAlias = Literal["base", "sampler"]
DISTANCES: tuple[str, ...] = get_args(Distance)
PULLS = ("kl_coeff", "entropy_coeff")  # keys of loss_config that act on all sampled tokens, advantage or not
DECOUPLED = ("importance_sampling", "ppo", "cispo", "gspo")  # losses that take old_logprobs


class Pace(msgspec.Struct, frozen=True):
    """How an asynchronous run goes: `staleness` bounds how many versions old a group may be when it is trained on (0: as old as the
    weights, and playing waits for training), `minibatches` is in how many parts a batch is sent, each as soon as its groups are there.
    """

    staleness: int = 4
    minibatches: int = 1


class Settings(msgspec.Struct, frozen=True):
    """What a run is. `substeps` cuts each batch into so many optimizer steps, and each batch is gone through `epochs` times; all but the
    first step are slightly off policy (see `ppo`).

    `max_failed`: the run stops when a larger share of a batch's episodes failed, since a policy that learns from the rest would learn
    something else than was meant; so does an evaluation, whose means would be those of other tasks. `temperature` is that of the sampling
    and of the policy that is trained, a number or a schedule; at another one than 1 a batch costs a forward pass more (temperature.py).
    With the estimator `max_rl`, an environment that ever gives a negative reward ends the run at that step: what a reward may be is only
    known when it comes.

    `decoupled` asks for the batch's log-probabilities under the weights that a step starts from, and sends them as `old_logprobs`: the
    ratio is to those, and the drift from what sampled weighs apart (docs/design/objectives.md). `kl_budget`, in nats for each sampled
    token, ends the run after the step whose KL is above it: `kl/base`, from the policy that sampled to the base model, or `kl/k3`, from
    the policy that sampled to the one that is trained (`kl_budget_of="sampler"`). `ptx_weight` and `ptx_batch`: see `Ptx`.
    `pace` is for `train_asynchronously`, `value_function` for the estimator `gae`.
    """

    base_model: str
    steps: int
    rank: int = 32
    learning_rate: float = 1e-4
    loss: str = "importance_sampling"
    loss_config: dict[str, float | str] = {}
    estimator: str = "group_mean"
    value_function: ValueFunction = ValueFunction()
    mask_over_long: bool = False
    substeps: int = 1
    epochs: int = 1
    max_tokens: int = 64
    temperature: float | Temperature = 1.0
    limits: Limits = Limits()
    seed: int = 0
    evaluate_every: int = 0  # steps; 0: only at the end, if there is something to evaluate on
    save_every: int = 10
    max_failed: float = 0.5
    decoupled: bool = False
    kl_budget: float = 0.0  # 0: none
    kl_budget_of: Distance = "base"
    ptx_weight: float = 0.0
    ptx_batch: int = 8
    pace: Pace | None = None

    @property
    def pulls(self) -> bool:
        """Whether answers without advantage are trained on too: the loss says something of them, or a term that was asked for does."""
        return self.loss == "mirror_descent" or any(self.loss_config.get(name) for name in PULLS)

    def check(self) -> Settings:
        """Itself. Raises InvalidRequest for what can't be meant."""
        for name in ("steps", "rank", "substeps", "epochs", "max_tokens", "save_every", "evaluate_every"):
            if getattr(self, name) < (least := int(name != "evaluate_every")):
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least {least}", param=name)
        if self.estimator not in (*NAMES, GAE):
            raise InvalidRequest(f"there is no estimator {self.estimator!r}; there are {', '.join((*NAMES, GAE))}", param="estimator")
        self.value_function.check(self.estimator, self.loss, self.loss_config)
        if self.loss == "dro":
            raise InvalidRequest("dro needs log-probabilities of prompts too, which rollouts don't have; take another loss", param="loss")
        check_temperature(self.temperature, self.loss, self.loss_config, asynchronous=self.pace is not None)
        if self.learning_rate <= 0 or not 0 <= self.max_failed <= 1:
            raise InvalidRequest("learning_rate must be above 0, and max_failed a share from 0 to 1", param="learning_rate")
        if self.decoupled and self.loss not in DECOUPLED:
            raise InvalidRequest(f"{self.loss} takes no old_logprobs; decoupled goes with {', '.join(DECOUPLED)}", param="decoupled")
        if not 0 <= self.kl_budget < float("inf") or not 0 <= self.ptx_weight < float("inf") or self.ptx_batch < 1:
            raise InvalidRequest("kl_budget and ptx_weight must be finite and at least 0, ptx_batch at least 1", param="kl_budget")
        if self.kl_budget_of not in DISTANCES:
            raise InvalidRequest(f"kl_budget_of is {self.kl_budget_of!r}; it must be {' or '.join(DISTANCES)}", param="kl_budget_of")
        if self.pace is not None:
            if self.pace.staleness < 0 or self.pace.minibatches < 1:
                raise InvalidRequest(f"{self.pace} can't be kept; staleness must be at least 0, minibatches at least 1", param="pace")
            if self.estimator == GAE:
                raise InvalidRequest(
                    "gae reads the values of a whole batch, and an asynchronous run has none at once; use train", param="pace"
                )
            if self.substeps * self.epochs != 1:
                raise InvalidRequest(
                    f"substeps {self.substeps}, epochs {self.epochs}: an asynchronous run makes one step of each batch", param="pace"
                )
        return self


class State(msgspec.Struct, frozen=True):
    """Where a run can be continued: `step` steps were made, and `path` holds the weights and the optimizer's state after them.

    `stopped` says why it ended before its last step, if it did.
    """

    step: int
    path: str
    settings: Settings
    stopped: str = ""
