"""Imports fall downward, and no tensor library is above the engine."""

from __future__ import annotations

import subprocess
import sys

from everlearn.cli.main import ACTS, NOUNS

LEVELS = [
    {"types", "config", "errors", "faultpoints", "telemetry", ""},
    {"render", "store", "planner"},
    {"models", "losses", "parallel"},
    {"engine"},
    {"loop", "rl", "memory", "rewards", "evals", "synth"},
    {"cli", "api", "demo"},
]
LEVEL = {section: level for level, sections in enumerate(LEVELS) for section in sections}
HEAVY = {"torch", "transformers", "safetensors.torch", "peft", "accelerate"}
TENSOR_FREE = {"api", "store", "cli", "render", "planner", "demo", "types", "config", "errors", "faultpoints", "telemetry"}
TENSOR_FREE_MODULES = {
    "everlearn.models.catalog",
    "everlearn.models.embedded",
    "everlearn.engine.protocol",
    "everlearn.losses.spec",
    "everlearn.losses.checks",
}


def heavy(name: str) -> bool:
    return name in HEAVY or name.split(".")[0] in HEAVY


def test_every_part_of_the_package_has_a_level(sources):
    assert {source.section for source in sources} <= set(LEVEL)


def test_imports_fall_downward(sources):
    upward = []
    for source in sources:
        for name in source.imports(top_level=False):
            parts = name.split(".")
            if parts[0] != "everlearn" or len(parts) < 2 or parts[1] == source.section or parts[1] not in LEVEL:
                continue
            if LEVEL[parts[1]] > LEVEL[source.section]:
                upward.append(f"{source.path} imports {name}")
    assert not upward


CLIENTS = {"rl", "rewards", "memory"}


def test_clients_know_nothing_of_the_server(sources):
    """Reinforcement learning has no way in that a user doesn't have: the Tinker API, and what talks about errors."""
    found = [
        f"{source.path} imports {name}"
        for source in sources
        if source.section in CLIENTS
        for name in source.imports(top_level=False)
        if name.startswith("everlearn.") and name.split(".")[1] not in CLIENTS | {"errors"}
    ]
    assert not found


def test_no_tensor_library_above_the_engine_not_even_in_a_function(sources):
    found = [
        f"{source.path} imports {name}"
        for source in sources
        if source.section in TENSOR_FREE | CLIENTS or source.module in TENSOR_FREE_MODULES
        for name in source.imports(top_level=False)
        if heavy(name)
    ]
    assert not found


def test_the_api_and_the_store_reach_no_tensor_library_through_others(sources):
    known = {source.module: source for source in sources}
    reached: dict[str, str] = {}
    frontier = [(module, module) for module, source in known.items() if source.section in ("api", "store")]
    while frontier:
        module, way = frontier.pop()
        if module in reached:
            continue
        reached[module] = way
        lazy_counts = known[module].section in ("api", "store")  # what lower layers import in a function is their callers' affair
        for name in known[module].imports(top_level=not lazy_counts):
            assert not heavy(name), f"{way} -> {name}"
            if name in known:
                frontier.append((name, f"{way} -> {name}"))


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(answer.stdout.splitlines()[-1].split())


def test_the_api_process_loads_no_tensor_library():
    modules = loaded_after(
        "import everlearn.api.app, everlearn.api.server, everlearn.store.db, everlearn.models.catalog, everlearn.models.embedded"
    )
    assert not {name for name in modules if heavy(name)}


def test_help_loads_nothing_that_takes_time():
    modules = loaded_after("from everlearn.cli.main import run\nassert run(['--help']) == 0")
    slow = {
        "torch",
        "transformers",
        "pydantic",
        "httpx",
        "rich",
        "numpy",
        "sqlalchemy",
        "fastapi",
        "tinker",
        "zmq",
        "asyncio",
        "msgspec",
        "typer",
    }
    assert not modules & slow
    assert not {name for name in modules if name.startswith("everlearn.")} - {
        "everlearn.cli",
        "everlearn.cli.main",
        "everlearn.cli.console",
        "everlearn.errors",
    }


def test_importing_any_command_stays_light():
    names = [*ACTS, *NOUNS]
    modules = loaded_after("\n".join(f"import everlearn.cli.{name}" for name in names))
    assert not modules & {"torch", "transformers", "numpy", "sqlalchemy", "fastapi", "tinker", "zmq", "rich"}
