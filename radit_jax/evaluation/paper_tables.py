"""Tables 2, 3, 4 and 6 of RA-DIT, as far as there are numbers for them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from radit_jax.evaluation.records import Row, own_metrics, unique
from radit_jax.evaluation.tables import (
    NAMES,
    Table,
    cell,
    dataset_name,
    metric_name,
    numbers,
    size,
)
from radit_jax.evaluation.votes import TABLE_DEPTHS, Revoted

KNOWLEDGE = tuple(NAMES)[:10]
COMMONSENSE = tuple(NAMES)[10:]
# RA-DIT Table 4 has the six KILT tasks that it tunes on; ours goes on with the others.
KILT_DEV = KNOWLEDGE[4:]
DUAL = (
    "LM + retrieval",
    "LM + R-FT",
    "LM-FT + retrieval",
    "RA-DIT (LM-FT + R-FT)",
)


class Layout(NamedTuple):
    """Columns of a table of the paper, and what it averages over."""

    title: str
    note: str
    columns: tuple[str, ...]
    averages: tuple[tuple[str, ...], ...]
    main: bool = False


class Line(NamedTuple):
    """A line of such a table."""

    first: list[str]  # the cells on the left
    system: str
    rows: Mapping[str, Row]  # dataset -> its row


def paper_tables(rows: Sequence[Row], revoted: Revoted | None = None) -> list[Table]:
    """Tables 2, 3, 4 and 6 of RA-DIT as far as there are numbers for them.

    Args:
        rows: of the report; the datasets' own metrics are shown.
        revoted: rows by number of passages, for Table 4.
    """
    metrics = own_metrics(rows)
    shown = [row for row in rows if metrics.get(row.dataset) == row.metric]
    lines = [
        Line([system], system, {r.dataset: r for r in shown if r.system == system})
        for system in unique(row.system for row in shown)
    ]
    own = tuple(d for d in metrics if d not in COMMONSENSE and d not in KNOWLEDGE)
    dual = [line for line in lines if line.system in DUAL]
    found = [
        _paper_table(
            Layout(
                "Answers",
                "In the layout of RA-DIT Table 2: the metric of each task.",
                KNOWLEDGE + own,
                (KNOWLEDGE[:4], KNOWLEDGE, own),
                main=True,
            ),
            ["system"],
            lines,
        ),
        _paper_table(
            Layout(
                "Commonsense reasoning",
                "In the layout of RA-DIT Table 3: nothing is retrieved.",
                COMMONSENSE,
                (COMMONSENSE,),
                main=True,
            ),
            ["system"],
            lines,
        ),
        _paper_table(
            Layout(
                "Number of passages",
                "In the layout of RA-DIT Table 4: the first passages alone vote, with "
                "their weights made to sum to 1. Systems that read none stand first."
                + _left_out(revoted),
                (*KILT_DEV, *KNOWLEDGE[:4], *own),
                (KILT_DEV, own),
            ),
            ["passages", "system"],
            _depth_lines(lines, revoted),
        ),
        _paper_table(
            Layout(
                "Dual ablation",
                "In the layout of RA-DIT Table 6: either fine-tuning alone, and both.",
                KNOWLEDGE + own,
                (KNOWLEDGE, own),
            ),
            ["system"],
            dual if len(dual) > 1 else [],
        ),
    ]
    return [table for table in found if table is not None]


def _left_out(revoted: Revoted | None) -> str:
    if revoted is None or not revoted.left_out:
        return ""
    voting = {found.row.dataset for found in revoted.rows}
    names = (
        f"{system} on {dataset_name(dataset)}"
        if dataset in voting
        # None of them votes there.
        else dataset_name(dataset)
        for dataset, system in revoted.left_out
    )
    return (
        f" Left out is what is not answered by such a vote: {', '.join(unique(names))}."
    )


def _depth_lines(lines: Sequence[Line], revoted: Revoted | None) -> list[Line]:
    if revoted is None or not revoted.rows:
        return []
    datasets = {found.row.dataset for found in revoted.rows}
    found = []
    for line in lines:
        rows = {name: row for name, row in line.rows.items() if name in datasets}
        if rows and line.system in revoted.without:
            found.append(Line(["none", line.system], line.system, rows))
    for depth in TABLE_DEPTHS:
        for system in unique(line.system for line in lines):
            rows = {
                at.row.dataset: at.row
                for at in revoted.rows
                if at.passages == depth and at.row.system == system
            }
            if rows:
                found.append(Line([f"top-{depth}", system], system, rows))
    return found


def _paper_table(
    layout: Layout, first: list[str], lines: Sequence[Line]
) -> Table | None:
    columns = [d for d in layout.columns if any(d in line.rows for line in lines)]
    if not columns:
        return None
    lines = [line for line in lines if any(d in line.rows for d in columns)]
    header = list(first)
    for dataset in columns:
        rows = [line.rows[dataset] for line in lines if dataset in line.rows]
        metric = metric_name(rows[0].metric)
        header.append(f"{dataset_name(dataset)} {metric} (n = {size(rows)})")
    # Of one dataset there is no average; nor is the same one worth two columns.
    averages: dict[tuple[str, ...], tuple[str, ...]] = {}
    for group in layout.averages:
        there = tuple(dataset for dataset in columns if dataset in group)
        if len(there) > 1:
            averages.setdefault(there, group)
    for group in averages.values():
        paper = group[0] in NAMES
        header.append(f"average of {len(group)}" if paper else "average of own")
    cells = [header]
    for line in lines:
        cells.append(
            line.first
            + [cell(line.rows.get(dataset)) for dataset in columns]
            + [_average(line.rows, group) for group in averages.values()]
        )
    return Table(
        layout.title,
        layout.note + (_AVERAGES if averages else ""),
        cells,
        ("",) * len(first) + tuple(columns) + ("",) * len(averages),
        tuple(line.system for line in lines),
        layout.main,
    )


_AVERAGES = (
    " An average is over the datasets that are there, and says over how many; its "
    "interval takes them as independent."
)


def _average(rows: Mapping[str, Row], group: Sequence[str]) -> str:
    there = [rows[dataset] for dataset in group if dataset in rows]
    if not there:
        return "-"
    mean = float(np.mean([row.value for row in there]))
    # Independent errors add up as squares, on either side of the mean by themselves
    # (Zou and Donner, 2008).
    below = np.sqrt(sum((row.value - row.lo) ** 2 for row in there)) / len(there)
    above = np.sqrt(sum((row.hi - row.value) ** 2 for row in there)) / len(there)
    return f"{numbers(mean, mean - below, mean + above)}, {len(there)} of {len(group)}"
