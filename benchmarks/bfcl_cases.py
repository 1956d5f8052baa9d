"""Cases of the Berkeley function-calling leaderboard: read from its files, as tools of our API, and a call judged as it judges.

A case is one question with one function and the answers that count as right. The judge follows the leaderboard's own rules for Python
(its `ast_checker`): the name is the function's, what is required is there, nothing is unknown, types are those of the schema (an integer
does for a float), and each value is one of those listed; texts are compared without case, spaces and ,./-_*^. Knows no server.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
PYTHON = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
MAX_ITEMS = 32  # more than any right answer has
FILE = "BFCL_v4_simple_python.json"


@dataclass(frozen=True)
class Case:
    """`answers[name]` lists the values that are right for an argument; "" among them: it may be left out."""

    id: str
    messages: list[dict[str, Any]]
    name: str
    tool: dict[str, Any]
    answers: dict[str, list[Any]]

    @property
    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = self.tool["function"]["parameters"]
        return schema

    def strict_tool(self) -> dict[str, Any]:
        return {**self.tool, "function": {**self.tool["function"], "strict": True}}

    def right_call(self) -> dict[str, Any]:
        """The shortest right arguments: of each value the first, and nothing that may be left out."""
        required = self.schema.get("required", ())
        return {name: first(values) for name, values in self.answers.items() if name in required or "" not in values}


def load(folder: Path) -> list[Case]:
    """The leaderboard's simple Python cases, in its order. Raises SystemExit where its files aren't in `folder`."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
        answers = (folder / "possible_answer" / FILE).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"{error.filename} is not there; --data is a folder with the leaderboard's {FILE} and possible_answer/") from None
    right = {row["id"]: row["ground_truth"] for row in map(json.loads, answers)}
    return [case_of(row, right[row["id"]]) for row in map(json.loads, lines)]


def case_of(row: dict[str, Any], truth: list[dict[str, Any]]) -> Case:
    [function], [messages], [answer] = row["function"], row["question"], truth
    [values] = answer.values()
    shown = {key: function[key] for key in ("name", "description") if key in function}
    tool = {"type": "function", "function": {**shown, "parameters": schema_of(function["parameters"])}}
    return Case(row["id"], messages, function["name"], tool, values)


def schema_of(part: Any) -> Any:
    """The leaderboard's schema in the words of JSON schema. Objects that list their properties are closed, and arrays end."""
    if isinstance(part, list):
        return [schema_of(item) for item in part]
    if not isinstance(part, dict):
        return part
    made = {key: schema_of(value) for key, value in part.items() if key not in ("type", "properties", "optional")}
    kind = part.get("type")
    kind = TYPES.get(kind, kind) if isinstance(kind, str) else None
    if kind is not None:
        made = {"type": kind, **made}
    if kind == "array":  # small models repeat an item for ever where nothing says how many there may be
        made = {**made, "maxItems": MAX_ITEMS}
    if "properties" in part:
        made["properties"] = {name: schema_of(value) for name, value in part["properties"].items()}
        made["additionalProperties"] = False
    return made


def first(values: list[Any]) -> Any:
    """The first listed value, as it is written in a call: in objects every entry lists its values again."""
    return plain(next(value for value in values if value != ""))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: first(values) for key, values in value.items() if "" not in values}
    return [plain(item) for item in value] if isinstance(value, list) else value


# ---- the judge ----


def right(case: Case, name: str, arguments: Any) -> bool:
    """Whether a call is one that the leaderboard counts."""
    if name != case.name or not isinstance(arguments, dict):
        return False
    properties = case.schema["properties"]
    if not set(case.schema.get("required", ())) <= set(arguments) <= set(properties) & set(case.answers):
        return False
    if not all(name in arguments or "" in values for name, values in case.answers.items()):
        return False
    return all(one_of(value, case.answers[name], properties[name]) for name, value in arguments.items())


def one_of(value: Any, listed: list[Any], schema: dict[str, Any]) -> bool:
    expected = PYTHON.get(schema.get("type", "string"), str)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected and type(value) not in {type(item) for item in listed if item != ""}:
        return False  # a variable's name may stand for a value where the answers say so
    return any(same(value, item) for item in listed)


def same(value: Any, item: Any) -> bool:
    if isinstance(value, dict) and isinstance(item, dict):
        return set(value) <= set(item) and all(
            any(same(value[key], one) for one in listed) if key in value else "" in listed for key, listed in item.items()
        )
    if isinstance(value, list) and isinstance(item, list):
        return len(value) == len(item) and all(map(same, value, item))
    if isinstance(value, str) and isinstance(item, str):
        return bare(value) == bare(item)
    return isinstance(value, bool) == isinstance(item, bool) and bool(value == item)


def bare(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
