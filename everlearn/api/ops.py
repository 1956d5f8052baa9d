"""/livez, /readyz, /health, /metrics: what a machine or an operator asks first, open without a key (/metrics, once there are keys, on
this machine alone).

/livez: this process answers. /readyz: requests can be served now (503 and the reason otherwise). /health: both, with numbers.
The serving metrics have vLLM's names, so that its dashboards work here; everything else is `everlearn_*`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.responses import JSONResponse, Response

import everlearn
from everlearn.api.meters import ServingMetrics
from everlearn.api.services import services
from everlearn.engine.protocol import STEP_TOKENS

if TYPE_CHECKING:
    from everlearn.api.dispatch import Dispatcher
    from everlearn.api.serving import Serving
    from everlearn.api.supervise import EngineProcess

router = APIRouter(tags=["ops"])

HTTP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The registry of one app (never the global one: several apps may live in a test process)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http_seconds = Histogram(
            "everlearn_http_request_seconds", "time to answer, by route", ["method", "route"], buckets=HTTP_BUCKETS, registry=self.registry
        )
        self.http_total = Counter(
            "everlearn_http_requests", "answers, by route and status", ["method", "route", "status"], registry=self.registry
        )
        self.http_running = Gauge(
            "everlearn_http_requests_running", "HTTP requests being answered, long polls included", registry=self.registry
        )
        self.requests_total = Counter(
            "everlearn_requests", "finished requests, by kind and status", ["kind", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "everlearn_request_seconds", "from acceptance to the durable answer", ["kind"], buckets=REQUEST_BUCKETS, registry=self.registry
        )
        self.serving = ServingMetrics(self.registry)
        self.replayed_total = Counter("everlearn_replayed_commands", "commands sent again after an engine start", registry=self.registry)
        self.snapshots_total = Counter("everlearn_snapshots", "adapter snapshots that became durable", registry=self.registry)
        self.store_bytes = Gauge(
            "everlearn_store_bytes", "bytes in the store: payloads and results of the log, records", ["part"], registry=self.registry
        )
        self.records_total = Counter("everlearn_records", "records of answers that came into the database", registry=self.registry)
        self.records_lost = Counter("everlearn_records_lost", "records that could not be stored", registry=self.registry)
        self.feedback = Counter("everlearn_feedback", "feedback that was taken", ["kind", "source"], registry=self.registry)
        self.records_waiting = Gauge("everlearn_records_waiting", "records that the database has not got yet", registry=self.registry)
        self.records_spooled = Gauge("everlearn_records_spool_bytes", "bytes on disk of records that wait", registry=self.registry)

    def watch(self, engine: EngineProcess, dispatcher: Dispatcher, serving: Serving) -> None:
        """Adds the gauges that are read when somebody asks."""
        self.registry.register(EngineCollector(engine, dispatcher, serving))


class EngineCollector(Collector):
    def __init__(self, engine: EngineProcess, dispatcher: Dispatcher, serving: Serving):
        self.engine, self.dispatcher, self.serving = engine, dispatcher, serving

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        engine, beat = self.engine, self.engine.heartbeat
        model = engine.settings.models.default
        ready, _ = engine.readiness()
        yield gauge("everlearn_engine_up", "1 if the engine can serve", int(ready))
        yield GaugeMetricFamily("everlearn_engine_generation", "engine processes started so far", engine.generation)
        yield counter("everlearn_engine_restarts", "engine processes that died", engine.restarts)
        yield counter("everlearn_trained_tokens", "tokens trained", engine.counter("trained_tokens"))
        yield counter("everlearn_optimizer_steps", "optimizer steps", engine.counter("optimizer_steps"))
        for name, value in (*self.dispatcher.stats().items(), *self.serving.stats().items()):
            yield gauge(f"everlearn_{name}", name.replace("_", " "), value)
        yield counter("vllm:generation_tokens", "tokens sampled", engine.counter("sampled_tokens"), model)
        yield counter("vllm:prompt_tokens", "prompt tokens", engine.counter("prompt_tokens"), model)
        yield counter("vllm:prefix_cache_queries", "prompt tokens looked up in the prefix cache", engine.counter("prompt_tokens"), model)
        yield counter("vllm:prefix_cache_hits", "prompt tokens found there", engine.counter("prefix_hit_tokens"), model)
        yield counter("vllm:prompt_tokens_cached", "the same, by its later name", engine.counter("prefix_hit_tokens"), model)
        yield sources(engine.counter("prompt_tokens"), engine.counter("prefix_hit_tokens"), model)
        yield counter("vllm:num_preemptions", "sequences that gave up their KV blocks for others", engine.counter("preemptions"), model)
        yield steps(engine.step_sizes(), engine.counter("step_tokens"), model)
        yield counter("everlearn_grammar_compiles", "grammars compiled", engine.counter("grammar_compiles"))
        yield counter("everlearn_deadlines_passed", "samples that ended at their deadline", engine.counter("deadlines_passed"))
        if beat is not None:
            yield gauge("vllm:num_requests_running", "sequences that decode", beat.sampling_running, model)
            yield from waiting(beat.sampling_waiting, beat.sampling_compiling, model)
            usage = beat.kv_blocks_used / beat.kv_blocks_total if beat.kv_blocks_total else 0.0
            yield gauge("vllm:kv_cache_usage_perc", "share of KV blocks in use (1 = all)", usage, model)
            yield cache_config(engine.settings.engine.block_size, beat.kv_blocks_total, model)
            yield gauge("everlearn_sampling_compiling", "requests whose grammar is being compiled", beat.sampling_compiling)
            yield gauge("everlearn_training_queued", "training requests in the engine", beat.training_queued)
            yield gauge("everlearn_engine_rss_bytes", "memory of the engine process", beat.rss_bytes)


def gauge(name: str, text: str, value: float, model: str | None = None) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["model_name"] if model else [])
    family.add_metric([model] if model else [], value)
    return family


def counter(name: str, text: str, value: float, model: str | None = None) -> Metric:
    family = CounterMetricFamily(name, text, labels=["model_name"] if model else [])
    family.add_metric([model] if model else [], value)
    return family


def sources(prompt: int, cached: int, model: str) -> Metric:
    family = CounterMetricFamily("vllm:prompt_tokens_by_source", "prompt tokens, computed or cached", labels=["model_name", "source"])
    for source, value in (("local_compute", prompt - cached), ("local_cache_hit", cached)):
        family.add_metric([model, source], value)
    return family


def waiting(room: int, grammar: int, model: str) -> Iterable[Metric]:
    """vLLM's reasons: no room yet, or not ready to run (here: its grammar is being compiled)."""
    yield gauge("vllm:num_requests_waiting", "sequences that wait", room + grammar, model)
    labels = ["model_name", "reason"]
    family = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "for room, or for their grammar (deferred)", labels=labels)
    for reason, value in (("capacity", room), ("deferred", grammar)):
        family.add_metric([model, reason], value)
    yield family


def cache_config(block_size: int, blocks: int, model: str) -> Metric:
    """Labels with vLLM's names, which routers read; the value says nothing."""
    labels = {"model_name": model, "block_size": str(block_size), "num_gpu_blocks": str(blocks), "enable_prefix_caching": "True"}
    family = GaugeMetricFamily("vllm:cache_config_info", "the KV cache", labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def steps(sizes: list[int], tokens: int, model: str) -> Metric:
    family = HistogramMetricFamily("vllm:iteration_tokens_total", "tokens that a sampling step computes", labels=["model_name"])
    bounds = [*map(float, STEP_TOKENS), math.inf]
    family.add_metric([model], [(floatToGoString(bound), sum(sizes[: n + 1])) for n, bound in enumerate(bounds)], tokens)
    return family


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    ready, reason = services(request).dispatcher.readiness()
    body = {"status": "ready" if ready else "not ready", "reason": reason}
    return JSONResponse(body, 200 if ready else 503, headers=None if ready else {"retry-after": "1"})


@router.get("/health")
async def health(request: Request) -> Response:
    """Readiness with numbers; no names, ids or tenants, since it is open."""
    svc = services(request)
    engine = svc.engine
    ready, reason = svc.dispatcher.readiness()
    beat = engine.heartbeat
    body: dict[str, Any] = {
        "status": "ready" if ready else "not ready",
        "reason": reason,
        "version": everlearn.__version__,
        "uptime_seconds": round(time.time() - svc.started_at, 1),
        "engine": {
            "state": str(engine.state),
            "pid": engine.pid,
            "restarts": engine.restarts,
            "device": engine.ready.device if engine.ready else None,
            "dtype": engine.ready.dtype if engine.ready else None,
            "models": [model.name for model in engine.ready.models] if engine.ready else [],
            "activity": beat.activity if beat else None,
            "heartbeat_age_seconds": round(time.time() - beat.unix_time, 1) if beat else None,
            "last_progress_age_seconds": round(time.time() - beat.last_progress, 1) if beat else None,
        },
        "requests": svc.dispatcher.stats() | svc.serving.stats(),
    }
    return JSONResponse(body, 200 if ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(generate_latest(services(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
