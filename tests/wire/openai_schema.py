"""OpenAI's published schemas, for answers as they come off the wire."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

FILE = Path(__file__).with_name("openai_schemas.json")


def validate(name: str, body: Any) -> None:
    """Fails with the first place where `body` isn't what the schema says."""
    problem = best_match(validator(name).iter_errors(body))
    assert problem is None, f"{name} at {list(problem.path)}: {problem.message[:300]}"


@functools.cache
def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas()}})


@functools.cache
def schemas() -> dict[str, Any]:
    return _nullable(json.loads(FILE.read_text(encoding="utf-8"))["schemas"])


def event_schema(kind: str) -> str:
    """The component of a streamed response's event: the union's own message would only say that none fits."""
    for choice in schemas()["ResponseStreamEvent"]["anyOf"]:
        name = choice["$ref"].rpartition("/")[2]
        if f'"{kind}"' in json.dumps(schemas()[name]["properties"]["type"]):
            return name
    raise AssertionError(f"no event is called {kind}")


def _nullable(node: Any) -> Any:
    """The file mixes `nullable` of OpenAPI 3.0 with 3.1."""
    if isinstance(node, list):
        return [_nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain
