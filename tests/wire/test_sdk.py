"""Every method of the newest SDK's clients, unmodified, against a real server on a tiny model."""

from __future__ import annotations

import datetime
import math
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.live import KEY, LiveServer

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::tinker.lib.experimental.ExperimentalWarning"
)

PROMPT = [1, 40, 41, 42]


@pytest.fixture(scope="module")
def service(server: LiveServer) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY, project_id="first", user_metadata={"purpose": "tests"})
    yield client
    client.close("success", detail="done").result()


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient, server: LiveServer) -> tinker.TrainingClient:
    client = service.create_lora_training_client(server.model, rank=4, seed=3, user_metadata={"run": "one"}).result()
    step(client)
    return client


@pytest.fixture(scope="module")
def rest(service: tinker.ServiceClient):
    return service.create_rest_client()


@pytest.fixture(scope="module")
def saved(training: tinker.TrainingClient) -> str:
    return training.save_state("kept", user_metadata={"best": "yes"}).result().path


def datum(tokens: list[int], **inputs) -> types.Datum:
    targets = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=prompt(tokens[:-1]), loss_fn_inputs=inputs or targets)


def prompt(tokens: list[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens)


def step(client: tinker.TrainingClient, rate: float = 1e-2) -> types.ForwardBackwardOutput:
    output = client.forward_backward([datum([1, 40, 41, 42, 43])], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=rate)).result()
    return output.result()


def scores(client: tinker.SamplingClient) -> list[float | None]:
    return client.compute_logprobs(prompt(PROMPT)).result()


def run_of(path: str) -> str:
    return path.removeprefix("tinker://").split("/")[0]


# -- service client -----------------------------------------------------------------------------------------------------------


def test_capabilities_name_models_and_aliases(service, rest, server) -> None:
    names = {model.model_name: model for model in service.get_server_capabilities().supported_models}
    assert server.model in names and "Qwen/Qwen3-8B" in names
    assert names[server.model].trainable and names[server.model].sampleable and names[server.model].max_context_length == 1024
    assert len(rest.get_server_capabilities().result().supported_models) == len(names)


def test_an_alias_trains_and_is_echoed(service) -> None:
    client = service.create_lora_training_client("Qwen/Qwen3-8B", rank=1).result()
    assert client.get_info().model_data.model_name == "Qwen/Qwen3-8B"
    assert client.model_id.split(":train:")[1].isdigit()
    assert step(client).metrics["loss:sum"] > 0


def test_lora_flags_reach_the_adapter(service, server, rest) -> None:
    client = service.create_lora_training_client(server.model, rank=2, train_mlp=False, train_unembed=False).result()
    info = rest.get_weights_info_by_tinker_path(client.save_state("flags").result().path).result()
    assert (info.lora_rank, info.train_attn, info.train_mlp, info.train_unembed) == (2, True, False, False)


def test_the_same_seed_starts_the_same_adapter(service, server) -> None:
    losses = []
    for seed in (7, 7, 8):
        client = service.create_lora_training_client(server.model, rank=2, seed=seed).result()
        step(client)
        losses.append(step(client).metrics["loss:sum"])
    assert losses[0] == losses[1] != losses[2]


def test_runs_begin_from_saved_weights_with_and_without_moments(service, training, saved) -> None:
    before = training.forward([datum([1, 40, 41, 42, 43])], "cross_entropy").result().metrics["loss:sum"]
    for create in (service.create_training_client_from_state, service.create_training_client_from_state_with_optimizer):
        client = create(saved, user_metadata={"from": "kept"}).result()
        assert client.model_id != training.model_id
        assert client.forward([datum([1, 40, 41, 42, 43])], "cross_entropy").result().metrics["loss:sum"] == pytest.approx(before, abs=1e-4)
        step(client)


def test_weights_are_copied_into_runs_of_their_own(service, rest, saved) -> None:
    for path in (service.copy_weights(saved, ttl_seconds=3600).result(), rest.copy_weights(saved, "second").result()):
        assert path != saved and rest.get_training_run_by_tinker_path(path).result().lora_rank == 4
        copy = service.create_training_client_from_state_with_optimizer(path).result()
        assert step(copy).metrics["loss:sum"] > 0
    assert [run.training_run_id for run in rest.list_training_runs(project_id="second").result().training_runs] == [run_of(path)]


def test_custom_losses_run_in_the_client(service, training) -> None:
    def negative(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/negative:sum": loss}

    handle = service.create_custom_loss(negative, input_ranks={"logprobs": 1, "weights": 1}).result()
    data = [datum([1, 40, 41, 42, 43])]
    by_handle = training.forward_backward_custom(data, handle).result().metrics
    plain = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    assert by_handle["loss:sum"] == pytest.approx(plain, abs=1e-4) == pytest.approx(by_handle["custom/negative:sum"], abs=1e-4)


def test_a_closed_session_takes_no_new_runs(server) -> None:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    client.create_sampling_client(base_model=server.model).result()
    client.close("errored", detail="on purpose").result()
    found = tinker.ServiceClient(base_url=server.url, api_key=KEY).create_rest_client()
    request = types.SessionSearchRequest(statuses=[types.ClientFinishedSessionStatusQuery(reasons=["errored"])])
    assert any(session.status.detail == "on purpose" for session in found.search_sessions(request).result().sessions)


# -- training client ----------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_forward_leaves_no_gradient(service, server) -> None:
    client = service.create_lora_training_client(server.model, rank=4, seed=1).result()
    other = service.create_lora_training_client(server.model, rank=4, seed=1).result()
    losses = []
    for _ in range(3):
        other.forward([datum([1, 9, 9, 9])], "cross_entropy").result()
        losses.append(step(client).metrics["loss:sum"])
        assert step(other).metrics["loss:sum"] == losses[-1]
    assert losses[2] < losses[1] < losses[0]


def test_gradients_add_up_until_the_step(service, server) -> None:
    once = service.create_lora_training_client(server.model, rank=4, seed=5).result()
    twice = service.create_lora_training_client(server.model, rank=4, seed=5).result()
    pair = [datum([1, 40, 41]), datum([1, 50, 51, 52])]
    once.forward_backward(pair, "cross_entropy").result()
    for item in pair:
        twice.forward_backward([item], "cross_entropy")
    norms = [client.optim_step(types.AdamParams(grad_clip_norm=1.0)).result().metrics["grad_norm:mean"] for client in (once, twice)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_custom_loss_of_a_function_moves_the_adapter(service, server) -> None:
    client = service.create_lora_training_client(server.model, rank=4).result()

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]):
        value = -sum(item.sum() for item in logprobs)
        return value, {"mine": value.detach().item()}

    values = []
    for _ in range(3):
        values.append(client.forward_backward_custom([datum([1, 40, 41, 42, 43])], loss).result().metrics["loss:sum"])
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert values[2] < values[0]


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_run(training, name: str) -> None:
    inputs = {"target_tokens": [40, 41, 42, 43], "logprobs": [0.0, -5.0, -5.0, -5.0], "advantages": [0.0, 1.0, -1.0, 1.0]}
    if name == "gspo":
        inputs["sequence_ratio_mask"] = [0.0, 1.0, 1.0, 1.0]
    config = {"beta": 0.1} if name == "dro" else None
    output = training.forward([datum([1, 40, 41, 42, 43], **inputs)], name, loss_fn_config=config).result()
    assert math.isfinite(output.metrics["loss:sum"]) and len(output.loss_fn_outputs[0]["logprobs"].tolist()) == 4


def test_wide_sparse_targets_equal_their_dense_form(training) -> None:
    targets = torch.zeros(4, 12, dtype=torch.int64)
    weights = torch.zeros(4, 12)
    targets[:, 0], weights[:, 0] = torch.tensor([40, 41, 42, 43]), 1.0
    targets[2, 3], weights[2, 3] = 99, 0.5
    sparse = types.Datum(model_input=prompt([1, 40, 41, 42]), loss_fn_inputs={"target_tokens": targets, "weights": weights})
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = types.Datum(model_input=prompt([1, 40, 41, 42]), loss_fn_inputs={"target_tokens": targets.numpy(), "weights": weights.numpy()})
    one, two = (training.forward([item], "cross_entropy").result() for item in (sparse, dense))
    assert one.metrics["loss:sum"] == two.metrics["loss:sum"] and one.loss_fn_outputs[0]["logprobs"].shape == [4, 12]


def test_many_chunks_come_back_in_order(service, server, training) -> None:
    """More datums than one chunk takes."""
    lengths = [2 + i % 5 for i in range(2500)]
    output = training.forward([datum([1] + [30] * n) for n in lengths], "cross_entropy").result()
    assert [len(item["logprobs"].tolist()) for item in output.loss_fn_outputs] == lengths


def test_a_refused_chunk_stops_neither_the_client_nor_the_run(service, server) -> None:
    """The SDK counts a chunk that is refused, and what comes after it must not wait: neither here nor in the client."""
    client = service.create_lora_training_client(server.model, rank=2, seed=1).result(timeout=60)
    for bad in (0, 1030):
        data = [datum([1, 40, 41])] * 1040
        data[bad] = datum([1, 512, 41])
        with pytest.raises(tinker.BadRequestError, match="512"):
            client.forward_backward(data, "cross_entropy").result(timeout=60)
        assert step(client).metrics["loss:sum"] > 0


def test_states_are_saved_loaded_and_overwritten(training, saved) -> None:
    with pytest.raises(tinker.APIStatusError, match="exists"):
        training.save_state("kept").result()
    other = training.save_state("other", ttl_seconds=3600).result().path
    assert training.save_state("other", overwrite=True).result().path == other
    training.load_state(saved).result()
    training.load_state_with_optimizer(saved).result()
    step(training)


def test_sampler_weights_are_saved_by_name(training, rest) -> None:
    path = training.save_weights_for_sampler("named", ttl_seconds=3600, user_metadata={"k": "v"}).result().path
    assert path.endswith("/sampler_weights/named")
    sampler = training.create_sampling_client(path).result()
    trained = training.forward([datum([*PROMPT, 2])], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()
    assert scores(sampler)[1:] == pytest.approx(trained[:3], abs=1e-4)
    assert rest.get_sampler(sampler._sampling_session_id).result().model_path == path


def test_snapshots_stay_and_inflight_samplers_follow(service, server) -> None:
    client = service.create_lora_training_client(server.model, rank=4).result()
    base = scores(service.create_sampling_client(base_model=server.model).result())
    snapshot = client.save_weights_and_get_sampling_client().result()
    follower = client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert scores(snapshot)[1:] == pytest.approx(base[1:], abs=1e-5)
    step(client, rate=5e-2)
    newest = client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert scores(snapshot)[1:] == pytest.approx(base[1:], abs=1e-5)
    assert scores(follower)[1:] == pytest.approx(scores(newest)[1:], abs=1e-6) != pytest.approx(base[1:], abs=1e-3)


def test_external_weights_download_as_a_peft_adapter(training, rest, tmp_path) -> None:
    path = training.save_weights_external("export", ttl_seconds=3600).result().path
    found = rest.get_external_weights_urls(path).result()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(found.urls)
    for name, url in found.urls.items():
        (tmp_path / name).write_bytes(urllib.request.urlopen(url).read())
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("q_proj.lora_A.weight") and value.shape[0] == 4 for name, value in tensors.items())
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(url[:-4] + "0000")


def test_info_and_tokenizer(training, server) -> None:
    info = training.get_info()
    assert info.is_lora and info.lora_rank == 4 and info.model_name == server.model
    assert training.get_tokenizer().decode(training.get_tokenizer().encode("hello")) == "hello"


# -- sampling client ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler(service, server) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model=server.model).result()


def test_samples_repeat_with_a_seed_and_score_as_the_model_does(sampler, training) -> None:
    params = types.SamplingParams(max_tokens=8, seed=11, temperature=0.8, top_k=50, top_p=0.95)
    first, again = (sampler.sample(prompt(PROMPT), 3, params).result() for _ in range(2))
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    assert len({tuple(s.tokens) for s in first.sequences}) > 1 and len({s.sequence_id for s in first.sequences}) == 3
    whole = sampler.compute_logprobs(prompt(PROMPT + first.sequences[0].tokens)).result()
    assert whole[len(PROMPT) :] == pytest.approx(first.sequences[0].logprobs, abs=1e-4)


def test_stops_by_token_by_text_or_never(sampler, training) -> None:
    greedy = sampler.sample(prompt(PROMPT), 1, types.SamplingParams(max_tokens=12, temperature=0, stop=[])).result().sequences[0]
    assert len(greedy.tokens) == 12 and greedy.stop_reason == "length"
    third = greedy.tokens[2]
    stopped = sampler.sample(prompt(PROMPT), 1, types.SamplingParams(max_tokens=12, temperature=0, stop=[third])).result().sequences[0]
    assert stopped.stop_reason == "stop" and stopped.tokens == greedy.tokens[: greedy.tokens.index(third) + 1]
    decode = training.get_tokenizer().decode
    text = next(piece for piece in map(decode, ([token] for token in greedy.tokens)) if piece.strip())
    by_text = sampler.sample(prompt(PROMPT), 1, types.SamplingParams(max_tokens=12, temperature=0, stop=[text])).result().sequences[0]
    assert by_text.stop_reason == "stop" and text in decode(by_text.tokens) and by_text.tokens == greedy.tokens[: len(by_text.tokens)]


def test_everything_about_a_prompt(sampler) -> None:
    ids = torch.full((3, 9), -1, dtype=torch.int64)
    ids[1, 0], ids[2, 0], ids[2, 5] = PROMPT[2], PROMPT[3], 77
    target = types.TensorData.from_torch_sparse(ids, pad_value=-1)
    assert target.sparse_crow_indices is not None
    result = sampler.sample(
        prompt(PROMPT),
        1,
        types.SamplingParams(max_tokens=2),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=target,
        prompt_alt_tokens_k=4,
    ).result()
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 4
    assert result.topk_prompt_logprobs[0] is None and len(result.topk_prompt_logprobs[1]) == 3
    assert all(len(row) == 2 for row in result.sequences[0].topk_logprobs)
    values = result.target_prompt_logprobs.to_torch()
    assert values.shape == (3, 9) and values[2, 0].item() == pytest.approx(result.prompt_logprobs[3], abs=1e-5)
    assert values[1, 0].item() == pytest.approx(result.prompt_logprobs[2], abs=1e-5) and values[0, 0] == 0
    assert result.prompt_alt_tokens.tokens.shape == [3, 4] and (result.prompt_alt_tokens.logprobs.to_numpy() < 0).all()


def test_dense_targets_answer_zero_where_nothing_is_asked(sampler) -> None:
    ids = types.TensorData.from_numpy(np.array([[PROMPT[1]], [-1], [PROMPT[3]]]))
    result = sampler.sample(prompt(PROMPT), 1, types.SamplingParams(max_tokens=1), True, target_prompt_logprobs=ids).result()
    values = result.target_prompt_logprobs.to_numpy()[:, 0]
    assert values[1] == 0 and values[[0, 2]] == pytest.approx([result.prompt_logprobs[1], result.prompt_logprobs[3]], abs=1e-5)


def test_only_the_last_prompt_tokens_are_scored_on_demand(sampler) -> None:
    whole = scores(sampler)
    last = sampler.compute_logprobs(prompt(PROMPT), prompt_logprobs_last_n=2).result()
    assert last[:2] == [None, None] and last[2:] == pytest.approx(whole[2:], abs=1e-5)


def test_sampling_clients_travel_by_handle(sampler) -> None:
    twin = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=KEY)
    assert twin.get_base_model() == sampler.get_base_model()
    assert scores(twin)[1:] == pytest.approx(scores(sampler)[1:], abs=1e-6)


def test_stable_reinforce_trains_on_recorded_sequences(training) -> None:
    recording = training.save_weights_and_get_sampling_client(record_stability_info=True).result()
    sampled = recording.sample(prompt(PROMPT), 1, types.SamplingParams(max_tokens=5, stop=[])).result().sequences[0]
    tokens, n = PROMPT + sampled.tokens, len(PROMPT)
    from_prompt = types.PromptProvenanceSpan(sequence_id=sampled.sequence_id, length=n)
    item = datum(tokens, target_tokens=tokens[1:], advantages=[0.0] * (n - 1) + [1.0] * 5).with_provenance(
        [from_prompt, types.SampledProvenanceSpan(sequence_id=sampled.sequence_id, length=4)],
        [
            types.PromptProvenanceSpan(sequence_id=sampled.sequence_id, offset=1, length=n - 1),
            types.SampledProvenanceSpan(sequence_id=sampled.sequence_id, length=5),
        ],
    )
    output = training.forward_backward([item], "stable_reinforce", loss_fn_config={"kl_coeff": 0.01}).result()
    assert output.metrics["loss:sum"] == pytest.approx(-5.0, abs=1e-2)
    assert output.loss_fn_outputs[0]["logprobs"].tolist()[n - 1 :] == pytest.approx(sampled.logprobs, abs=1e-4)
    training.optim_step(types.AdamParams()).result()


# -- rest and admin clients ---------------------------------------------------------------------------------------------------


def test_training_runs_are_listed_and_found(rest, training, saved) -> None:
    page = rest.list_training_runs(limit=1).result()
    assert len(page.training_runs) == 1 and page.cursor.total_count > 1
    run = rest.get_training_run(training.model_id).result()
    assert run.last_checkpoint is not None and run.user_metadata == {"run": "one"} and not run.corrupted
    assert rest.get_training_run_by_tinker_path(saved).result().training_run_id == training.model_id


def test_checkpoints_are_listed_published_aged_and_deleted(rest, training) -> None:
    path = training.save_state("passing").result().path
    listed = {item.tinker_path: item for item in rest.list_checkpoints(training.model_id).result().checkpoints}
    assert listed[path].checkpoint_type == "training" and listed[path].checkpoint_id == "weights/passing" and listed[path].size_bytes > 0
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    item = next(item for item in rest.list_user_checkpoints(limit=100).result().checkpoints if item.tinker_path == path)
    assert item.public and item.expires_at is not None
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint(training.model_id, "weights/passing").result()
    rest.delete_checkpoint_from_tinker_path(training.save_state("publish").result().path).result()
    assert "weights/publish" not in [item.checkpoint_id for item in rest.list_checkpoints(training.model_id).result().checkpoints]


def test_sessions_are_listed_moved_and_searched(rest, training, sampler) -> None:
    session_id = training.model_id.split(":")[0]
    assert session_id in rest.list_sessions(limit=100).result().sessions
    session = rest.get_session(session_id).result()
    assert (
        training.model_id in session.training_run_ids
        and sampler._sampling_session_id in session.sampler_ids
        and session.user_metadata["purpose"] == "tests"
    )
    rest.assign_session_project(session_id, "moved").result()
    found = rest.search_sessions(types.SessionSearchRequest(session_id=session_id)).result().sessions
    assert [(item.project_id, item.status.type) for item in found] == [("moved", "active")]
    first = rest.search_sessions(types.SessionSearchRequest(limit=1)).result()
    second = rest.search_sessions(types.SessionSearchRequest(limit=1, cursor=first.next_cursor)).result()
    assert first.sessions[0].session_id != second.sessions[0].session_id


def test_what_is_not_offered_says_so(rest, training) -> None:
    with pytest.raises(RuntimeError, match="no traces"):
        rest.export_session_trace(training.model_id.split(":")[0]).result()
    with pytest.raises(RuntimeError, match="JWT"):
        rest.whoami().result()


def test_the_admin_client_reads_what_the_store_knows(server, saved, sampler) -> None:
    scores(sampler)
    admin = tinker.AdminClient(base_url=server.url, api_key=KEY)
    assert any(entry.event_details["tinker_path"] == saved for entry in admin.get_audit_log().result().entries)
    assert admin.get_current_checkpoint_storage_usage().result().data[0].checkpoint_count > 0
    hour = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
    usage = admin.get_billing_usage(hour - datetime.timedelta(hours=1), hour + datetime.timedelta(hours=1)).result()
    assert {event.event_info.type for event in usage.data} >= {"training", "sampling_prefill", "checkpoint"}


def test_usage_counts_what_was_read_and_what_was_drawn(server) -> None:
    """In a session of its own: one prompt of 3 tokens, four answers of 5."""
    service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    client = service.create_sampling_client(base_model=server.model)
    answer = client.sample(prompt([1, 40, 41]), 4, types.SamplingParams(max_tokens=5, stop=[])).result(timeout=60)
    assert [len(sequence.tokens) for sequence in answer.sequences] == [5] * 4
    now, hours = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=2)
    found = tinker.AdminClient(base_url=server.url, api_key=KEY).get_billing_usage(now - hours, now + hours).result()
    session = service.holder.get_session_id()
    mine = {event.event_info.type: event.event_info.token_count for event in found.data if event.session_id == session}
    assert mine == {"sampling_prefill": 3, "sampling_sample": 20}
    service.close("success").result(timeout=60)


def test_deprecated_methods_still_work(service, training, server) -> None:
    import asyncio

    async def old() -> None:
        await service.get_server_capabilities_async()
        output = await training.forward_async([datum([1, 40, 41])], "cross_entropy")
        assert (await output.result_async()).metrics["loss:sum"] > 0
        await (await training.forward_backward_async([datum([1, 40, 41])], "cross_entropy")).result_async()
        await (await training.optim_step_async(types.AdamParams())).result_async()
        client = await service.create_sampling_client_async(base_model=server.model)
        await client.sample_async(prompt(PROMPT), 1, types.SamplingParams(max_tokens=2))
        assert (await client.compute_logprobs_async(prompt(PROMPT)))[0] is None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(old())
