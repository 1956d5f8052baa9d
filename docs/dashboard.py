"""Writes docs/operations/grafana.json, a Grafana dashboard of one server, from the table below: `python docs/dashboard.py`.

The serving panels ask for vLLM's names, so they show a vLLM server as well. Tests hold the file against Grafana's own types, and
every metric and label in it against what a running server exports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "operations" / "grafana.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL = '{model_name=~"$model"}'
WIDTH, HEIGHT = 8, 8  # of a panel; a row of the grid has 24 columns


class Panel(NamedTuple):
    """`queries`: legend -> PromQL. `kind`: timeseries or stat."""

    title: str
    about: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"


def quantile(share: float, metric: str, selector: str = "", by: str = "") -> str:
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({groups}) (rate({metric}_bucket{selector}[$__rate_interval])))"


def percentiles(metric: str, shares: tuple[float, ...] = (0.5, 0.9, 0.99)) -> dict[str, str]:
    return {f"p{100 * share:g}": quantile(share, metric, MODEL) for share in shares}


def rate(metric: str, selector: str = "", by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{selector}[$__rate_interval]))"


SECTIONS: dict[str, list[Panel]] = {
    "Serving": [
        Panel("Time to first token", "From arrival.", "s", percentiles("vllm:time_to_first_token_seconds")),
        Panel("Between tokens", "Streamed requests, between two steps.", "s", percentiles("vllm:inter_token_latency_seconds")),
        Panel("Request", "From arrival to the whole answer.", "s", percentiles("vllm:e2e_request_latency_seconds")),
        Panel("Waiting", "In the engine, until its turn came.", "s", percentiles("vllm:request_queue_time_seconds")),
        Panel(
            "Prefill and decode",
            "Median and 99th percentile of the time from a request's turn to its first token, and from there to its last.",
            "s",
            {
                **{f"prefill {name}": query for name, query in percentiles("vllm:request_prefill_time_seconds", (0.5, 0.99)).items()},
                **{f"decode {name}": query for name, query in percentiles("vllm:request_decode_time_seconds", (0.5, 0.99)).items()},
            },
        ),
        Panel(
            "Steps",
            "Sampling steps a second, and how many tokens each computes: mean and 90th percentile.",
            "short",
            {
                "steps a second": rate("vllm:iteration_tokens_total_count", MODEL),
                "tokens of one": f"{rate('vllm:iteration_tokens_total_sum', MODEL)} / {rate('vllm:iteration_tokens_total_count', MODEL)}",
                "tokens of one, p90": quantile(0.9, "vllm:iteration_tokens_total", MODEL),
            },
        ),
        Panel(
            "Tokens",
            "Prompts read and tokens drawn, a second.",
            "short",
            {"prompts": rate("vllm:prompt_tokens_total", MODEL), "drawn": rate("vllm:generation_tokens_total", MODEL)},
        ),
        Panel(
            "Sequences",
            "In the engine. Those that wait have no room yet, in the batch or in the KV cache, or their grammar is being compiled.",
            "short",
            {
                "running": f"sum(vllm:num_requests_running{MODEL})",
                "waiting": f"sum(vllm:num_requests_waiting{MODEL})",
                "of them, for a grammar": "everlearn_sampling_compiling",
                "live requests": "everlearn_live_requests",
            },
        ),
        Panel(
            "KV cache",
            "Share of the blocks in use, share of prompt tokens found in the prefix cache, and preemptions a second.",
            "percentunit",
            {
                "in use": f"max(vllm:kv_cache_usage_perc{MODEL})",
                "prefix hits": f"{rate('vllm:prefix_cache_hits_total', MODEL)} / {rate('vllm:prefix_cache_queries_total', MODEL)}",
                "preemptions": rate("vllm:num_preemptions_total", MODEL),
            },
        ),
        Panel(
            "Ends",
            "Why sequences ended, a second.",
            "short",
            {"{{finished_reason}}": rate("vllm:request_success_total", MODEL, "finished_reason")},
        ),
        Panel(
            "Failures",
            "Requests that ended in an error, whose client had gone, or whose time was over, a second.",
            "short",
            {
                "{{code}}": rate("everlearn_live_requests_failed_total", by="code"),
                "client gone": rate("everlearn_live_requests_cancelled_total"),
                "deadline": rate("everlearn_deadlines_passed_total"),
                "refused (429)": rate("everlearn_http_requests_total", '{status="429"}'),
            },
        ),
        Panel(
            "Lengths",
            "Median and 90th percentile of prompts and answers, in tokens.",
            "short",
            {
                **{f"prompt {name}": query for name, query in percentiles("vllm:request_prompt_tokens", shares=(0.5, 0.9)).items()},
                **{f"answer {name}": query for name, query in percentiles("vllm:request_generation_tokens", shares=(0.5, 0.9)).items()},
            },
        ),
    ],
    "Training": [
        Panel("Trained tokens", "A second, all runs together.", "short", {"tokens": rate("everlearn_trained_tokens_total")}),
        Panel(
            "Steps and snapshots",
            "A minute, all runs together.",
            "short",
            {
                "optimizer steps": f"60 * {rate('everlearn_optimizer_steps_total')}",
                "snapshots": f"60 * {rate('everlearn_snapshots_total')}",
                "replayed commands": f"60 * {rate('everlearn_replayed_commands_total')}",
            },
        ),
        Panel(
            "Waiting requests",
            "Accepted training requests and samples without an answer, and those that the engine has.",
            "short",
            {
                "training": "everlearn_training_requests_pending",
                "samples": "everlearn_sample_requests_pending",
                "in the engine": "everlearn_training_queued",
            },
        ),
        Panel(
            "Request by kind",
            "90th percentile, from acceptance to the durable answer.",
            "s",
            {"{{kind}}": quantile(0.9, "everlearn_request_seconds", by="kind")},
        ),
        Panel(
            "Finished requests",
            "By kind and status, a second.",
            "short",
            {"{{kind}} {{status}}": rate("everlearn_requests_total", by="kind, status")},
        ),
        Panel(
            "Runs",
            "Adapters in the engine, and those that are being rebuilt from the log.",
            "short",
            {"in the engine": "everlearn_runs_in_engine", "rebuilding": "everlearn_runs_rebuilding"},
        ),
    ],
    "Server": [
        Panel("Engine", "1: it can serve.", "short", {"up": "everlearn_engine_up"}, "stat"),
        Panel("Engine restarts", "Engine processes that died.", "short", {"restarts": "everlearn_engine_restarts_total"}, "stat"),
        Panel("Engine memory", "Of the engine process.", "bytes", {"resident": "everlearn_engine_rss_bytes"}, "stat"),
        Panel(
            "HTTP by route",
            "99th percentile of the time to answer; long polls and streams included.",
            "s",
            {"{{method}} {{route}}": quantile(0.99, "everlearn_http_request_seconds", by="method, route")},
        ),
        Panel("HTTP by status", "Answers a second.", "short", {"{{status}}": rate("everlearn_http_requests_total", by="status")}),
        Panel("Store", "Bytes: payloads and results of the log, contents of records.", "bytes", {"{{part}}": "everlearn_store_bytes"}),
        Panel(
            "Records",
            "Written a second, and those that the database has not got yet. A lost one is a fault.",
            "short",
            {
                "written": rate("everlearn_records_total"),
                "waiting": "everlearn_records_waiting",
                "lost": "increase(everlearn_records_lost_total[$__range])",
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for section, tiles in SECTIONS.items():
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": section, "collapsed": False, "panels": [], "gridPos": place(0, top, 24, 1)}
        )
        top += 1
        for number, panel in enumerate(tiles):
            column = number % 3
            panels.append(tile(len(panels) + 1, panel, place(column * WIDTH, top, WIDTH, HEIGHT)))
            if column == 2 or number == len(tiles) - 1:
                top += HEIGHT
    return {
        "uid": "everlearn",
        "title": "everlearn",
        "description": "Serving, training and the server itself.",
        "tags": ["everlearn", "vllm"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [variable("datasource"), variable("model")]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"h": h, "w": w, "x": x, "y": y}


def tile(number: int, panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend, "range": True, "editorMode": "code"}
        for index, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "targets": targets,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
    }


def variable(name: str) -> dict[str, Any]:
    if name == "datasource":
        return {"type": "datasource", "name": name, "label": "Prometheus", "query": "prometheus", "hide": 0}
    return {
        "type": "query",
        "name": name,
        "label": "Base model",
        "datasource": SOURCE,
        "query": "label_values(vllm:num_requests_running, model_name)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "hide": 0,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print("wrote docs/operations/grafana.json", file=sys.stderr)
