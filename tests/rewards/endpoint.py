"""A real HTTP endpoint of somebody else's: it answers chats as a test says, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], Any]  # a request's body to: text, {token: logprob}, a status, bytes, or seconds to be silent


@contextmanager
def endpoint(answer: Answer):
    """Yields its base URL and the bodies that it got."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            said = answer(body)
            if isinstance(said, float):
                time.sleep(said)
                said = {"A": 0.0}
            status = said if isinstance(said, int) else 200
            data = said if isinstance(said, bytes) else json.dumps(completion(said)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(said: Any) -> dict[str, Any]:
    if isinstance(said, int):
        return {"error": {"message": "no", "type": "server_error", "code": None, "param": None}}
    content, logprobs = said, None
    if isinstance(said, dict):
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in said.items()]
        content = max(said, key=said.get) if said else ""
        logprobs = {"content": [{**top[0], "top_logprobs": top}] if top else [], "refusal": None}
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
