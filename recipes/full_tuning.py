"""Full tuning of a small model, for studies: every weight trains, in this process, behind the methods of the Tinker SDK.

    service = FullService(Path("folder/of/a/model"), Path("runs/full"))
    train(service, settings, dataset, Path("runs/full"))          # everlearn/rl/train.py, as with a server's service client

`FullService` stands where `tinker.ServiceClient` does in the synchronous loop: datums, losses with their keys, refusals, Adam's
parameters and checkpoints are the same. It is one run's: no server, no tenants, no versions that outlive it (docs/design/decisions.md
says why). What an engine does to be fast is left out on purpose, so that a page shows what is computed: rows are padded, logits are
whole, and a sample reads its prompt anew for each token.

A state is an ordinary Hugging Face folder (safetensors, with the tokenizer), so that `everlearn serve` takes a result as a base model,
and beside it `optimizer.safetensors`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
import shutil
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import tinker
import torch
from safetensors.torch import load_file, save_file
from tinker import types

from everlearn.errors import InvalidRequest, Unsupported
from everlearn.losses.checks import check_config, check_datum, check_request
from everlearn.losses.metrics import request_metrics
from everlearn.losses.spec import VALUE_TARGETS
from everlearn.losses.table import LOSSES, pack_inputs
from everlearn.types import Array, Datum

MAX_PARAMETERS = 200_000_000  # weights, gradient, two moments and a sampler's copy in float32 are 4 GB at this size
ROWS = 32  # sequences that are computed at a time: their logits are the largest thing in memory
GATHER_SECONDS = 0.005  # how long a sample waits for others to share a batch with
OPTIMIZER_FILE, BESIDES = "optimizer.safetensors", ("tokenizer.json", "tokenizer_config.json")
T = TypeVar("T")


class Done(Generic[T]):
    """What the SDK would answer later; here it was computed at once."""

    def __init__(self, value: T):
        self.value = value

    def result(self, timeout: float | None = None) -> T:
        return self.value


class FullService:
    """Stands where a `tinker.ServiceClient` does. `home`: where states are written."""

    def __init__(self, folder: Path, home: Path, device: str = "cpu"):
        self.folder, self.home, self.device = folder, home, device

    def create_lora_training_client(self, base_model: str, rank: int = 0, seed: int | None = None) -> Done[FullClient]:
        """Under the name by which the loop asks for one. There is no adapter: rank and seed have nothing to say, nothing here is random."""
        return Done(FullClient(self.folder, self))

    def create_training_client_from_state_with_optimizer(self, path: str) -> Done[FullClient]:
        client = FullClient(Path(path), self)
        client.load_moments(load_file(Path(path) / OPTIMIZER_FILE))
        return Done(client)


def load(folder: Path, device: str) -> Any:
    """A dense model in float32. Raises Unsupported above MAX_PARAMETERS, and for experts or packed weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    odd = [name for name in ("num_experts", "num_local_experts", "n_routed_experts", "quantization_config") if getattr(config, name, None)]
    if odd:
        raise Unsupported(f"{folder.name} has {odd[0]}; full tuning is for dense models with plain weights: train an adapter instead")
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > MAX_PARAMETERS:
        raise Unsupported(
            f"{folder.name} has {size:,} parameters, and full tuning takes at most {MAX_PARAMETERS:,}, of each of which it keeps five "
            "float32 numbers; train an adapter instead"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return model.to(device).eval()


def last_hidden(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[N, L, D]. Rows are padded behind their end, where causal attention lets nobody see it."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


class FullClient:
    """Stands where a `tinker.TrainingClient` does: one run's weights and optimizer."""

    def __init__(self, folder: Path, service: FullService):
        from transformers import AutoTokenizer

        self.service, self.folder = service, folder
        self.model_id = f"full-{uuid.uuid4().hex}"  # a run's folder notes which training run its steps are of; no server knows this one
        self.model = load(folder, service.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    @property
    def num_parameters(self) -> int:
        return int(self.model.num_parameters())

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    # ---- training ----

    def forward(
        self, data: Sequence[types.Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Done[types.ForwardBackwardOutput]:
        with torch.no_grad():
            return self._run(data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self, data: Sequence[types.Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Done[types.ForwardBackwardOutput]:
        """Gradients add up until `optim_step`."""
        return self._run(data, loss_fn, loss_fn_config, backward=True)

    def _run(
        self, data: Sequence[types.Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None, backward: bool
    ) -> Done[types.ForwardBackwardOutput]:
        config = check_config(loss_fn, loss_fn_config)
        datums = [_datum(one) for one in data]
        for index, one in enumerate(datums):
            check_datum(loss_fn, index, one, self.model.config.vocab_size)
            if VALUE_TARGETS in one.inputs or len(one.inputs["target_tokens"].shape) > 1:
                what = "a value head or several targets a token"
                raise InvalidRequest(f"data[{index}] asks for {what}, which full tuning doesn't have; use a server", param="data")
        check_request(loss_fn, config, datums)
        loss, total, found = LOSSES[loss_fn], 0.0, []
        for start in range(0, len(datums), ROWS):
            part = datums[start : start + ROWS]
            inputs, segments = pack_inputs(loss, part, config, self.model.device)
            logprobs_T = self._logprobs(part, inputs["target_tokens"], float(config.get("temperature", 1.0)))
            loss_T = loss.fn(logprobs_T, inputs, config, segments)
            if not torch.isfinite(loss_T).all():
                raise InvalidRequest(f"the loss {loss_fn!r} isn't finite; check advantages and the learning rate", param="data")
            if backward:
                loss_T.sum().backward()
            total += float(loss_T.detach().double().sum())
            own = logprobs_T.detach().cpu()
            found += [own[begin:stop] for begin, stop in segments]
        metrics = {"loss:sum": total} | request_metrics(loss, datums, found, config)
        outputs = [{"logprobs": types.TensorData.from_numpy(own.numpy())} for own in found]
        return Done(types.ForwardBackwardOutput("ArrayRecord", outputs, metrics))

    def _logprobs(self, datums: Sequence[Datum], targets_T: torch.Tensor, temperature: float) -> torch.Tensor:
        rows = [datum.tokens.numpy().tolist() for datum in datums]
        hidden = last_hidden(self.model, rows)
        hidden_TD = torch.cat([hidden[number, : len(row)] for number, row in enumerate(rows)])
        logits_TV = self.model.get_output_embeddings()(hidden_TD) / temperature
        return logits_TV.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)

    def optim_step(self, adam: tinker.AdamParams) -> Done[dict[str, float]]:
        self.optimizer.param_groups[0].update(
            lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )
        bound = adam.grad_clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Done({"grad_norm:mean": norm})

    # ---- states and samplers ----

    def save_state(self, name: str, ttl_seconds: int | None = None) -> Done[types.SaveWeightsResponse]:
        """Under `home`, whole or not at all; a state of that name is replaced. It stays until somebody removes it."""
        self.service.home.mkdir(parents=True, exist_ok=True)
        target = self.service.home / name
        with tempfile.TemporaryDirectory(dir=self.service.home) as unfinished:
            made = Path(unfinished) / "state"
            self.model.save_pretrained(made)
            for beside in BESIDES:
                if (self.folder / beside).exists():
                    shutil.copy(self.folder / beside, made / beside)
            save_file(self.moments(), made / OPTIMIZER_FILE)
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)
        return Done(types.SaveWeightsResponse(path=str(target)))

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's state by the names of parameters, and of each its count of steps; empty before the first."""
        found: dict[str, torch.Tensor] = {"none": torch.zeros(0)}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{kind}"] = value.detach().clone().contiguous()
        return found

    def load_moments(self, found: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if f"{name}.step" in found:
                kinds = {kind: found[f"{name}.{kind}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    kind: value.clone() if kind == "step" else value.to(parameter.device) for kind, value in kinds.items()
                }

    def save_weights_and_get_sampling_client(self, name: str = "", record_stability_info: bool = False) -> Done[FullSampler]:
        """Of the weights as they are now: a copy, which later steps don't change."""
        if record_stability_info:
            raise InvalidRequest("stable_reinforce needs sequences that a server recorded; take another loss", param="loss")
        return Done(FullSampler(copy.deepcopy(self.model).requires_grad_(False), self.tokenizer))


def _datum(datum: types.Datum) -> Datum:
    inputs = {name: value.to_numpy() for name, value in datum.loss_fn_inputs.items()}
    tokens = np.array(datum.model_input.to_ints(), np.int32)
    return Datum(Array.of(tokens), {name: Array.of(np.ascontiguousarray(value)) for name, value in inputs.items()})


class Asked(NamedTuple):
    """A sample that waits for its batch."""

    prompt: list[int]
    params: types.SamplingParams
    answer: asyncio.Future[types.SampleResponse]


class FullSampler:
    """Stands where a `tinker.SamplingClient` does. Samples that are asked for at the same time are drawn as one batch; with a
    seed, a sample doesn't depend on who else is in it, but for the last bits of sums."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.waiting: list[Asked] = []

    async def sample(self, prompt: tinker.ModelInput, num_samples: int, sampling_params: types.SamplingParams) -> types.SampleResponse:
        params = sampling_params
        if num_samples != 1 or params.top_p != 1 or params.top_k != -1:
            raise InvalidRequest("one sample at a time, without top_p or top_k: this sampler is for training", param="sampling_params")
        loop = asyncio.get_running_loop()
        asked = Asked(prompt.to_ints(), params, loop.create_future())
        self.waiting.append(asked)
        if len(self.waiting) == 1:
            loop.call_later(GATHER_SECONDS, self._answer)
        return await asked.answer

    def _answer(self) -> None:
        batch, self.waiting = self.waiting, []
        try:
            answers = [answer for start in range(0, len(batch), ROWS) for answer in self.draw(batch[start : start + ROWS])]
        except Exception as error:  # noqa: BLE001 - it is each of theirs
            answers = [error] * len(batch)
        for one, answer in zip(batch, answers, strict=True):
            if one.answer.done():  # its episode's time was over
                continue
            if isinstance(answer, Exception):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)

    def stops(self, params: types.SamplingParams) -> set[int]:
        """The tokens that end an answer. Raises InvalidRequest for a text of several."""
        if params.stop is None:
            ends = self.model.config.eos_token_id
            return set(ends if isinstance(ends, list) else [ends])
        found = set()
        for stop in [params.stop] if isinstance(params.stop, str) else params.stop:
            ids = [stop] if isinstance(stop, int) else self.tokenizer.encode(stop, add_special_tokens=False)
            if len(ids) != 1:
                raise InvalidRequest(f"stop {stop!r} is {len(ids)} tokens; this sampler ends answers at single tokens", param="stop")
            found.add(int(ids[0]))
        return found

    @torch.no_grad()
    def draw(self, batch: Sequence[Asked]) -> list[types.SampleResponse]:
        """Log-probabilities are those of temperature 1, as a server reports them. Temperature 0 takes the likeliest."""
        ends = [self.stops(one.params) for one in batch]
        seeds = [one.params.seed if one.params.seed is not None else secrets.randbits(31) for one in batch]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens: list[list[int]] = [[] for _ in batch]
        logprobs: list[list[float]] = [[] for _ in batch]
        live = list(range(len(batch)))
        while live:
            rows = [[*batch[n].prompt, *tokens[n]] for n in live]
            hidden = last_hidden(self.model, rows)
            last_ND = torch.stack([hidden[place, len(row) - 1] for place, row in enumerate(rows)])
            logits_NV = self.model.get_output_embeddings()(last_ND)
            heat = [float(batch[n].params.temperature) for n in live]
            heat_N1 = torch.tensor([one or 1.0 for one in heat], device=logits_NV.device).unsqueeze(1)
            share_N1 = torch.stack([torch.rand(1, generator=generators[n], dtype=torch.float64) for n in live]).to(logits_NV.device)
            heap_NV = (logits_NV / heat_N1).double().softmax(-1).cumsum(-1)
            drawn_N = (heap_NV < share_N1 * heap_NV[:, -1:]).sum(-1).clamp(max=logits_NV.shape[1] - 1)
            greedy_N = torch.tensor([one == 0.0 for one in heat], device=logits_NV.device)
            drawn_N = torch.where(greedy_N, logits_NV.argmax(-1), drawn_N)
            told_N = logits_NV.log_softmax(-1).gather(1, drawn_N.unsqueeze(1)).squeeze(1)
            for n, token, logprob in zip(live, drawn_N.tolist(), told_N.tolist(), strict=True):
                tokens[n].append(token)
                logprobs[n].append(min(logprob, 0.0))
            live = [n for n in live if tokens[n][-1] not in ends[n] and len(tokens[n]) < (batch[n].params.max_tokens or 1)]
        return [_response(own, told, own[-1] in end) for own, told, end in zip(tokens, logprobs, ends, strict=True)]


def _response(tokens: list[int], logprobs: list[float], ended: bool) -> types.SampleResponse:
    sequence = types.SampledSequence("stop" if ended else "length", "", np.array(tokens, np.int32), np.array(logprobs, np.float32))
    return types.SampleResponse([sequence])


def main() -> None:
    """Which folders can be tuned in full: `python recipes/full_tuning.py FOLDER`."""
    for name in sys.argv[1:]:
        print(json.dumps({"folder": name, "parameters": int(load(Path(name), "cpu").num_parameters())}))


if __name__ == "__main__":
    main()
