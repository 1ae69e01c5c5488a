"""The pictures of a report, as PNG files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from radit_jax.evaluation.calibration import Calibration
from radit_jax.evaluation.records import Row, is_retrieval, own_metrics, unique
from radit_jax.evaluation.tables import (
    dataset_name,
    metric_name,
    retrieval_metrics,
    size,
)
from radit_jax.evaluation.votes import Revoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart in greyscale and for the colour-blind, then a second round.
COLOURS = ("#9aa5b1", "#4c78a8", "#e08a3c", "#3f9c8f", "#8f6bb3", "#b8a03a")
_MARKERS = "osD^v*"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _panels(
    count: int, height: float, **share: Any
) -> tuple["Figure", list["Axes"], list["Axes"]]:
    """A figure with a panel each, and which of them are the lowest of their column."""
    # Here and without pyplot: importing the package must not load matplotlib, and a
    # figure of one's own has no global state and needs no display.
    from matplotlib.figure import Figure

    across = 2 if count == 4 else min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(8, down * height + 0.35), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, **share)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    used = list(grid.flat[:count])
    for axes in used:
        axes.set_axisbelow(True)
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#7b8794")
        axes.tick_params(length=0, labelsize=9.5, labelcolor="#616e7c")
    return figure, used, used[-across:]


def _save(figure: "Figure", png: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(png, dpi=200)


def _legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One for all panels, every name once."""
    handles: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=9.5,
    )


def plot_results(rows: Sequence[Row], png: Path) -> None:
    """The datasets' own metrics: a panel per dataset, a bar with interval per system.

    Raises:
        ValueError: if no row is of answers.
    """
    metrics = own_metrics(rows)
    rows = [row for row in rows if metrics.get(row.dataset) == row.metric]
    if not rows:
        raise ValueError("no row has a metric of answers; nothing to plot")
    systems = unique(row.system for row in rows)
    figure, panels, lowest = _panels(
        len(metrics), 0.36 * len(systems) + 0.75, sharex=True, sharey=True
    )
    end = 100 * max(row.hi for row in rows)
    for (dataset, metric), axes in zip(metrics.items(), panels, strict=True):
        ours = [row for row in rows if row.dataset == dataset]
        at = [systems.index(row.system) for row in ours]
        values = np.array([100 * row.value for row in ours])
        bounds = np.array([[100 * row.lo, 100 * row.hi] for row in ours]).T
        errors = np.maximum(0, [values - bounds[0], bounds[1] - values])
        axes.barh(at, values, 0.68, color=[_colour(index) for index in at], zorder=2)
        axes.errorbar(
            *(values, at), xerr=errors, fmt="none", ecolor="#222222", elinewidth=1.1
        )
        for index, value, right in zip(at, values, bounds[1], strict=True):
            axes.annotate(
                f"{value:.1f}",
                (max(value, right), index),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        name = f"{dataset_name(dataset)} {metric_name(metric)}"
        axes.set_title(f"{name}  (n = {size(ours)})", fontsize=10.5, loc="left")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", labelcolor="black")
    wrapped = [textwrap.fill(system, 26) for system in systems]
    panels[0].set_yticks(range(len(systems)), wrapped)
    panels[0].set_ylim(len(systems) - 0.4, -0.6)  # the first system on top
    panels[0].set_xlim(0, 1.25 * end if end else 1)
    for axes in lowest:
        axes.tick_params(labelbottom=True)  # also above an empty place in the last line
    figure.supxlabel("%, with 95 % interval", fontsize=10)
    _save(figure, png)


def plot_passages(rows: Sequence[Row], revoted: Revoted, png: Path) -> None:
    """The datasets' own metrics against the number of passages that vote.

    Args:
        rows: of the report, for systems that read nothing.
        revoted: rows by number of passages.
        png: file to write.
    """
    from matplotlib.ticker import MaxNLocator

    metrics = own_metrics(rows)
    systems = unique(row.system for row in rows)
    datasets = unique(found.row.dataset for found in revoted.rows)
    figure, panels, lowest = _panels(len(datasets), 2.5, sharex=True)
    for dataset, axes in zip(datasets, panels, strict=True):
        ours = [found for found in revoted.rows if found.row.dataset == dataset]
        for row in rows:
            if (row.dataset, row.metric) == (dataset, metrics[dataset]):
                index = systems.index(row.system)
                if row.system in revoted.without:
                    _curve(axes, index, row.system, [0], [row])
        for system in unique(found.row.system for found in ours):
            line = [found for found in ours if found.row.system == system]
            depths = [found.passages for found in line]
            index = systems.index(system)
            _curve(axes, index, system, depths, [found.row for found in line])
        name = f"{dataset_name(dataset)} {metric_name(metrics[dataset])}"
        count = size([found.row for found in ours])
        axes.set_title(f"{name}  (n = {count})", fontsize=10.5, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in lowest:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("passages that vote", fontsize=10)
    figure.supylabel("%, with 95 % interval", fontsize=10)
    _legend(figure, panels)
    _save(figure, png)


def _curve(
    axes: "Axes", index: int, system: str, x: Sequence[int], rows: Sequence[Row]
) -> None:
    colour = _colour(index)
    values = np.array([100 * row.value for row in rows])
    lo, hi = (
        np.array([100 * getattr(row, end) for row in rows]) for end in Row._fields[-2:]
    )
    axes.plot(
        x,
        values,
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4.5,
        linewidth=1.6,
        color=colour,
        label=system,
    )
    if len(rows) > 1:
        axes.fill_between(x, lo, hi, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.vlines(x, lo, hi, color=colour, linewidth=1.2)


def plot_calibration(
    rows: Sequence[Row], found: Sequence[Calibration], png: Path
) -> None:
    """Share right against confidence: a panel per system, all datasets together.

    Args:
        rows: of the report, so that a system has one colour in all plots.
        found: of systems and datasets.
        png: file to write.
    """
    systems = unique(row.system for row in rows)
    pooled = [each for each in found if not each.dataset]
    figure, panels, _ = _panels(len(pooled), 2.7, sharex=True, sharey=True)
    for each, axes in zip(pooled, panels, strict=True):
        axes.plot([0, 100], [0, 100], color="#9aa5b1", linewidth=1, linestyle="--")
        x = np.array([100 * b.confidence for b in each.bins])
        y = np.array([100 * b.correct for b in each.bins])
        lo = np.array([100 * b.lo for b in each.bins])
        hi = np.array([100 * b.hi for b in each.bins])
        errors = np.maximum(0, [y - lo, hi - y])
        colour = _colour(systems.index(each.system))
        axes.errorbar(
            *(x, y),
            yerr=errors,
            fmt="o-",
            color=colour,
            ecolor=colour,
            elinewidth=1.1,
            markersize=4.5,
        )
        for b in each.bins:
            axes.annotate(
                f"{b.n}",
                (100 * b.confidence, 100 * b.hi),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#616e7c",
            )
        name = textwrap.fill(each.system, 26)
        axes.set_title(
            f"{name}\nn = {each.n}, error {100 * each.error:.1f}",
            fontsize=10,
            loc="left",
        )
    panels[0].set_xlim(0, 102)
    panels[0].set_ylim(-4, 112)
    panels[0].set_xticks([0, 25, 50, 75, 100])
    panels[0].set_yticks([0, 25, 50, 75, 100])
    figure.supxlabel("confidence of the ensemble, %; numbers: answers", fontsize=10)
    figure.supylabel("right, %, with 95 % interval", fontsize=10)
    _save(figure, png)


def plot_retrieval(rows: Sequence[Row], png: Path) -> None:
    """Metrics of retrieval: a panel per dataset, a point per metric and retriever."""
    rows = [row for row in rows if is_retrieval(row.metric)]
    datasets = unique(row.dataset for row in rows)
    retrievers = unique(row.system for row in rows)
    metrics = retrieval_metrics(rows)
    figure, panels, lowest = _panels(
        len(datasets), 0.36 * len(metrics) + 0.75, sharex=True, sharey=True
    )
    for dataset, axes in zip(datasets, panels, strict=True):
        ours = [row for row in rows if row.dataset == dataset]
        for index, system in enumerate(retrievers):
            points = [row for row in ours if row.system == system]
            if not points:
                continue
            # Side by side within a metric's line.
            shift = 0.6 * ((index + 0.5) / len(retrievers) - 0.5)
            y = np.array([metrics.index(row.metric) + shift for row in points])
            x = np.array([100 * row.value for row in points])
            lo = np.array([100 * row.lo for row in points])
            hi = np.array([100 * row.hi for row in points])
            axes.errorbar(
                *(x, y),
                xerr=np.maximum(0, [x - lo, hi - x]),
                fmt=_MARKERS[index % len(_MARKERS)],
                color=_colour(index),
                elinewidth=1.3,
                markersize=5,
                label=system,
            )
        axes.set_title(
            f"{dataset_name(dataset)}  (n = {size(ours)})", fontsize=10.5, loc="left"
        )
        axes.tick_params(axis="y", labelcolor="black")
    panels[0].set_yticks(range(len(metrics)), [metric_name(m) for m in metrics])
    panels[0].set_ylim(len(metrics) - 0.4, -0.6)
    for axes in lowest:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("%, with 95 % interval", fontsize=10)
    _legend(figure, panels)
    _save(figure, png)
