"""Log lines as text or JSON, one per event, and the id of the HTTP request that they belong to.

Prompts, tokens, keys and request bodies are never logged; that is a rule for callers, kept by logging names, ids and counts only.
What does get in from outside (names, paths) is escaped here, so that a line feed or an ANSI sequence in a name can't forge a line.
Nothing leaves this machine: there is no exporter in this module.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import Any

key_id_var: contextvars.ContextVar[str | None] = contextvars.ContextVar("key_id", default=None)  # of the key that this request came with
request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

# The attributes every LogRecord has; what `extra=` adds beyond them are the event's fields.
STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName", "color_message"}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave in `extra`, plus the HTTP request's id if there is one."""
    fields = {key: value for key, value in vars(record).items() if key not in STANDARD}
    if request_id := request_id_var.get():
        fields.setdefault("request_id", request_id)
    return fields


def escape(text: str) -> str:
    """Control characters and lone surrogates as backslash escapes: one event stays one line, and no terminal is steered."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={escape(str(value))}" for key, value in fields_of(record).items())
        line = f"{clock} {record.levelname.lower():<7} {escape(record.getMessage())}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def setup(log_format: str, level: int = logging.INFO) -> None:
    """Sends all logging of this process to stderr in one format. uvicorn's own handlers are replaced, its access log is off:
    requests are counted in /metrics, and those that fail are logged by `everlearn/api/app.py`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "alembic", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
        logger.setLevel(logging.WARNING)
