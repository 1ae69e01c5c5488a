"""The report: results with intervals as JSON, Markdown, a chart, and every generation.

``write_report`` fills a folder:

- ``results.json``: the rows, values in [0, 1];
- ``differences.json``: systems compared question by question;
- ``results.md``: the same as tables, paired differences, and generations to read;
- ``results.png``: exact match of every system on every dataset;
- ``generations.jsonl``: one line per question and system.
"""

import itertools
import json
import math
import random
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from radit_jax.evaluation.metrics import bootstrap_interval, paired_difference

# The columns of the tables, in order; other answer metrics follow by name.
ANSWER_METRICS = ("em", "f1")
RETRIEVAL_METRICS = (
    *("answer@1", "answer@5", "answer@10"),
    *("gold@1", "gold@5", "gold@10"),
    "mrr",
)
_DISPLAY = {"em": "EM", "f1": "F1", "mrr": "MRR"}

# Colours that stay apart in greyscale and for the colour-blind, then a second round.
_COLOURS = ("#9aa5b1", "#4c78a8", "#e08a3c", "#3f9c8f", "#8f6bb3", "#b8a03a")


class Row(NamedTuple):
    """One number of the report."""

    system: str
    dataset: str
    metric: str  # "em", "f1", "answer@5", "gold@1", "mrr", ...
    value: float  # mean over the questions, in [0, 1]
    n: int  # questions
    lo: float  # 95 % interval
    hi: float


class Values(NamedTuple):
    """One metric of a system for every question of a dataset."""

    system: str
    dataset: str
    metric: str
    values_N: np.ndarray
    groups_N: np.ndarray | None = None  # questions that are resampled as a whole
    questions: tuple[str, ...] = ()  # their ids


class Difference(NamedTuple):
    """By how much one system beats another on the same questions."""

    dataset: str
    first: str
    second: str
    metric: str
    value: float  # second - first
    n: int
    lo: float  # 95 % interval, paired bootstrap
    hi: float
    p_value: float  # two-sided, of a sign-flip permutation test


class SourcePassage(NamedTuple):
    """A passage a system was given."""

    id: int
    title: str
    section: str
    text: str
    weight: float | None = None  # in the ensemble; None when there was none
    answer: str | None = None  # what the system says from this passage alone


class Generation(NamedTuple):
    """What one system answered to one question."""

    system: str
    dataset: str
    question_id: str
    kind: str  # kind of question, "" when unknown
    question: str
    answers: tuple[str, ...]  # the gold answers
    prediction: str
    passages: tuple[SourcePassage, ...]  # best first; empty for a closed-book system
    em: float
    f1: float
    group: str = ""  # what the question is about; groups are resampled as a whole


def measure(values: Values, seed: int) -> Row:
    """The row of a metric, from its value for every question.

    Raises:
        ValueError: as ``metrics.bootstrap_interval``.
    """
    values_N = values.values_N
    lo, hi = bootstrap_interval(values_N, seed, groups_N=values.groups_N)
    mean = float(values_N.mean(dtype=np.float64))
    return Row(*values[:3], mean, len(values_N), lo, hi)


def answer_values(generations: Sequence[Generation]) -> list[Values]:
    """EM and F1 of every system on every dataset of the generations.

    Questions stand in the order of their ids, so that systems can be paired.
    """
    found = []
    for dataset in _unique(g.dataset for g in generations):
        for system in _unique(g.system for g in generations):
            ours = [
                g for g in generations if (g.system, g.dataset) == (system, dataset)
            ]
            ours.sort(key=lambda g: g.question_id)
            if ours:
                groups_N = _groups(ours)
                for metric in ANSWER_METRICS:
                    values_N = np.array([float(getattr(g, metric)) for g in ours])
                    found.append(
                        Values(
                            *(system, dataset, metric, values_N, groups_N),
                            tuple(g.question_id for g in ours),
                        )
                    )
    return found


def compare(
    values: Sequence[Values], pairs: Sequence[tuple[str, str]], seed: int
) -> list[Difference]:
    """(first, second) systems question by question, on every dataset and metric.

    Raises:
        ValueError: a pair names a system that has no values, or the two have values
            for different questions or metrics.
    """
    by_system: dict[str, dict[tuple[str, str], Values]] = {}
    for found in values:
        by_system.setdefault(found.system, {})[found.dataset, found.metric] = found
    differences = []
    for first, second in pairs:
        for name in (first, second):
            if name not in by_system:
                raise ValueError(
                    f"cannot compare {name!r}: it has no values; systems that have are "
                    f"{sorted(by_system)}"
                )
        ours, theirs = by_system[first], by_system[second]
        if ours.keys() != theirs.keys():
            odd = min(ours.keys() ^ theirs.keys())
            raise ValueError(
                f"cannot pair {first!r} with {second!r}: only one of them has "
                f"{odd[1]} on {odd[0]}"
            )
        for (dataset, metric), mine in ours.items():
            other = theirs[dataset, metric]
            if mine.questions != other.questions:
                odd_ones = {*mine.questions} ^ {*other.questions}
                raise ValueError(
                    f"cannot pair {first!r} with {second!r}: only one of them answered "
                    f"question {min(odd_ones)!r} of {dataset}"
                )
            gain = paired_difference(
                mine.values_N,
                other.values_N,
                seed,
                groups_N=mine.groups_N,
            )
            differences.append(
                Difference(
                    *(dataset, first, second, metric, gain.value, gain.n),
                    *(gain.lo, gain.hi, gain.p_value),
                )
            )
    return differences


def write_report(
    folder: str | Path,
    rows: Sequence[Row],
    generations: Sequence[Generation],
    differences: Sequence[Difference] = (),
    seed: int = 0,
    examples: int = 8,
) -> None:
    """Write the report's files; the folder is made if need be.

    Args:
        folder: where to.
        rows: the numbers, in the order the tables should have.
        generations: every answer of every system.
        differences: see ``compare``.
        seed: of the choice of generations to show.
        examples: how many questions to show.

    Raises:
        ValueError: if a row or generation is doubled or has a value outside [0, 1], or
            if no row has metric "em".
    """
    _check(rows, generations)
    sections = [
        "# Results",
        "All numbers are percentages; in brackets the 95 % bootstrap interval over "
        "questions (over groups of questions where they have groups).",
        *_titled("Answers", _markdown(_answer_cells(rows))),
        *_titled("Retrieval", _markdown(_retrieval_cells(rows))),
        *_kind_sections(generations),
        *_titled("Paired differences", _differences_section(differences)),
        *_titled("Generations", _examples_section(generations, examples, seed)),
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot_results(rows, folder / "results.png")
    for name, table in (("results", rows), ("differences", differences)):
        lines = [_with_interval(row._asdict()) for row in table]
        _write(folder / f"{name}.json", _json(lines, indent=1))
    _write(folder / "results.md", "\n\n".join(sections))
    records = (_json(_record(generation)) for generation in generations)
    _write(folder / "generations.jsonl", "\n".join(records))


def _with_interval(fields: dict[str, object]) -> dict[str, object]:
    interval = [fields.pop("lo"), fields.pop("hi")]
    return {**fields, "ci95": interval}


def read_rows(folder: Path) -> list[Row]:
    """Those of a written report."""
    return [Row(**row) for row in _read_lines(folder / "results.json")]


def read_differences(folder: Path) -> list[Difference]:
    """Those of a written report."""
    return [Difference(**row) for row in _read_lines(folder / "differences.json")]


def _read_lines(file: Path) -> list[dict]:
    found = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        lo, hi = row.pop("ci95")
        found.append({**row, "lo": lo, "hi": hi})
    return found


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n" if text else "", encoding="utf-8")


def _json(value: object, indent: int | None = None) -> str:
    def plain(number: object) -> object:
        if isinstance(number, np.generic):  # ids and scores come out of arrays
            return number.item()
        raise TypeError(f"{number!r} has no place in JSON")

    return json.dumps(
        value, indent=indent, ensure_ascii=False, allow_nan=False, default=plain
    )


def _record(generation: Generation) -> dict[str, object]:
    passages = [passage._asdict() for passage in generation.passages]
    return {**generation._asdict(), "passages": passages}


def _check(rows: Sequence[Row], generations: Sequence[Generation]) -> None:
    _no_doubles("row", [(r.system, r.dataset, r.metric) for r in rows])
    _no_doubles(
        "generation", [(g.system, g.dataset, g.question_id) for g in generations]
    )
    for row in rows:
        if not (0 <= row.lo <= row.hi <= 1 and 0 <= row.value <= 1 and row.n > 0):
            raise ValueError(f"{row} must have value, lo <= hi in [0, 1] and n > 0")
    for g in generations:
        if not (0 <= g.em <= 1 and 0 <= g.f1 <= 1):
            raise ValueError(
                f"{g.system} on question {g.question_id!r} of {g.dataset}: em {g.em} "
                f"and f1 {g.f1} must be in [0, 1]"
            )
        for passage in g.passages:
            if passage.weight is not None and not math.isfinite(passage.weight):
                raise ValueError(
                    f"{g.system} on question {g.question_id!r} of {g.dataset}: passage "
                    f"{passage.id} has weight {passage.weight}"
                )


def _no_doubles(what: str, keys: Sequence[tuple[str, ...]]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"two {what}s for {' / '.join(key)}")
        seen.add(key)


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _groups(generations: Sequence[Generation]) -> np.ndarray | None:
    """Group labels if every question has one."""
    labels = [g.group for g in generations]
    return np.array(labels) if all(labels) else None


# Tables are lists of rows of cells, the header first; Markdown and the terminal differ
# only in how they draw the lines.


def _is_retrieval(metric: str) -> bool:
    return metric == "mrr" or metric.startswith(("answer@", "gold@"))


def _metrics(rows: Sequence[Row], retrieval: bool) -> list[str]:
    present = _unique(r.metric for r in rows if _is_retrieval(r.metric) == retrieval)
    order = RETRIEVAL_METRICS if retrieval else ANSWER_METRICS
    known = [metric for metric in order if metric in present]
    return known + [metric for metric in present if metric not in known]


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{100 * row.value:.1f} [{100 * row.lo:.1f}, {100 * row.hi:.1f}]"


def _n(rows: Sequence[Row]) -> str:
    sizes = sorted({row.n for row in rows})
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


def _answer_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Systems by datasets and metrics; empty without answer metrics."""
    metrics = _metrics(rows, retrieval=False)
    columns = [
        (dataset, metric)
        for dataset in _unique(row.dataset for row in rows)
        for metric in metrics
        if any((row.dataset, row.metric) == (dataset, metric) for row in rows)
    ]
    if not columns:
        return []
    by_key = {(row.system, row.dataset, row.metric): row for row in rows}
    header = ["system"]
    for column in columns:
        size = _n([row for row in rows if (row.dataset, row.metric) == column])
        header.append(f"{column[0]} {_name(column[1])} (n = {size})")
    systems = _unique(row.system for row in rows if row.metric in metrics)
    return [header] + [
        [system, *(_cell(by_key.get((system, *column))) for column in columns)]
        for system in systems
    ]


def _retrieval_cells(rows: Sequence[Row]) -> list[list[str]]:
    """(dataset, system) by metrics; empty without retrieval metrics."""
    return _long_cells(rows, _metrics(rows, retrieval=True))


def _long_cells(rows: Sequence[Row], metrics: Sequence[str]) -> list[list[str]]:
    rows = [row for row in rows if row.metric in metrics]
    by_key = {(row.dataset, row.system, row.metric): row for row in rows}
    cells = [["dataset", "n", "system", *map(_name, metrics)]] if rows else []
    # Datasets in their order, and within one the systems in theirs.
    for dataset in _unique(row.dataset for row in rows):
        for system in _unique(row.system for row in rows if row.dataset == dataset):
            found = [by_key.get((dataset, system, metric)) for metric in metrics]
            size = _n([row for row in found if row])
            cells.append([dataset, size, system, *map(_cell, found)])
    return cells


def _name(metric: str) -> str:
    return _DISPLAY.get(metric, metric)


def text_report(
    rows: Sequence[Row],
    generations: Sequence[Generation] = (),
    differences: Sequence[Difference] = (),
    examples: int = 3,
    seed: int = 0,
) -> str:
    """Tables of the answer and the retrieval metrics, of differences, and a few answers
    side by side, as plain text for the terminal.

    One line per dataset and system, so that it fits a terminal however many datasets
    there are; of retrieval one per metric.
    """
    cells = _long_cells(rows, _metrics(rows, retrieval=False))
    shown = cells[:1]
    for before, line in itertools.pairwise(cells):
        repeated = line[0] == before[0]
        shown.append([" " if repeated else line[0], *line[1:]])
    chosen = _choose(generations, examples, seed)
    parts = [
        _aligned(shown, right=1),
        _aligned(_retrieval_lines(rows)),
        _aligned(_difference_cells(differences)),
        *(_text_example(answered) for answered in chosen.questions),
    ]
    return "\n\n".join(part for part in parts if part)


def _aligned(cells: Sequence[Sequence[str]], right: int | None = None) -> str:
    """Columns of equal width, a rule under the header; numbers on the right.

    Args:
        cells: lines of cells, the header first.
        right: the one column of names that is set on the right, if any.
    """
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [False, *(_numeric(column) for column in _tail(cells))]
    lines = [
        "  ".join(
            cell.rjust(width) if is_number or at == right else cell.ljust(width)
            for at, (cell, width, is_number) in enumerate(
                zip(line, widths, numeric, strict=True)
            )
        ).rstrip()
        for line in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def _retrieval_lines(rows: Sequence[Row]) -> list[list[str]]:
    """(system and metric) by datasets; empty without retrieval metrics."""
    metrics = _metrics(rows, retrieval=True)
    rows = [row for row in rows if row.metric in metrics]
    if not rows:
        return []
    datasets = _unique(row.dataset for row in rows)
    by_key = {(row.system, row.metric, row.dataset): row for row in rows}
    sizes = [_n([row for row in rows if row.dataset == name]) for name in datasets]
    header = [f"{d} (n = {n})" for d, n in zip(datasets, sizes, strict=True)]
    return [["retrieval", *header]] + [
        [f"{system} {_name(metric)}"]
        + [_cell(by_key.get((system, metric, dataset))) for dataset in datasets]
        for system in _unique(row.system for row in rows)
        for metric in metrics
    ]


def _text_example(answered: Sequence[Generation]) -> str:
    """A question, its answer and what every system said."""
    first = answered[0]
    lines = [f"{first.question}  ({first.dataset}; {' / '.join(first.answers[:2])})"]
    width = max(len(g.system) for g in answered)
    for g in answered:
        said = textwrap.shorten(g.prediction, 60, placeholder=" …") or "(nothing)"
        top = ""
        if g.passages:
            passage = g.passages[0]
            top = f"   [{passage.title}: {passage.section}]"
        lines.append(f"  {'+' if g.em else '-'} {g.system:{width}}  {said}{top}")
    return "\n".join(lines)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    if not cells:
        return ""
    rule = ["---"] + ["---:" if _numeric(column) else "---" for column in _tail(cells)]
    lines = [[_escape(cell) for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _tail(cells: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return list(zip(*(line[1:] for line in cells[1:]), strict=True))


def _numeric(column: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] in "-+<" for cell in column)


# What CommonMark and GitHub would take for markup in the middle of a line; like them,
# it leaves an underscore inside a word alone.
_MARKUP = re.compile(r"[\\`*~|$]|(?<!\w)_|_(?!\w)|<(?=[\w/!?])|&(?=#?\w+;)|\](?=\()")


def _escape(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _titled(title: str, body: str) -> list[str]:
    return [f"## {title}", body] if body else []


def _kind_sections(generations: Sequence[Generation]) -> list[str]:
    """For every dataset whose questions have kinds, EM by kind and system."""
    sections = []
    for dataset in _unique(g.dataset for g in generations):
        ours = [g for g in generations if g.dataset == dataset]
        if not any(g.kind for g in ours):
            continue
        systems = _unique(g.system for g in ours)
        cells = [["kind", "n", *systems]]
        for kind in _unique(g.kind for g in ours):
            of_kind = [g for g in ours if g.kind == kind]
            ems = {s: [g.em for g in of_kind if g.system == s] for s in systems}
            size = len({g.question_id for g in of_kind})
            means = [f"{100 * np.mean(em):.1f}" if em else "-" for em in ems.values()]
            cells.append([kind or "(none)", str(size), *means])
        title = f"Exact match by kind of question: {_escape(dataset)}"
        sections += _titled(title, _markdown(cells))
    return sections


def _difference_cells(differences: Sequence[Difference]) -> list[list[str]]:
    """A line per dataset, pair and metric; empty without differences."""
    cells = [["dataset", "comparison", "metric", "difference", "p", "n"]]
    for found in differences:
        interval = f"[{100 * found.lo:+.1f}, {100 * found.hi:+.1f}]"
        small = found.p_value < 0.001
        cells.append(
            [
                found.dataset,
                f"{found.second} over {found.first}",
                _name(found.metric),
                f"{100 * found.value:+.1f} {interval}",
                "< 0.001" if small else f"{found.p_value:.3f}",
                str(found.n),
            ]
        )
    return cells if differences else []


def _differences_section(differences: Sequence[Difference]) -> str:
    note = (
        "In points, on the same questions: paired bootstrap, and the two-sided p-value "
        "of a sign-flip permutation test."
    )
    cells = _difference_cells(differences)
    return f"{note}\n\n{_markdown(cells)}" if cells else ""


class _Choice(NamedTuple):
    """Questions to show, each with every system's answer, and out of how many."""

    questions: list[list[Generation]]
    of_split: int  # systems differ in exact match
    split: int
    of_agreed: int
    agreed: int


def _choose(generations: Sequence[Generation], examples: int, seed: int) -> _Choice:
    """Drawn at random, not picked: half of them where systems differ."""
    questions: dict[tuple[str, str], list[Generation]] = {}
    for g in generations:
        questions.setdefault((g.dataset, g.question_id), []).append(g)
    split = [k for k, v in questions.items() if len({g.em for g in v}) > 1]
    agreed = [k for k in questions if k not in set(split)]
    rng = random.Random(seed)
    # Where one side is short the other fills up.
    of_split = min(len(split), max((examples + 1) // 2, examples - len(agreed)))
    of_agreed = min(len(agreed), examples - of_split)
    keys = rng.sample(split, of_split) + rng.sample(agreed, of_agreed)
    return _Choice(
        [questions[key] for key in keys], of_split, len(split), of_agreed, len(agreed)
    )


def _examples_section(
    generations: Sequence[Generation], examples: int, seed: int
) -> str:
    """Questions with every system's answer."""
    if not generations or examples < 1:
        return ""
    chosen = _choose(generations, examples, seed)
    note = (
        f"Drawn at random (seed {seed}): {chosen.of_split} of the {chosen.split} "
        f"questions on which systems differ in exact match, {chosen.of_agreed} of the "
        f"{chosen.agreed} others."
    )
    return "\n\n".join([note, *map(_example, chosen.questions)])


def _example(answered: Sequence[Generation]) -> str:
    first = answered[0]
    kind = f", {_escape(first.kind)}" if first.kind else ""
    lines = [
        f"**{_escape(first.question)}** ({_escape(first.dataset)}{kind})",
        "",
        f"- Gold: {'; '.join(map(_escape, first.answers))}",
    ]
    tops: dict[int, list[Generation]] = {}
    for g in answered:
        if g.passages:
            tops.setdefault(g.passages[0].id, []).append(g)
    for same in tops.values():
        # Systems with different retrievers were given different passages.
        who = f" of {', '.join(_escape(g.system) for g in same)}"
        top = same[0].passages[0]
        head = f"{top.title}: {top.section}" if top.section else top.title
        text = textwrap.shorten(top.text, 240, placeholder=" …")
        label = f"Top passage{who if len(tops) > 1 else ''}"
        lines.append(f"- {label}: *{_escape(head)}* — {_escape(text)}")
    for g in answered:
        mark = "✓" if g.em == 1 else "✗"
        said = _escape(textwrap.shorten(g.prediction, 240, placeholder=" …"))
        lines.append(f"- {mark} {_escape(g.system)}: {said or '(nothing)'}")
    return "\n".join(lines)


def plot_results(rows: Sequence[Row], png: str | Path, metric: str = "em") -> None:
    """Bar chart of one metric: a panel per dataset, a bar with interval per system.

    Raises:
        ValueError: if no row has the metric.
    """
    rows = [row for row in rows if row.metric == metric]
    if not rows:
        raise ValueError(f"no row has metric {metric!r}; nothing to plot")
    # Here and without pyplot: importing the package must not load matplotlib, and a
    # figure of one's own has no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    datasets = _unique(row.dataset for row in rows)
    systems = _unique(row.system for row in rows)
    across = 2 if len(datasets) == 4 else min(3, len(datasets))
    down = -(-len(datasets) // across)
    figure = Figure(
        figsize=(8, down * (0.36 * len(systems) + 0.75) + 0.35), layout="constrained"
    )
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    end = 100 * max(row.hi for row in rows)
    for dataset, axes in zip(datasets, panels, strict=False):
        ours = [row for row in rows if row.dataset == dataset]
        at = [systems.index(row.system) for row in ours]
        values = np.array([100 * row.value for row in ours])
        bounds = np.array([[100 * row.lo, 100 * row.hi] for row in ours]).T
        errors = np.maximum(0, [values - bounds[0], bounds[1] - values])
        colours = [_COLOURS[index % len(_COLOURS)] for index in at]
        axes.barh(at, values, 0.68, color=colours, zorder=2)
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
        axes.set_title(f"{dataset}  (n = {_n(ours)})", fontsize=11, loc="left")
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color("#7b8794")
        axes.tick_params(length=0, labelsize=9.5)
        axes.tick_params(axis="x", labelcolor="#616e7c")
    wrapped = [textwrap.fill(system, 26) for system in systems]
    figure.axes[0].set_yticks(range(len(systems)), wrapped)
    figure.axes[0].set_ylim(len(systems) - 0.4, -0.6)  # the first system on top
    figure.axes[0].set_xlim(0, 1.2 * end if end else 1)
    for axes in figure.axes[len(datasets) - across : len(datasets)]:
        axes.tick_params(labelbottom=True)  # also above an empty place in the last line
    for axes in figure.axes[len(datasets) :]:
        axes.set_visible(False)
    long_name = {"em": "Exact match", "f1": "Token F1"}.get(metric, metric)
    figure.supxlabel(f"{long_name}, %, with 95 % interval", fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(png, dpi=200)
