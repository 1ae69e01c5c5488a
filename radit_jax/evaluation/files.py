"""Rows, differences and generations in files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from radit_jax.evaluation.records import Difference, Generation, Row, SourcePassage


def to_json(value: object, indent: int | None = None) -> str:
    """JSON with the text as it is; numbers may come out of arrays.

    Raises:
        TypeError: something that JSON has no form for.
        ValueError: a number that is not finite.
    """

    def plain(number: object) -> object:
        if isinstance(number, np.generic):
            return number.item()
        if isinstance(number, Mapping):
            return dict(number)
        raise TypeError(f"{number!r} has no place in JSON")

    return json.dumps(
        value, indent=indent, ensure_ascii=False, allow_nan=False, default=plain
    )


def write_generations(file: Path, generations: Iterable[Generation]) -> None:
    """One line of JSON each."""
    with file.open("w", encoding="utf-8") as stream:
        for g in generations:
            passages = [passage._asdict() for passage in g.passages]
            stream.write(to_json({**g._asdict(), "passages": passages}) + "\n")


def read_generations(file: Path) -> list[Generation]:
    """What ``write_generations`` wrote."""
    found = []
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            for name in ("answers", "choices", "choice_scores"):
                row[name] = tuple(row[name])
            row["passages"] = tuple(SourcePassage(**p) for p in row["passages"])
            found.append(Generation(**row))
    return found


def write_rows(file: Path, rows: Iterable[Row | Difference]) -> None:
    """A JSON list of objects; the interval is ``ci95``."""
    lines = []
    for row in rows:
        fields = row._asdict()
        interval = [fields.pop("lo"), fields.pop("hi")]
        lines.append({**fields, "ci95": interval})
    file.write_text(to_json(lines, indent=1) + "\n", encoding="utf-8")


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
