"""Run inside an older SDK's environment: every method of its clients, on a server at argv[1] with base model argv[2].

Prints one JSON object of what came back; the test asserts on that. It uses no torch (the SDK doesn't need it) and nothing of ours.
"""

from __future__ import annotations

import inspect
import json
import sys
import urllib.request

import numpy as np
import tinker
from tinker import types

URL, MODEL = sys.argv[1], sys.argv[2]
PROMPT = [1, 40, 41, 42]
out: dict = {"version": tinker.__version__ if hasattr(tinker, "__version__") else "?"}


def prompt(tokens):
    return types.ModelInput.from_ints(tokens)


def datum(tokens, **inputs):
    targets = {"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, np.float32)}
    return types.Datum(model_input=prompt(tokens[:-1]), loss_fn_inputs=inputs or targets)


def got(value):
    return value.result() if hasattr(value, "result") else value


def error_of(call):
    try:
        got(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


service = tinker.ServiceClient(base_url=URL, api_key="tml-test", user_metadata={"sdk": "old"})
out["models"] = [model.model_name for model in got(service.get_server_capabilities()).supported_models]
training = service.create_lora_training_client(base_model=MODEL, rank=4, seed=1, user_metadata={"a": "b"})
out["model_id"], out["rank"] = training.get_info().model_id, training.get_info().lora_rank
data = [datum([1, 40, 41, 42, 43]), datum([1, 50, 51])]

losses = []
for _ in range(3):
    forward = got(training.forward(data, "cross_entropy"))
    output = training.forward_backward(data, "cross_entropy")
    step = got(training.optim_step(types.AdamParams(learning_rate=1e-2)))
    output = got(output)
    assert abs(forward.metrics["loss:sum"] - output.metrics["loss:sum"]) < 1e-3
    losses.append(output.metrics["loss:sum"])
out["losses"], out["step"] = losses, step.metrics
out["lengths"] = [len(item["logprobs"].data) for item in output.loss_fn_outputs]
many = got(training.forward([datum([1] + [30] * (2 + i % 3)) for i in range(300)], "cross_entropy"))
out["many"] = [len(item["logprobs"].data) for item in many.loss_fn_outputs] == [2 + i % 3 for i in range(300)]
policy = {name: np.array(value, np.float32) for name, value in {"logprobs": [-5.0] * 4, "advantages": [0.0, 1.0, -1.0, 1.0]}.items()}
ppo = got(
    training.forward_backward(
        [datum([1, 40, 41, 42, 43], target_tokens=np.array([40, 41, 42, 43]), **policy)], "ppo", {"clip_low_threshold": 0.7}
    )
)
out["ppo"] = ppo.metrics["loss:sum"]
out["bad_token"] = error_of(lambda: training.forward_backward([datum([1, 10**6, 3])], "cross_entropy"))
out["bad_loss"] = error_of(lambda: training.forward_backward(data, "cross_entropy", {"nonsense": 1.0}))
out["after_bad"] = got(training.forward(data, "cross_entropy")).metrics["loss:sum"]

saved = got(training.save_state("kept")).path
if "ttl_seconds" in inspect.signature(training.save_state).parameters:
    got(training.save_state("aged", ttl_seconds=3600))
got(training.load_state(saved))
got(training.load_state_with_optimizer(saved))
again = service.create_training_client_from_state(saved)
out["from_state"] = got(again.forward(data, "cross_entropy")).metrics["loss:sum"]
again = service.create_training_client_from_state_with_optimizer(saved)
out["from_state_with_optimizer"] = got(again.forward(data, "cross_entropy")).metrics["loss:sum"]

named = got(training.save_weights_for_sampler("named")).path
sampler = training.create_sampling_client(named)
ephemeral = training.save_weights_and_get_sampling_client("unnamed")
params = types.SamplingParams(max_tokens=6, temperature=0.7, seed=5, stop=[])
sample = got(sampler.sample(prompt(PROMPT), 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2))
same = got(ephemeral.sample(prompt(PROMPT), 2, params))
out["tokens"] = [list(sequence.tokens) for sequence in sample.sequences]
out["same_tokens"] = [list(sequence.tokens) for sequence in same.sequences]
out["stop_reasons"] = [str(sequence.stop_reason) for sequence in sample.sequences]
out["sampled_logprobs"] = list(sample.sequences[0].logprobs)
out["prompt_logprobs"] = list(sample.prompt_logprobs)
out["topk"] = [None if row is None else [list(pair) for pair in row] for row in sample.topk_prompt_logprobs]
out["compute"] = list(got(sampler.compute_logprobs(prompt(PROMPT + out["tokens"][0]))))
base = service.create_sampling_client(base_model=MODEL)
out["base"] = got(base.compute_logprobs(prompt(PROMPT)))
out["base_model"] = got(base.get_base_model())

rest = service.create_rest_client()
run_id = out["model_id"]
run = got(rest.get_training_run(run_id))
out["run"] = [run.base_model, run.lora_rank, run.user_metadata, run.last_checkpoint is not None]
out["by_path"] = got(rest.get_training_run_by_tinker_path(saved)).training_run_id
out["info"] = got(rest.get_weights_info_by_tinker_path(saved)).lora_rank
out["runs"] = len(got(rest.list_training_runs()).training_runs)
out["checkpoints"] = sorted(item.checkpoint_id for item in got(rest.list_checkpoints(run_id)).checkpoints)
out["user_checkpoints"] = len(got(rest.list_user_checkpoints()).checkpoints)
got(rest.publish_checkpoint_from_tinker_path(saved))
got(rest.unpublish_checkpoint_from_tinker_path(saved))
got(rest.set_checkpoint_ttl_from_tinker_path(saved, 7200))
session_id = run_id.split(":")[0]
out["session"] = got(rest.get_session(session_id)).training_run_ids
out["listed"] = session_id in got(rest.list_sessions(limit=100)).sessions
out["sampler"] = got(rest.get_sampler(sampler._sampling_session_id)).model_path
archive = got(rest.get_checkpoint_archive_url_from_tinker_path(named))
out["archive"] = len(urllib.request.urlopen(archive.url).read())
for name, arguments in (("assign_session_project", (session_id, "p")), ("get_audit_log", ())):
    if hasattr(rest, name):
        got(getattr(rest, name)(*arguments))
got(rest.delete_checkpoint_from_tinker_path(saved))
out["deleted"] = error_of(lambda: rest.delete_checkpoint_from_tinker_path(saved))
print(json.dumps(out))
