#!/usr/bin/env python3
"""What the API process adds to a call: milliseconds of single HTTP round trips, engine time aside.

    python benchmarks/overhead.py

On the 16 M random model: asking for server facts, accepting a sample (durable in the log before the answer), and fetching a result that
is ready. A sample of one token is also timed from submission to result, as the SDK does it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from common import arguments, server, write_result


def milliseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return times


def summary(name: str, times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    row = {"p50_ms": statistics.median(ordered), "p99_ms": ordered[int(0.99 * (len(ordered) - 1))], "n": len(ordered)}
    print(f"{name:44} p50 {row['p50_ms']:6.2f} ms   p99 {row['p99_ms']:6.2f} ms", flush=True)
    return row


def mean_in_server(metrics: str, route: str) -> float:
    """Milliseconds a request spent between the server's first and last step; the rest of a round trip is the client and the sockets."""
    figures = {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in metrics.splitlines()) if f'route="{route}"' in name
    }
    total, count = (
        next(value for name, value in figures.items() if name.startswith(f"everlearn_http_request_seconds_{part}"))
        for part in ("sum", "count")
    )
    print(f"{'  of that inside the server (mean)':44}     {1000 * total / count:6.2f} ms", flush=True)
    return 1000 * total / count


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calls", type=int, default=200)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with server(args) as live, httpx.Client(base_url=live.url, headers={"X-API-Key": "tml-benchmark"}, timeout=60) as http:

        def post(path: str, body: dict[str, Any], client: httpx.Client = http) -> dict[str, Any]:
            reply = client.post(f"/api/v1/{path}", json=body)
            reply.raise_for_status()
            return reply.json() if "json" in reply.headers["content-type"] else {}

        session = post("create_session", {"tags": [], "sdk_version": "0.38.0", "type": "create_session"})["session_id"]
        sampler = post("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": live.model})
        ids = iter(range(10**9))

        def submit(client: httpx.Client = http) -> str:
            body = {
                "num_samples": 1,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
                "sampling_params": {"max_tokens": 1, "temperature": 1.0, "seed": 1},
                "sampling_session_id": sampler["sampling_session_id"],
                "seq_id": next(ids),
            }
            return str(post("asample", body, client)["request_id"])

        facts = lambda: http.get("/api/v1/get_server_capabilities")  # noqa: E731
        results["capabilities"] = summary("get_server_capabilities", milliseconds(facts, args.calls))
        request_ids: list[str] = []
        accepted: list[float] = []
        for _ in range(args.calls):
            started = time.perf_counter()
            request_ids.append(submit())
            accepted.append(1000 * (time.perf_counter() - started))
            post("retrieve_future", {"request_id": request_ids[-1], "allow_metadata_only": False})  # so that the engine is idle again
        results["submit"] = summary("asample, accepted and durable", accepted)
        pending = iter(request_ids)
        fetch = lambda: post("retrieve_future", {"request_id": next(pending), "allow_metadata_only": False})  # noqa: E731
        results["submit"]["mean_in_server_ms"] = mean_in_server(http.get("/metrics").text, "/api/v1/asample")
        results["fetch"] = summary("retrieve_future of a finished request", milliseconds(fetch, args.calls))
        whole = lambda: post("retrieve_future", {"request_id": submit(), "allow_metadata_only": False})  # noqa: E731
        results["one_token"] = summary("one token, submission to result", milliseconds(whole, args.calls // 4))

        times: list[float] = []

        def worker() -> None:
            with httpx.Client(base_url=live.url, headers={"X-API-Key": "tml-benchmark"}, timeout=60) as own:
                times.extend(milliseconds(lambda: submit(own), args.calls // 16))

        threads = [threading.Thread(target=worker) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results["submit_16"] = summary("asample, 16 clients at once", times)
    write_result(args, "overhead", results)


if __name__ == "__main__":
    main()
