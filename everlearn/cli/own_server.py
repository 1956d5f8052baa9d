"""What commands that train or examine need: the base model as a server on this home knows it, and a server, of their own if need be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from everlearn.cli.console import Console

if TYPE_CHECKING:
    from tinker import ServiceClient

    from everlearn.models.catalog import Catalog
    from everlearn.types import BaseModelInfo

LOCAL_KEY = "tml-local"  # the SDK wants a key of this form; a server without keys takes any


def resolved(console: Console, model: str) -> BaseModelInfo:
    """The model as a server on this home knows it: a name, or a folder."""
    return _resolved(_catalog(console, model), model)


def prepared(console: Console, model: str) -> BaseModelInfo:
    """The same, its folder made where it isn't there yet."""
    catalog = _catalog(console, model)
    info = _resolved(catalog, model)
    if not catalog.is_ready(info.name):
        with console.progress(f"preparing {info.name}", 1.0) as bar:
            catalog.prepare(info.name, lambda text, share: bar.update(share, text))
    return catalog.resolve(info.name)


def service(console: Console, stack: ExitStack, info: BaseModelInfo, noun: str, client: str) -> ServiceClient:
    """A client of the server that --url or the environment names, else of one on `info` that ends with the stack and logs in the home,
    under `noun`."""
    import tinker

    from everlearn.demo.server import serving

    url = console.named_url
    if not url:
        home = console.settings().home
        with console.progress("starting the server") as bar:
            on_wait: Callable[[float, str], None] = lambda seconds, state: bar.update(round(seconds), state)  # noqa: E731
            url = stack.enter_context(serving(home, home / noun / "server.log", console.config, on_wait, Path(info.path)))
    key = console.named_key or LOCAL_KEY
    return stack.enter_context(tinker.ServiceClient(base_url=url, api_key=key, user_metadata={"client": client}))


def _catalog(console: Console, model: str) -> Catalog:
    from everlearn.models.catalog import Catalog

    return Catalog(console.settings({"models.default": model} if Path(model).is_dir() else None))


def _resolved(catalog: Catalog, model: str) -> BaseModelInfo:
    return catalog.resolve(str(Path(model).absolute()) if Path(model).is_dir() else model)
