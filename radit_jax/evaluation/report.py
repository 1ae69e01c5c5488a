"""The report of an evaluation: numbers, tables, plots, and every answer to read.

``write_report`` fills a folder:

- ``index.html``: all of it as one page, with a reader for questions;
- ``results.json``: the rows, values in [0, 1];
- ``differences.json``: systems compared question by question;
- ``results.md``: the tables of the paper, paired differences, generations to read;
- ``results.png``: every system on every dataset, and three more plots where there is
  something to plot: ``passages.png``, ``calibration.png``, ``retrieval.png``;
- ``figures/``: pictures that were handed in;
- ``generations.jsonl``: one line per question and system.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from radit_jax.evaluation import plots, tables
from radit_jax.evaluation.calibration import Calibration, calibrations
from radit_jax.evaluation.files import write_generations, write_rows
from radit_jax.evaluation.markdown import markdown_page
from radit_jax.evaluation.page import html_page
from radit_jax.evaluation.paper_tables import paper_tables
from radit_jax.evaluation.records import (
    Difference,
    Generation,
    Picture,
    Row,
    check_metrics,
    is_retrieval,
    name_of,
)
from radit_jax.evaluation.votes import Revoted, Vote, revote

# More questions than this are in generations.jsonl only: a page with the passages of
# all would be too large for a browser.
PAGE_QUESTIONS = 4000

_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(
    folder: str | Path,
    rows: Sequence[Row],
    generations: Sequence[Generation],
    differences: Sequence[Difference] = (),
    seed: int = 0,
    examples: int = 8,
    vote: Vote | None = None,
    figures: Mapping[str, Path] | None = None,
    page_questions: int = PAGE_QUESTIONS,
) -> None:
    """Write the report's files; the folder is made if need be.

    Args:
        folder: where to.
        rows: the numbers, in the order the tables should have.
        generations: every answer of every system.
        differences: see ``compare`` of ``records``.
        seed: of the choice of generations to show.
        examples: how many questions ``results.md`` shows.
        vote: rule of the ensemble; with it, numbers by how many passages vote.
        figures: title -> a PNG file to show.
        page_questions: how many questions ``index.html`` shows.

    Raises:
        ValueError: if a row or generation is doubled or has a value that makes no
            sense, or if no row has a metric of answers.
        FileNotFoundError: a figure is not there.
    """
    figures = figures or {}
    _check(rows, generations)
    _check_figures(figures)
    folder = Path(folder)
    revoted = revote(generations, vote, seed) if vote else None
    calibrated = calibrations(generations)
    found = [
        *paper_tables(rows, revoted),
        # One metric alone stands above already.
        *(t for t in tables.metric_tables(rows) if len(t.cells[0]) > 4),
        tables.retrieval_table(rows),
        tables.difference_table(differences),
        tables.calibration_table(calibrated),
        *tables.kind_tables(generations),
    ]
    shown = [table for table in found if table is not None]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [*_plot(folder, rows, revoted, calibrated), *_copy(folder, figures)]
    write_rows(folder / "results.json", rows)
    write_rows(folder / "differences.json", differences)
    write_generations(folder / "generations.jsonl", generations)
    markdown = markdown_page(shown, pictures, generations, examples, seed)
    (folder / "results.md").write_text(markdown, encoding="utf-8")
    page = html_page(folder, shown, pictures, generations, page_questions, seed)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _plot(
    folder: Path,
    rows: Sequence[Row],
    revoted: Revoted | None,
    calibrated: Sequence[Calibration],
) -> list[Picture]:
    """What there is to plot."""
    plots.plot_results(rows, folder / "results.png")
    found = [Picture("Answers", "results.png")]
    if revoted and revoted.rows:
        plots.plot_passages(rows, revoted, folder / "passages.png")
        found.append(Picture("Number of passages", "passages.png"))
    if any(is_retrieval(row.metric) for row in rows):
        plots.plot_retrieval(rows, folder / "retrieval.png")
        found.append(Picture("Retrieval", "retrieval.png"))
    if calibrated:
        plots.plot_calibration(rows, calibrated, folder / "calibration.png")
        found.append(Picture("Calibration", "calibration.png"))
    return found


def _copy(folder: Path, figures: Mapping[str, Path]) -> list[Picture]:
    """Into ``figures/``, under names that links can have."""
    found = []
    for number, (title, source) in enumerate(figures.items(), 1):
        words = re.findall(r"[a-z0-9]+", title.lower())
        file = f"figures/{'_'.join([str(number), *words])}.png"
        (folder / "figures").mkdir(exist_ok=True)
        shutil.copyfile(source, folder / file)
        found.append(Picture(title, file))
    return found


def _check_figures(figures: Mapping[str, Path]) -> None:
    for title, file in figures.items():
        if not file.is_file():
            raise FileNotFoundError(f"figure {title!r}: there is no file {file}")
        with file.open("rb") as stream:
            if stream.read(8) != _PNG:
                raise ValueError(f"figure {title!r}: {file} is no PNG file")


def _check(rows: Sequence[Row], generations: Sequence[Generation]) -> None:
    _no_doubles("row", [(r.system, r.dataset, r.metric) for r in rows])
    _no_doubles(
        "generation", [(g.system, g.dataset, g.question_id) for g in generations]
    )
    for row in rows:
        if not (0 <= row.lo <= row.hi <= 1 and 0 <= row.value <= 1 and row.n > 0):
            raise ValueError(f"{row} must have value, lo <= hi in [0, 1] and n > 0")
    if not any(not is_retrieval(row.metric) for row in rows):
        raise ValueError("no row has a metric of answers; there is nothing to report")
    check_metrics(generations)
    for g in generations:
        shares = {**g.metrics, "confidence": g.confidence}
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name_of(g)}: {name} {value} must be in [0, 1]")
        if g.choice_scores and len(g.choice_scores) != len(g.choices):
            raise ValueError(
                f"{name_of(g)}: {len(g.choice_scores)} scores for {len(g.choices)} "
                "choices"
            )
        if not all(map(math.isfinite, g.choice_scores)):
            raise ValueError(f"{name_of(g)}: choice scores {g.choice_scores}")
        for passage in g.passages:
            for field in ("weight", "log_probability"):
                value = getattr(passage, field)
                if value is not None and not math.isfinite(value):
                    raise ValueError(
                        f"{name_of(g)}: passage {passage.id} has {field} {value}"
                    )


def _no_doubles(what: str, keys: Sequence[tuple[str, ...]]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"two {what}s for {' / '.join(key)}")
        seen.add(key)
