"""What the serving part counts and times, under vLLM's names, so that its dashboards work here.

Observed by the serving loop (everlearn/api/serving.py) for each request and step. The engine says with each answer how long that waited,
read its prompt and decoded; what only it knows of itself (running, waiting, cache, sizes of steps) is read from its heartbeat when
somebody asks (everlearn/api/ops.py). The label `model_name` is that of the base model: a name
that tenants choose must become no label.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram

if TYPE_CHECKING:
    from everlearn.api.serving import Generation

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
BETWEEN_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
COUNTS = (1, 2, 5, 10, 20, 50, 100)
LABEL = ["model_name"]
QUEUE_FULL = "max_num_queued_reqs"  # vLLM's word for it


class ServingMetrics:
    """Registered in the app's registry. The children of the histograms are looked up once per model: a step costs microseconds."""

    def __init__(self, registry: CollectorRegistry):
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABEL, buckets=buckets, registry=registry)

        self.ttft = histogram("vllm:time_to_first_token_seconds", "from arrival to the first token", FIRST_TOKEN)
        self.itl = histogram("vllm:inter_token_latency_seconds", "between two steps of a streamed request", BETWEEN_TOKENS)
        # vLLM renamed this one; dashboards of both ages read it.
        self.tpot_old = histogram("vllm:time_per_output_token_seconds", "the same as inter_token_latency", BETWEEN_TOKENS)
        self.tpot = histogram("vllm:request_time_per_output_token_seconds", "mean seconds for a token after the first", BETWEEN_TOKENS)
        self.seconds = histogram("vllm:e2e_request_latency_seconds", "a sampling request from acceptance to its answer", SECONDS)
        self.queue_seconds = histogram("vllm:request_queue_time_seconds", "in the engine, until its turn came", SECONDS)
        self.prefill_seconds = histogram("vllm:request_prefill_time_seconds", "in the engine, from its turn to the first token", SECONDS)
        self.decode_seconds = histogram("vllm:request_decode_time_seconds", "in the engine, from the first token to the last", SECONDS)
        self.running_seconds = histogram("vllm:request_inference_time_seconds", "in the engine, from its turn to the last token", SECONDS)
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "prompt tokens of a request", TOKENS)
        self.computed_tokens = histogram("vllm:request_prefill_kv_computed_tokens", "those that the prefix cache had not", TOKENS)
        self.generation_tokens = histogram("vllm:request_generation_tokens", "tokens drawn for a request", TOKENS)
        self.longest = histogram("vllm:request_max_num_generation_tokens", "tokens of the longest sequence of a request", TOKENS)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of a request", TOKENS)
        self.n = histogram("vllm:request_params_n", "n of a request", COUNTS)
        self.rejected = Counter("vllm:admission_rejections", "requests refused unread (429)", [*LABEL, "reason"], registry=registry)
        self.success = Counter("vllm:request_success", "samples that ended as they should", [*LABEL, "finished_reason"], registry=registry)
        self.failed = Counter("everlearn_live_requests_failed", "live requests that ended in an error", ["code"], registry=registry)
        self.cancelled = Counter("everlearn_live_requests_cancelled", "live requests whose client had gone", registry=registry)
        self._steps: dict[str, tuple[Histogram, Histogram]] = {}

    def first_token(self, model: str, seconds: float) -> None:
        self.ttft.labels(model).observe(seconds)

    def between_tokens(self, model: str, seconds: float) -> None:
        children = self._steps.get(model)
        if children is None:
            children = self._steps[model] = (self.itl.labels(model), self.tpot_old.labels(model))
        children[0].observe(seconds)
        children[1].observe(seconds)

    def queue_full(self, model: str) -> None:
        self.rejected.labels(model, QUEUE_FULL).inc()

    def ended(self, generation: Generation) -> None:
        spec, value = generation.spec, generation.value
        model = spec.target.base.name
        if value is None:
            assert generation.error is not None
            if generation.error.code != "cancelled":
                self.failed.labels(generation.error.code).inc()
            return
        drawn = [sequence.tokens.shape[0] for sequence in value.sequences]
        self.seconds.labels(model).observe(time.perf_counter() - generation.created)
        self.prompt_tokens.labels(model).observe(len(spec.prompt))
        self.computed_tokens.labels(model).observe(len(spec.prompt) - value.prompt_cache_hit_tokens)
        self.generation_tokens.labels(model).observe(sum(drawn))
        self.longest.labels(model).observe(max(drawn, default=0))
        self.max_tokens.labels(model).observe(spec.params.max_tokens)
        self.n.labels(model).observe(spec.n)
        for sequence in value.sequences:
            self.success.labels(model, sequence.stop_reason).inc()
        if times := generation.times:
            self.queue_seconds.labels(model).observe(times.queue)
            self.prefill_seconds.labels(model).observe(times.prefill)
            self.decode_seconds.labels(model).observe(times.decode)
            self.running_seconds.labels(model).observe(times.prefill + times.decode)
            if any(drawn) and not spec.stream:  # a streamed one's was seen to go out
                self.ttft.labels(model).observe(times.queue + times.prefill)
            if max(drawn, default=0) > 1:
                self.tpot.labels(model).observe(times.decode / (max(drawn) - 1))
