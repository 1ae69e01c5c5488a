"""The report as plain text for the terminal."""

import itertools
import textwrap
from collections.abc import Sequence

from radit_jax.evaluation.examples import choose
from radit_jax.evaluation.records import (
    Difference,
    Generation,
    Row,
    is_retrieval,
    mark,
    unique,
)
from radit_jax.evaluation.tables import (
    cell,
    dataset_name,
    difference_table,
    metric_name,
    metric_tables,
    numeric_columns,
    retrieval_metrics,
    size,
)


def text_report(
    rows: Sequence[Row],
    generations: Sequence[Generation] = (),
    differences: Sequence[Difference] = (),
    examples: int = 3,
    seed: int = 0,
) -> str:
    """Tables of the answer and the retrieval metrics, of differences, and a few answers
    side by side.

    One line per dataset and system, so that it fits a terminal however many datasets
    there are; of retrieval one per metric.
    """
    parts = []
    for table in metric_tables(rows):
        shown = table.cells[:1]
        for before, line in itertools.pairwise(table.cells):
            repeated = line[0] == before[0]
            shown.append([" " if repeated else line[0], *line[1:]])
        parts.append(_aligned(shown, right=1))
    parts.append(_aligned(_retrieval_lines(rows)))
    compared = difference_table(differences)
    parts.append(_aligned(compared.cells if compared else []))
    chosen = choose(generations, examples, seed)
    parts += [_example(answered) for answered in chosen.questions]
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
    lines = [
        "  ".join(
            cell.rjust(width) if is_number or at == right else cell.ljust(width)
            for at, (cell, width, is_number) in enumerate(
                zip(line, widths, numeric_columns(cells), strict=True)
            )
        ).rstrip()
        for line in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def _retrieval_lines(rows: Sequence[Row]) -> list[list[str]]:
    """(system and metric) by datasets; empty without retrieval metrics."""
    rows = [row for row in rows if is_retrieval(row.metric)]
    if not rows:
        return []
    datasets = unique(row.dataset for row in rows)
    by_key = {(row.system, row.metric, row.dataset): row for row in rows}
    sizes = [size([row for row in rows if row.dataset == name]) for name in datasets]
    header = [
        f"{dataset_name(d)} (n = {n})" for d, n in zip(datasets, sizes, strict=True)
    ]
    return [["retrieval", *header]] + [
        [f"{system} {metric_name(metric)}"]
        + [cell(by_key.get((system, metric, dataset))) for dataset in datasets]
        for system in unique(row.system for row in rows)
        for metric in retrieval_metrics(rows)
    ]


def _example(answered: Sequence[Generation]) -> str:
    """A question, its answer and what every system said."""
    first = answered[0]
    gold = " / ".join(first.answers[:2])
    lines = [f"{first.question}  ({dataset_name(first.dataset)}; {gold})"]
    width = max(len(g.system) for g in answered)
    for g in answered:
        said = textwrap.shorten(g.prediction, 60, placeholder=" …") or "(nothing)"
        top = f"   [{g.passages[0].heading}]" if g.passages else ""
        sign = {"✓": "+", "✗": "-"}.get(mark(g.metric, g.value), f"{g.value:.2f}")
        lines.append(f"  {sign} {g.system:{width}}  {said}{top}")
    return "\n".join(lines)
