"""Log lines: one event is one line, whatever is in it."""

from __future__ import annotations

import json
import logging

from everlearn.telemetry import JsonFormatter, TextFormatter, request_id_var


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("everlearn.test", logging.INFO, "f.py", 1, message, (), None)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_text_lines_can_not_be_forged() -> None:
    line = TextFormatter().format(record("run \x1b[31mname\r\n12:00 info forged \ud800 \u2028", path="a\nb"))
    assert "\n" not in line and "\x1b" not in line and "\r" not in line and "\u2028" not in line
    line.encode()


def test_json_lines_hold_the_fields_and_the_request_id() -> None:
    token = request_id_var.set("req_1")
    try:
        line = JsonFormatter().format(record("hello\nthere", ms=1.5))
    finally:
        request_id_var.reset(token)
    assert "\n" not in line
    event = json.loads(line)
    assert (event["message"], event["ms"], event["request_id"], event["level"]) == ("hello\nthere", 1.5, "req_1", "info")
