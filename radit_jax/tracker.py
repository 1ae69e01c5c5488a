"""Metrics of a run as JSON lines, TensorBoard events and log lines; progress."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, SupportsFloat, TypeVar, overload

from absl import logging

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"

# The names that ``plot_curves`` looks for.
LOSS = "loss"
LEARNING_RATE = "learning_rate"
TOKENS_PER_SECOND = "tokens_per_second"

# A progress line in a log file at most this often.
_LOG_SECONDS = 15.0


class Tracker:
    """Keeps the metrics of a run.

    Every ``log`` appends one JSON object to ``metrics.jsonl``, adds TensorBoard scalars
    and writes one log line. A resumed run goes on in the same file: rows from the
    resumed step on, which will be computed again, are dropped first, and so is a last
    line that a kill left half written.

    On several hosts only one may have a tracker for a folder.

    Args:
        folder: where ``metrics.jsonl`` and ``tensorboard/`` go; made if need be.
        config_summary: settings shown with the run in TensorBoard and wandb.
        resume_step: the first step that will be logged, one past that of the restored
            checkpoint; 0 starts over. Without it the folder must not hold metrics yet.
        wandb_project: also log to this Weights & Biases project; "" for none.

    Raises:
        ValueError: if the folder holds metrics and ``resume_step`` is not given, or
            ``metrics.jsonl`` is damaged elsewhere than in its last line.
        ImportError: if ``wandb_project`` is set and wandb is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        config_summary: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        wandb_project: str = "",
    ):
        # First, for a missing package should leave no trace in the folder.
        wandb = _import_wandb(wandb_project) if wandb_project else None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            _drop_rows(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = _summary_writer(folder / "tensorboard", resume_step)
        if config_summary:
            lines = (f"    {name}: {value}" for name, value in config_summary.items())
            self._events.add_text("config", "\n".join(lines), resume_step or 0)
        self._wandb: Any = None
        if wandb is not None:
            self._wandb = wandb.init(
                project=wandb_project,
                dir=str(folder),
                config=dict(config_summary or {}),
                resume="auto",  # continue the run that was cut short in this folder
            )

    def log(
        self, step: int, metrics: Mapping[str, SupportsFloat], prefix: str = "train"
    ) -> None:
        """Record metrics of a step under ``<prefix>/<name>``.

        A value that is not finite becomes ``null`` in the file, for JSON has no NaN,
        and a warning in the log.

        Args:
            step: the optimizer step.
            metrics: scalars by name.
            prefix: what they are of, such as "train" or "validation".

        Raises:
            ValueError: if a name is not a string, a value not a scalar, or the prefix
                contains "/".
        """
        if not prefix or "/" in prefix:
            raise ValueError(f"prefix {prefix!r} must be a word without '/'")
        row: dict[str, float | int | None] = {"step": int(step)}
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        for name, value in values.items():
            finite = math.isfinite(value)
            row[f"{prefix}/{name}"] = value if finite else None
            if finite:
                # TensorBoard's names know no "@".
                tag = f"{prefix}/{name}".replace("@", "_")
                self._events.add_scalar(tag, value, step)
            else:
                logging.warning("step %d: %s/%s is %s", step, prefix, name, value)
        # One write of a whole line, flushed: a kill can only tear the last one.
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            finite_values = {
                name: value
                for name, value in row.items()
                if name != "step" and value is not None
            }
            self._wandb.log(finite_values, step=step)
        shown = "  ".join(f"{name} {value:>10.4g}" for name, value in values.items())
        logging.info("step %7d  %-10s  %s", step, prefix, shown)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class NoTracker:
    """Of a process that leaves the metrics of a run to another one."""

    def log(
        self, step: int, metrics: Mapping[str, SupportsFloat], prefix: str = "train"
    ) -> None:
        """Nothing is recorded."""


def _scalar(name: object, value: SupportsFloat) -> float:
    if not isinstance(name, str):
        raise ValueError(f"metric name {name!r} is a {type(name).__name__}, not a str")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} is {value!r}, not a scalar") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a last line that a kill left half written."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                logging.warning("%s: dropped a half-written last line", path)
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with a step")
        rows.append(row)
    return rows


def _drop_rows(path: Path, resume_step: int | None) -> None:
    rows = _rows(path)
    if resume_step is None:
        if rows:
            raise ValueError(
                f"{path} already has metrics up to step {rows[-1]['step']}; pass "
                "resume_step (0 starts over) or choose another folder"
            )
        resume_step = 0
    kept = [json.dumps(row) + "\n" for row in rows if row["step"] < resume_step]
    # A kill between here and the rename leaves the old file whole.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _summary_writer(folder: Path, resume_step: int | None) -> Any:
    # tensorboardX imports torch where it finds it, only to accept tensors. That takes
    # seconds and a gigabyte, and this package never loads torch, so it is hidden.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    # purge_step makes TensorBoard forget what a killed run logged after its checkpoint.
    return SummaryWriter(str(folder), purge_step=resume_step)


def _import_wandb(project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"logging to the wandb project {project!r} needs the wandb package: "
            "pip install wandb, or leave wandb_project empty"
        ) from error
    return wandb


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draw training and validation loss, learning rate and tokens per second.

    Metrics are found by the names ``loss``, ``learning_rate`` and
    ``tokens_per_second`` under any prefix; ``train/loss`` is the training loss, every
    other loss is validation. Steps whose value was not finite are gaps in the line.

    Args:
        metrics_jsonl: a file that a ``Tracker`` wrote; a half-written last line is
            passed over.
        png: the picture.

    Raises:
        ValueError: if the file has no metrics or is damaged.
    """
    rows = _rows(Path(metrics_jsonl))
    if not rows:
        raise ValueError(f"{metrics_jsonl} has no metrics to plot")
    # Here and without pyplot: importing the package must not load matplotlib, and a
    # figure of one's own has no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(math.nan if value is None else value)

    def named(name: str) -> list[str]:
        return [key for key in series if key.partition("/")[2] == name]

    losses = named(LOSS)
    panels = {
        "training loss": [key for key in losses if key == f"train/{LOSS}"],
        "validation loss": [key for key in losses if key != f"train/{LOSS}"],
        "learning rate": named(LEARNING_RATE),
        "tokens per second": named(TOKENS_PER_SECOND),
    }
    figure = Figure(figsize=(8, 5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    colours = ("#4c78a8", "#e08a3c", "#3f9c8f", "#8f6bb3")
    for axes, (title, keys) in zip(grid.flat, panels.items(), strict=True):
        for index, key in enumerate(keys):
            steps, values = series[key]
            few = len(steps) <= 30
            axes.plot(
                steps,
                values,
                color=colours[index % len(colours)],
                linewidth=1.4,
                marker="o" if few else None,
                markersize=3.5,
                label=key.partition("/")[0],
            )
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=8.5)
        if not keys:
            axes.set_yticks([])
            place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
            axes.text(0.5, 0.5, "not logged", color="#9aa5b1", **place)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#7b8794")
        axes.tick_params(length=0, labelsize=9, labelcolor="#52606d")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in grid[1]:
        axes.set_xlabel("step", fontsize=9.5)
    if panels["learning rate"]:
        grid[1, 0].yaxis.set_major_formatter("{x:g}")  # no "1e-6" in a corner
    if panels["tokens per second"]:
        grid[1, 1].yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (grid[1, 0], grid[1, 1]):
        if axes.has_data():
            axes.set_ylim(bottom=0)  # both are magnitudes: their height should say so
    FigureCanvasAgg(figure)
    figure.savefig(png, dpi=200)


class Progress(Generic[T]):
    """How far a long piece of work is; made by ``progress``."""

    def __init__(self, items: Iterable[T], what: str, unit: str, total: int | None):
        self._items = items
        self._what, self._unit, self._total = what, unit, total
        self._done = self._skipped = 0
        self._started = self._logged = time.monotonic()
        self._closed = False
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=False)
            logging.get_absl_handler().addFilter(self._make_way)

    def _make_way(self, record: Any) -> bool:
        """Takes the bar off the line that a log message is about to be written on."""
        self._bar.clear()
        return True

    def skip(self, n: int) -> None:
        """Say that n units were done by an earlier run; they do not count as speed."""
        self._done += n
        self._skipped += n
        if self._bar is not None:
            self._bar.initial += n
            self._bar.update(n)

    def update(self, n: int = 1) -> None:
        """Say that n more units are done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS and self._done != self._total:
            self._logged = now
            logging.info("%s", self._line(now, at_end=False))

    def close(self) -> None:
        """End the bar, or log a last line; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            logging.get_absl_handler().removeFilter(self._make_way)
            self._bar.close()
        else:
            logging.info("%s", self._line(time.monotonic(), at_end=True))

    def _line(self, now: float, at_end: bool) -> str:
        seconds = now - self._started
        of = "" if self._total is None else f"/{self._total}"
        line = f"{self._what}: {self._done}{of} {self._unit}"
        rate = (self._done - self._skipped) / seconds if seconds > 0 else 0.0
        if rate:
            line += f", {rate:.0f}/s" if rate >= 10 else f", {rate:.2g}/s"
        if at_end:
            line += f", took {_clock(seconds)}"
        elif rate and self._total is not None:
            line += f", {_clock(max(0, self._total - self._done) / rate)} left"
        return line

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@overload
def progress(iterable_or_total: int, what: str, unit: str) -> "Progress[Any]": ...
@overload
def progress(
    iterable_or_total: Iterable[T], what: str, unit: str, total: int | None = None
) -> "Progress[T]": ...
def progress(
    iterable_or_total: Iterable[T] | int,
    what: str,
    unit: str,
    total: int | None = None,
) -> Progress[T]:
    """Show how far a piece of work is: a bar on a terminal, else now and then a line.

    Either ``for batch in progress(batches, "index", "batches")``, or
    ``with progress(11200, "index", "passages") as bar`` and ``bar.update(n)``.

    Without a terminal there is a log line at most every 15 seconds and one at the end:
    ``index: 4096/11200 passages, 210/s, 0:34 left``.

    Args:
        iterable_or_total: what to go through, or how many units there are.
        what: the work.
        unit: what is counted, in the plural.
        total: how many items the iterable has, where ``len`` cannot say.
    """
    if isinstance(iterable_or_total, int):
        return Progress((), what, unit, iterable_or_total)
    if total is None and isinstance(iterable_or_total, Sized):
        total = len(iterable_or_total)
    return Progress(iterable_or_total, what, unit, total)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
