"""Where a run's metrics go besides its own file: the terminal, TensorBoard, Weights & Biases, and (everlearn/rl/server_sink.py) the
server's pages. None of them can stop a run.

`train` writes `metrics.jsonl` itself, which is what counts. `Sinks` is its `on_step`: each sink gets every step's metrics, and one that
raises is switched off with one warning, because a full disk or a service that is down is no reason to lose a night of training.

    with Sinks([Terminal(), TensorBoard(folder / "tensorboard")]) as sinks:
        train(service, settings, dataset, folder, on_step=sinks)
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from everlearn.errors import Unsupported

Metrics = Mapping[str, float]


class Sink(Protocol):
    """Takes metrics by step; `close` flushes what is left."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Several sinks as one function of a step's metrics. `make` functions are taken too, and a sink that can't be made is switched off like
    one that raises later. Close it, or use it as a context manager."""

    def __init__(self, sinks: Sequence[Sink | Callable[[], Sink]]):
        self._on: list[Sink] = []
        for number, sink in enumerate(sinks):
            made = self._try(f"sink {number}", sink) if callable(sink) else sink
            if made is not None:
                self._on.append(made)

    @property
    def names(self) -> list[str]:
        """Those that are still on."""
        return [type(sink).__name__ for sink in self._on]

    def __call__(self, metrics: Metrics) -> None:
        step = int(metrics.get("step", 0))
        finite = {name: float(value) for name, value in metrics.items() if name != "step" and math.isfinite(value)}
        for sink in list(self._on):
            if self._try(type(sink).__name__, lambda sink=sink: sink.write(step, finite) or True) is None:  # type: ignore[misc]
                self._on.remove(sink)
                self._try(type(sink).__name__, sink.close, quiet=True)

    def close(self) -> None:
        for sink in self._on:
            self._try(type(sink).__name__, sink.close)
        self._on = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _try(self, name: str, act: Callable[[], Any], quiet: bool = False) -> Any:
        """What `act` returns; None, and a warning, where it raises."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001 - whatever a sink does, the run goes on
            if not quiet:
                message = f"{name} is switched off, and the run goes on without it: {type(error).__name__}: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            return None


COLUMNS = (
    ("reward", ("reward/total",)),
    ("held out", ("held_out/env/right", "held_out/reward/total")),
    ("kl", ("kl/k3",)),
    ("ess", ("ess",)),
    ("entropy", ("entropy",)),
    ("tokens", ("tokens/mean",)),
    ("collapsed", ("groups/collapsed",)),
    ("failed", ("failed",)),
    ("tok/s", ("tokens/second",)),
    ("s/step", ("seconds/step",)),
)


class Terminal:
    """A live table of the last `rows` steps, by the package rich. Where the output is no terminal (a file, a pipe), a line for each step.

    `columns` are titles and the metrics that a cell may show, the first that a step has; a column that no step has filled isn't shown.
    """

    def __init__(self, rows: int = 12, columns: Sequence[tuple[str, Sequence[str]]] = COLUMNS, console: Any = None):
        _needs("rich")
        from rich.console import Console
        from rich.live import Live

        self.rows, self.columns = rows, columns
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.kept: list[tuple[int, dict[str, str]]] = []
        self.started = time.monotonic()

    def write(self, step: int, metrics: Metrics) -> None:
        cells = {title: shown for title, names in self.columns if (shown := _cell(metrics, names))}
        self.kept = [*self.kept, (step, cells)][-self.rows :]
        if self.live is None:
            self.console.print(f"step {step}: " + ", ".join(f"{title} {cell}" for title, cell in cells.items()), highlight=False)
            return
        if not self.live.is_started:
            self.live.start()
        self.live.update(self.table(), refresh=True)

    def table(self) -> Any:
        """The last steps as a rich table."""
        from rich.table import Table

        filled = [title for title, _ in self.columns if any(title in cells for _, cells in self.kept)]
        table = Table(title=f"{time.monotonic() - self.started:.0f} s", title_justify="left")
        for title in ("step", *filled):
            table.add_column(title, justify="right")
        for step, cells in self.kept:
            table.add_row(str(step), *(cells.get(title, "") for title in filled))
        return table

    def close(self) -> None:
        if self.live is not None and self.live.is_started:
            self.live.stop()


def _cell(metrics: Metrics, names: Sequence[str]) -> str:
    for name in names:
        if name in metrics:
            value = metrics[name]
            return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"
    return ""


class TensorBoard:
    """Scalars for TensorBoard, by the package tensorboardX (which needs no TensorFlow and no torch)."""

    def __init__(self, folder: Path):
        _needs("tensorboardX")
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, by the package wandb. `settings` go to `wandb.init` (project, name, mode="offline", config ...)."""

    def __init__(self, **settings: Any):
        _needs("wandb")
        import wandb

        self.run = wandb.init(**settings)

    def write(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unsupported(f"this sink needs the package {module}, which isn't installed: pip install {module}")
