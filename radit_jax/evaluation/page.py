"""The report as one HTML page that needs nothing else.

The reader for questions works on JSON that stands in the page. Texts that systems and
questions share (passages, demonstrations in prompts) stand in it once, in a table of
strings; everything else refers to them by number.
"""

import base64
import html
import itertools
import re
import struct
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from radit_jax.evaluation.examples import sample_questions
from radit_jax.evaluation.files import to_json
from radit_jax.evaluation.markdown import INTRODUCTION
from radit_jax.evaluation.metrics import METRICS
from radit_jax.evaluation.records import (
    GRADED,
    Generation,
    Picture,
    SourcePassage,
    by_system,
    unique,
)
from radit_jax.evaluation.tables import (
    Table,
    dataset_name,
    metric_name,
    numeric_columns,
)

_TEMPLATE = Path(__file__).with_name("page.html")


def html_page(
    folder: Path,
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    generations: Sequence[Generation],
    most: int,
    seed: int,
) -> str:
    """The whole page.

    Args:
        folder: of the report, with the pictures.
        tables: in order; the first is on top, the later ones are folded.
        pictures: shown between the tables and the questions.
        generations: of all systems.
        most: how many questions the reader has.
        seed: of their choice where there are more.
    """
    # What is filled in has no "<" of its own but in tags that are made here, so it
    # cannot be taken for a later one of these places.
    filled = {
        "<!-- introduction -->": html.escape(INTRODUCTION),
        "<!-- tables -->": "\n".join(
            _section(title, list(found))
            for title, found in itertools.groupby(tables, lambda table: table.title)
        ),
        "<!-- pictures -->": "\n".join(_figure(folder, p) for p in pictures),
        "<!-- data -->": _embedded(payload(generations, most, seed)),
    }
    page = _TEMPLATE.read_text(encoding="utf-8")
    for place, text in filled.items():
        page = page.replace(place, text)
    return page


def _embedded(value: object) -> str:
    """JSON inside a script element, which "</script" or "<!--" would end or change."""
    return to_json(value).replace("<", "\\u003c")


class _Strings:
    """Numbers texts as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def prompt(self, prompt: str, passage: str = "") -> list[int]:
        """In pieces that other prompts have too: paragraphs, and the passage."""
        around = prompt.split(passage, 1) if passage else [prompt]
        pieces = [self._paragraphs(part) for part in around]
        inner = [self(passage)] if len(around) > 1 else []
        return [*pieces[0], *inner, *(n for piece in pieces[1:] for n in piece)]

    def _paragraphs(self, text: str) -> list[int]:
        return [self(part) for part in re.split(r"(?<=\n\n)", text) if part]


def payload(generations: Sequence[Generation], most: int, seed: int) -> dict:
    """What the reader for questions reads; see the top of the script in page.html.

    Args:
        generations: of all systems.
        most: how many questions at most.
        seed: of their choice where there are more.
    """
    text = _Strings()
    systems = unique(g.system for g in generations)
    datasets: dict[str, dict[str, object]] = {}
    for (dataset, _), ours in by_system(generations).items():
        metrics = list(ours[0].metrics)
        known = datasets.setdefault(dataset, {"asked": 0})
        datasets[dataset] = {
            "name": dataset,
            "shown": dataset_name(dataset),
            "metrics": list(map(metric_name, metrics)),
            "graded": metrics[0] in GRADED,
            "asked": max(int(str(known["asked"])), len(ours)),
        }
    places = {name: number for number, name in enumerate(datasets)}
    passages: dict[tuple[int, int, int], int] = {}

    def of_passage(g: Generation, p: SourcePassage) -> list[object]:
        key = (int(p.id), text(p.heading), text(p.text))
        right = None
        # Word overlap is slow to compute, and says little of one passage.
        if p.answer is not None and g.metric in METRICS and g.metric not in GRADED:
            right = METRICS[g.metric](p.answer, g.answers)
        return [
            passages.setdefault(key, len(passages)),
            _rounded(p.weight),
            None if p.answer is None else text(p.answer),
            _rounded(p.log_probability),
            right,
            text.prompt(p.prompt, p.text),
        ]

    def of_generation(g: Generation) -> list[object]:
        return [
            systems.index(g.system),
            text(g.prediction),
            list(map(_rounded, g.metrics.values())),
            _rounded(g.confidence),
            text.prompt(g.prompt),
            list(map(_rounded, g.choice_scores)),
            [of_passage(g, p) for p in g.passages],
        ]

    questions = [
        [
            places[first.dataset],
            first.question_id,
            first.kind,
            text(first.question),
            list(map(text, first.answers)),
            list(map(text, first.choices)),
            [of_generation(g) for g in answered],
        ]
        for answered in sample_questions(generations, most, seed)
        for first in answered[:1]
    ]
    return {
        "systems": systems,
        "datasets": list(datasets.values()),
        "questions": questions,
        "passages": list(passages),
        "strings": list(text.numbers),
        "seed": seed,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{float(value):.4g}")


def _section(title: str, tables: Sequence[Table]) -> str:
    """Tables under one heading."""
    opened = " open" if any(table.main for table in tables) else ""
    body = "\n".join(map(_table, tables))
    return (
        f"<details{opened}><summary><h2>{html.escape(title)}</h2></summary>\n"
        f"{body}</details>"
    )


def _table(table: Table) -> str:
    """In a box of its own that scrolls."""
    note = f"<p>{html.escape(table.note)}</p>\n" if table.note else ""
    right = numeric_columns(table.cells)
    head = "".join(
        f'<th scope="col"{_CLASS if number else ""}>{_stacked(cell, " (")}</th>'
        for cell, number in zip(table.cells[0], right, strict=True)
    )
    lines = []
    for at, line in enumerate(table.cells[1:]):
        cells = [f'<th scope="row">{html.escape(line[0])}</th>']
        for column, cell in enumerate(line[1:], 1):
            shown = _stacked(cell, " [")
            dataset = table.datasets[column] if table.datasets else ""
            if dataset and cell != "-":
                whose = {"dataset": dataset, "open": table.systems[at]}
                place = urllib.parse.urlencode(whose)
                shown = f'<a href="#{html.escape(place)}">{shown}</a>'
            cells.append(f"<td{_CLASS if right[column] else ''}>{shown}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'{note}<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{html.escape(table.title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>"
        + "\n".join(lines)
        + "</tbody>\n</table></div>"
    )


_CLASS = ' class="number"'


def _stacked(cell: str, mark: str) -> str:
    """What begins with the mark stands small below the rest."""
    top, found, below = cell.partition(mark)
    small = f" <small>{html.escape((found + below).strip())}</small>" if found else ""
    return html.escape(top) + small


def _figure(folder: Path, picture: Picture) -> str:
    png = (folder / picture.file).read_bytes()
    # With its size known the page does not move when a picture is decoded; a PNG file
    # has it at a fixed place.
    width, height = struct.unpack(">II", png[16:24])
    content = base64.b64encode(png).decode("ascii")
    title = html.escape(picture.title)
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<img width="{width}" height="{height}" alt="Plot: {title}" '
        f'src="data:image/png;base64,{content}"></figure>'
    )
