"""The tables of a report; those of the paper are in ``paper_tables``.

A table is a list of lines of cells, the header first; Markdown, the terminal and the
page differ only in how they draw it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from radit_jax.evaluation.calibration import Calibration
from radit_jax.evaluation.records import (
    Difference,
    Generation,
    Row,
    by_system,
    is_retrieval,
    unique,
)

NAMES = {
    "mmlu": "MMLU",
    "nq": "NQ",
    "tqa": "TQA",
    "eli5": "ELI5",
    "hopo": "HoPo",
    "fever": "FEV",
    "aida": "AIDA",
    "zsre": "zsRE",
    "trex": "T-REx",
    "wow": "WoW",
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "siqa": "SIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_e": "ARC-E",
    "arc_c": "ARC-C",
    "obqa": "OBQA",
}
RETRIEVAL_METRICS = (
    *("answer@1", "answer@5", "answer@10"),
    *("gold@1", "gold@5", "gold@10"),
    "mrr",
)
_METRIC_NAMES = {
    "em": "EM",
    "f1": "F1",
    "rouge_l": "ROUGE-L",
    "accuracy": "accuracy",
    "mrr": "MRR",
}


class Table(NamedTuple):
    """Lines of cells; which dataset and system a number is of leads to its answers."""

    title: str
    note: str
    cells: list[list[str]]  # the header first
    datasets: tuple[str, ...] = ()  # of every column, "" where it is of none
    systems: tuple[str, ...] = ()  # of every line below the header
    main: bool = False  # what one wants to see first


def metric_name(metric: str) -> str:
    """As the field writes it."""
    return _METRIC_NAMES.get(metric, metric)


def dataset_name(dataset: str) -> str:
    """As the paper writes it; datasets of one's own under their names."""
    return NAMES.get(dataset, dataset)


def cell(row: Row | None) -> str:
    """Its numbers; "-" where there is none."""
    return "-" if row is None else numbers(row.value, row.lo, row.hi)


def numbers(value: float, lo: float, hi: float) -> str:
    """Per cent, with an interval."""
    return f"{100 * value:.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"


def size(rows: Sequence[Row]) -> str:
    """How many questions, of rows that should agree on it."""
    sizes = sorted({row.n for row in rows})
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


def metric_tables(rows: Sequence[Row]) -> list[Table]:
    """Datasets that share their metrics, in one table: dataset, n, system, metrics."""
    answers = [row for row in rows if not is_retrieval(row.metric)]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for dataset in unique(row.dataset for row in answers):
        ours = [row for row in answers if row.dataset == dataset]
        groups.setdefault(tuple(unique(r.metric for r in ours)), []).extend(ours)
    return [
        _long_table("All metrics", "", ours, metrics)
        for metrics, ours in groups.items()
    ]


def retrieval_metrics(rows: Sequence[Row]) -> list[str]:
    """Those there are, in the field's order; others follow by name."""
    present = {row.metric for row in rows if is_retrieval(row.metric)}
    known = [metric for metric in RETRIEVAL_METRICS if metric in present]
    return known + sorted(present - set(known))


def retrieval_table(rows: Sequence[Row]) -> Table | None:
    """(dataset, system) by metrics of retrieval."""
    found = [row for row in rows if is_retrieval(row.metric)]
    if not found:
        return None
    note = (
        "answer@k: an answer stands in the first k passages; gold@k: a gold passage is "
        "among them."
    )
    return _long_table("Retrieval", note, found, retrieval_metrics(found))


def _long_table(
    title: str, note: str, rows: Sequence[Row], metrics: Sequence[str]
) -> Table:
    by_key = {(row.dataset, row.system, row.metric): row for row in rows}
    cells = [["dataset", "n", "system", *map(metric_name, metrics)]]
    # Datasets in their order, and within one the systems in theirs.
    for dataset in unique(row.dataset for row in rows):
        for system in unique(row.system for row in rows if row.dataset == dataset):
            found = [by_key.get((dataset, system, metric)) for metric in metrics]
            count = size([row for row in found if row])
            name = dataset_name(dataset)
            cells.append([name, count, system, *map(cell, found)])
    return Table(title, note, cells)


def kind_tables(generations: Sequence[Generation]) -> list[Table]:
    """For every dataset whose questions have kinds, its metric by kind and system."""
    found = []
    grouped = by_system(generations)
    for dataset in unique(dataset for dataset, _ in grouped):
        ours = {s: found for (d, s), found in grouped.items() if d == dataset}
        kinds = unique(g.kind for g in generations if g.dataset == dataset)
        if not any(kinds):
            continue
        metric = next(iter(ours.values()))[0].metric
        cells = [["kind", "n", *ours]]
        for kind in kinds:
            values = [[g.value for g in gs if g.kind == kind] for gs in ours.values()]
            means = [f"{100 * np.mean(each):.1f}" if each else "-" for each in values]
            cells.append([kind or "(none)", str(max(map(len, values))), *means])
        note = f"{dataset_name(dataset)}: {metric_name(metric)}."
        found.append(Table("Kinds of questions", note, cells))
    return found


def difference_table(differences: Sequence[Difference]) -> Table | None:
    """A line per dataset, pair and metric."""
    cells = [["dataset", "comparison", "metric", "difference", "p", "n"]]
    for found in differences:
        interval = f"[{100 * found.lo:+.1f}, {100 * found.hi:+.1f}]"
        small = found.p_value < 0.001
        cells.append(
            [
                dataset_name(found.dataset),
                f"{found.second} over {found.first}",
                metric_name(found.metric),
                f"{100 * found.value:+.1f} {interval}",
                "< 0.001" if small else f"{found.p_value:.3f}",
                str(found.n),
            ]
        )
    note = (
        "In points, on the same questions: paired bootstrap, and the two-sided p-value "
        "of a sign-flip permutation test."
    )
    return Table("Paired differences", note, cells) if differences else None


def calibration_table(found: Sequence[Calibration]) -> Table | None:
    """A line per system and dataset."""
    note = (
        "Confidence is the share of the ensemble's probability behind its answer. The "
        "expected calibration error is the mean distance of confidence and share right "
        "over ten bins of confidence, weighted by their size."
    )
    cells = [["system", "dataset", "n", "mean confidence", "right", "error"]]
    for each in found:
        cells.append(
            [
                each.system,
                dataset_name(each.dataset) or "all",
                str(each.n),
                *(
                    f"{100 * x:.1f}"
                    for x in (each.confidence, each.correct, each.error)
                ),
            ]
        )
    return Table("Calibration", note, cells) if found else None


def is_numeric(column: Sequence[str]) -> bool:
    """Whether a column's cells, without its header, are numbers, to stand right."""
    return all(text[:1].isdigit() or text[:1] in "-+<" for text in column)


def numeric_columns(cells: Sequence[Sequence[str]]) -> list[bool]:
    """``is_numeric`` of every column; the first one is a name."""
    columns = zip(*cells[1:], strict=True)
    return [at > 0 and is_numeric(column) for at, column in enumerate(columns)]
