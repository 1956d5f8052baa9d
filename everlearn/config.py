"""The one typed configuration: default < TOML file < EVERLEARN_SECTION__FIELD < flag. Unknown keys fail with the nearest right key.

The environment is read here and nowhere else. Sections are named after packages. `load()` returns the settings and, for every
leaf, where its value came from (`config show` prints both).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from everlearn.errors import InvalidRequest, NotFound

PREFIX = "EVERLEARN_"
NOT_SETTINGS = ("URL", "API_KEY", "FAULT")  # the command line's own and a test's (see below), no settings of the server
TEST_PREFIX = PREFIX + "TEST_"  # what the test suite reads (docs/development.md)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiSettings(Section):
    host: str = Field("127.0.0.1", description="address to listen on; beyond localhost a key must exist first")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    max_body_bytes: int = Field(64 * 2**20, gt=0, description="largest request body after decompression; more is a 413")
    long_poll_seconds: float = Field(30.0, gt=0, le=40, description="how long retrieve_future waits before it answers with a queue state")
    max_pending_requests: int = Field(20_000, gt=0, description="accepted and unfinished requests of one tenant; more is a 429")
    live_queue: int = Field(256, ge=0, description="chat and completion sequences that may wait beyond engine.max_batch; more is a 429")
    request_seconds: float = Field(
        600.0, gt=0, description="longest time for a chat or completion; then it ends with what it has, as if at max_tokens"
    )
    gap_seconds: float = Field(
        600.0, gt=0, description="how long a training request waits for one with a lower number that hasn't come; then it goes on without"
    )
    log_format: Literal["text", "json"] = Field("text", description="how log lines are written")
    shutdown_grace_seconds: float = Field(20.0, ge=0, description="time that requests in flight get after SIGTERM")
    telemetry: bool = Field(
        True,
        description="keep what clients send to /telemetry (it never leaves this machine): of a tenant the newest 10,000, 64 MiB together",
    )


class EngineSettings(Section):
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    weights: Literal["stored", "int4", "fp8", "nf4"] = Field(
        "stored", description="frozen weights in memory: as the folder has them, or packed while they are read (layers and experts)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of the frozen base weights; auto: float32 on CPU, bfloat16 on GPU"
    )
    threads: int = Field(0, ge=0, description="CPU threads for tensor work; 0: all cores")
    micro_batch_tokens: int = Field(
        0, ge=0, description="tokens of one training slice; 0: 512 on CPU, 8192 on GPU. Serving waits for one slice at most"
    )
    batch_window_ms: float = Field(3.0, ge=0, description="how long a training batch waits for other tenants' requests")
    sampling_share: float = Field(0.7, gt=0, lt=1, description="share of the device's time that sampling gets while training waits too")
    adapter_slots: int = Field(16, ge=1, description="sampler versions kept in memory; idle ones are reloaded from disk")
    kv_tokens: int = Field(0, ge=0, description="tokens of the paged KV cache; 0: 32768 on CPU, by free memory on GPU")
    block_size: int = Field(16, ge=1, description="tokens of a KV block")
    max_batch: int = Field(64, ge=1, description="sequences that decode together")
    prefill_tokens: int = Field(0, ge=0, description="prompt tokens of one sampling step; 0: 256 on CPU, 2048 on GPU")
    max_rank: int = Field(512, ge=1, description="largest LoRA rank that is accepted")
    expert_lora: Literal["shared_outer", "per_expert", "rank_split", "off"] = Field(
        "shared_outer", description="layout of new adapters' matrices on experts (docs/design/experts.md); off: experts aren't trained"
    )
    snapshot_overhead: float = Field(
        0.1, gt=0, description="a snapshot is taken when its cost is below this share of the work it saves from replay"
    )
    snapshot_min_steps: int = Field(5, ge=1, description="optimizer steps between two snapshots, at least")
    idle_unload_seconds: float = Field(
        900.0,
        gt=0,
        description="an adapter that nobody trained for this long leaves memory; its next request rebuilds it from snapshot and log",
    )
    restart_limit: int = Field(20, ge=1, description="engine restarts within ten minutes before the server gives up and says so")
    stuck_seconds: float = Field(
        1800.0,
        gt=0,
        description="an engine that loads its model, or works without progress, for longer is killed and restarted",
    )
    queue_limit: int = Field(4096, ge=1, description="sampling sequences that may wait in the engine; more is a 429")
    grammar: Literal["llguidance", "xgrammar"] = Field(
        "llguidance", description="the library that holds answers to grammars; xgrammar is a package of its own and follows fewer schemas"
    )
    grammar_seconds: float = Field(5.0, gt=0, description="processor time that compiling a grammar may take; more is a 400")
    grammar_cache: int = Field(256, ge=1, description="compiled grammars kept in memory")
    recompute: bool = Field(False, description="recompute activations in the backward pass: less memory, a third more work")


class StoreSettings(Section):
    url: str = Field("", description="SQLAlchemy URL; empty: sqlite under the home folder; postgresql+psycopg://... for PostgreSQL")
    result_retention_seconds: float = Field(86_400, gt=0, description="how long a finished result can still be fetched")
    log_max_bytes: int = Field(
        4 * 2**30,
        gt=0,
        description="upper bound of the requests in the log (answers are bounded by their time alone); "
        "beyond it the adapters with most of them are snapshotted, and what a snapshot covers is dropped",
    )
    session_retention_seconds: float = Field(
        7 * 86_400, gt=0, description="how long a session without training runs is kept after its client, and all its samplers, fell silent"
    )
    record_retention_seconds: float = Field(
        30 * 86_400, gt=0, description="how long the record of an answer is kept, and what a training run told of its rollouts"
    )
    record_max_bytes: int = Field(4 * 2**30, gt=0, description="upper bound of the records' content; beyond it the oldest records go")
    memory_turns: int = Field(
        100_000, ge=0, description="how many of its last turns the archive of a memory holds; older ones leave it. 0: all of them"
    )
    checkpoint_max_bytes: int = Field(0, ge=0, description="upper bound of checkpoints on disk; 0: none. Over it a save is refused by name")


class BaseModelSettings(Section):
    name: str = Field(description="the id that clients use")
    path: str = Field("", description="a Hugging Face folder, a cached hub id, or empty for an embedded model")
    aliases: list[str] = Field(default_factory=list, description="public ids that mean this model too")


class ModelsSettings(Section):
    default: str = Field("smollm2", description="the base model that is loaded at start")
    base: list[BaseModelSettings] = Field(default_factory=list, description="further base models")
    aliases: dict[str, str] = Field(default_factory=dict, description="public id -> name of a base model")


class ImageSettings(Section):
    remote: bool = Field(False, description="fetch images from URLs of other hosts; off: only data URLs are taken")
    max_bytes: int = Field(20 * 2**20, gt=0, description="largest image; more is a 413")
    max_pixels: int = Field(40_000_000, gt=0, description="most pixels of an image; more is a 413")
    request_pixels: int = Field(
        1_000_000_000, gt=0, description="most pixels of all images of a request, as sent or as the model reads them; more is a 413"
    )
    timeout_seconds: float = Field(10.0, gt=0, description="time for fetching an image, redirects included")
    train_tower: bool = Field(False, description="new adapters of models that see train the vision tower too, unless their request says")
    cache_bytes: int = Field(
        0, ge=0, description="memory for features of images that were seen; 0: 256 MiB on CPU, 2 GiB on GPU. The oldest go"
    )


class FeedbackSettings(Section):
    implicit: bool = Field(
        False, description="take weak labels from the next turn of a conversation: a retry, a repetition, a correction, thanks"
    )
    source_cap: float = Field(100.0, ge=1, description="how many labels all labels of one source (a user, a program) are worth at most")
    human_weight: float = Field(1.0, ge=0, description="what a label of a person is worth")
    program_weight: float = Field(1.0, ge=0, description="what a label of a program is worth")
    model_weight: float = Field(0.5, ge=0, description="what a label of a model is worth")
    reward_models: bool = Field(
        True, description="keep a reward model for each deployment, from its feedback (docs/design/reward-model.md), beside serving"
    )
    heldout_share: float = Field(
        0.2, ge=0, lt=1, description="share of new episodes that are never trained on, so that versions can be judged with them"
    )
    review_choices: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: {"wrong": 0.0, "poor": 0.25, "fair": 0.5, "good": 0.75, "right": 1.0},
        min_length=1,
        max_length=9,
        description="what the keys 1 to 9 say of an answer on the dashboard's page Review: a label and its value, from 0 (bad) to 1 (good)",
    )


class Settings(Section):
    home: Path = Field(default_factory=lambda: Path.home() / ".everlearn", description="folder of all data")
    api: ApiSettings = Field(default_factory=ApiSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    models: ModelsSettings = Field(default_factory=ModelsSettings)
    images: ImageSettings = Field(default_factory=ImageSettings)
    feedback: FeedbackSettings = Field(default_factory=FeedbackSettings)

    @property
    def store_url(self) -> str:
        return self.store.url or f"sqlite:///{self.home / 'everlearn.db'}"


class Loaded(NamedTuple):
    """The settings, and for every leaf ("api.port") where its value came from: default, file PATH, env NAME or flag."""

    settings: Settings
    origins: dict[str, str]


# A thread of a tensor operation that is done early spins for about a tenth of a millisecond, then sleeps. OpenMP's own default spins on,
# and where the server's other process wants that core, every operation waits until the kernel has taken it from the spinner.
ENGINE_ENVIRON = {"GOMP_SPINCOUNT": "10000"}


class ClientEnviron(NamedTuple):
    """What the command line's client part reads from the environment."""

    url: str
    key: str
    no_color: bool = False


def client_environ(environ: Mapping[str, str] | None = None) -> ClientEnviron:
    environ = os.environ if environ is None else environ
    return ClientEnviron(environ.get(PREFIX + "URL", ""), environ.get(PREFIX + "API_KEY", ""), bool(environ.get("NO_COLOR")))


def engine_environ() -> dict[str, str]:
    """The environment of the engine process: the server's own, and defaults for what its libraries read from there."""
    return {**ENGINE_ENVIRON, **os.environ}


class Fault(NamedTuple):
    """What is to happen the n-th time that a process comes by a point (everlearn/faultpoints.py)."""

    point: str
    n: int
    kind: str


def faults(environ: Mapping[str, str] | None = None) -> list[Fault]:
    """EVERLEARN_FAULT=POINT:N:KIND, a test's wish, or several with commas. Nothing without it."""
    text = (os.environ if environ is None else environ).get(PREFIX + "FAULT", "")
    found = []
    for part in filter(None, text.split(",")):
        point, _, rest = part.partition(":")
        n, _, kind = rest.partition(":")
        if not (point and kind and n.isdigit() and int(n) > 0):
            raise InvalidRequest(f"EVERLEARN_FAULT={text!r} must have the form POINT:N:KIND, such as store.commit.after:3:kill")
        found.append(Fault(point, int(n), kind))
    return found


def load(path: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> Loaded:
    """Default < file < environment < flag. `flags` maps dotted keys to values; None means that the flag was not given.

    Raises NotFound for a `path` that does not exist and InvalidRequest for an unknown key or a value out of its rule.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, tuple[Any, str]] = {}
    file = find_file(path)
    if file is not None:
        given.update({key: (value, f"file {file}") for key, value in _flatten(_read_toml(file))})
    given.update({key: (value, f"env {name}") for key, value, name in _from_environ(environ)})
    given.update({key: (value, "flag") for key, value in (flags or {}).items() if value is not None})
    _refuse_unknown(given)
    try:
        settings = Settings.model_validate(_nest({key: value for key, (value, _) in given.items()}))
    except ValidationError as error:
        raise _explain(error.errors()[0], given) from None
    settings = settings.model_copy(update={"home": settings.home.expanduser().absolute()})
    return Loaded(settings, {key: given[key][1] if key in given else "default" for key in leaves()})


def masked(url: str) -> str:
    """An SQLAlchemy URL as it may be shown, right or wrong: without its password, which may stand in its query too."""
    return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", re.sub(r"((?:^|:)//[^:/@]*):.*@", r"\1:***@", url))


def find_file(path: Path | None = None) -> Path | None:
    """The file that `load` reads: `path`, else ./everlearn.toml, else ~/.config/everlearn/everlearn.toml, else none."""
    if path is not None:
        if path.is_dir():
            raise InvalidRequest(f"config file {path} is a folder; name the file in it, such as {path / 'everlearn.toml'}")
        if not path.is_file():
            raise NotFound(f"config file {path} does not exist; check --config, or leave it out to use the defaults")
        return path
    candidates = (Path("everlearn.toml"), Path.home() / ".config" / "everlearn" / "everlearn.toml")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors and checks."""
    return Settings.model_json_schema()


def leaves(section: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every dotted key, in the order in which the sections declare them."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += leaves(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not valid TOML: {error}; mend that line") from None


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys down to the leaves; a table that is itself a leaf's value (models.aliases) stays whole."""
    known = set(leaves())
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key not in known:
            yield from _flatten(value, key + ".")
        else:
            yield key, value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value
    return nested


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """EVERLEARN_API__PORT -> api.port. Lists and tables are written as JSON."""
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name.startswith(TEST_PREFIX) or name.removeprefix(PREFIX) in NOT_SETTINGS:
            continue
        text: str = environ[name]
        value: Any = text
        if text[:1] in ("[", "{"):
            try:
                value = json.loads(text)
            except ValueError as error:
                raise InvalidRequest(f"{name} is not valid JSON: {error}; lists and tables are written as JSON", param=name) from None
        yield name.removeprefix(PREFIX).lower().replace("__", "."), value, name


def _refuse_unknown(given: Mapping[str, tuple[Any, str]]) -> None:
    known = leaves()
    for key, (value, origin) in given.items():
        if key in known:
            continue
        if isinstance(value, (str, int, float)) and any(other.startswith(key + ".") for other in known):
            raise InvalidRequest(
                f"{key} ({origin}) is a section, not a value; set one of its keys, such as {nearest(key + '.', known)}", param=key
            )
        raise InvalidRequest(f"unknown setting {key} ({origin}); did you mean {nearest(key, known)}?", param=key)


def nearest(key: str, known: list[str]) -> str:
    """The known key that `key` most likely stands for: the same leaf in another section counts before similar spelling."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0)
    return close[0]


def _explain(error: ErrorDetails, given: Mapping[str, tuple[Any, str]]) -> InvalidRequest:
    """pydantic's first complaint as one sentence that names the key, the value, the rule and where the value came from."""
    path = [str(part) for part in error["loc"]]
    key = next((".".join(path[:end]) for end in range(len(path), 0, -1) if ".".join(path[:end]) in given), ".".join(path))
    origin = given[key][1] if key in given else "default"
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown setting {name} ({origin}); known there: {', '.join(BaseModelSettings.model_fields)}", param=name)
    rule = error["msg"][0].lower() + error["msg"][1:]
    return InvalidRequest(f"{name} = {error['input']!r} ({origin}): {rule}; `everlearn config schema` lists every rule", param=name)
