"""Read JSONL files row by row, with errors that name the file, line and field."""

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a JSONL file, and where it stands."""

    path: Path
    line: int  # counts from 1
    values: dict[str, Any]

    def error(self, message: str) -> ValueError:
        """An error that begins with the file and the line."""
        return ValueError(f"{self.path}, line {self.line}: {message}")

    def text(self, name: str, default: str | None = None) -> str:
        """The string in a field.

        Args:
            name: Name of the field.
            default: What an absent (or null) field means; None if it must be there.

        Raises:
            ValueError: The field is missing or is not a string.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if name not in self.values:
            raise self._missing(name)
        if not isinstance(value, str):
            raise self.error(f'field "{name}" is {_kind(value)}, expected a string')
        return value

    def identifier(self, name: str, default: str | None = None) -> str:
        """A non-blank string, or an integer written as one.

        Args:
            name: Name of the field.
            default: What an absent (or null) field means; None if it must be there.

        Raises:
            ValueError: The field is missing, blank, or neither string nor integer.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if name not in self.values:
            raise self._missing(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise self.error(
            f'field "{name}" is {_kind(value)}, expected a non-blank string'
            " or an integer"
        )

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse an unknown field that looks like a known one the row lacks.

        Other unknown fields are ignored: files often carry more than is read here.

        Args:
            known: Names of the fields that are read.

        Raises:
            ValueError: A field looks mistyped.
        """
        absent = [name for name in known if name not in self.values]
        for name in self.values.keys() - set(known):
            near = difflib.get_close_matches(name.lower(), absent, n=1, cutoff=0.75)
            if near:
                raise self.error(
                    f'unknown field "{name}"; did you mean "{near[0]}"?'
                    " (rename the field, or remove it)"
                )

    def _missing(self, name: str) -> ValueError:
        near = difflib.get_close_matches(name, self.values, n=1)
        hint = f'; did you mean it by "{near[0]}"?' if near else ""
        there = ", ".join(f'"{key}"' for key in self.values) or "none"
        return self.error(f'field "{name}" is missing (fields there: {there}){hint}')


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the objects of a JSONL file, one line in memory at a time.

    Blank lines are skipped, and so is a byte order mark.

    Args:
        path: A UTF-8 file with one JSON object per line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not UTF-8, not JSON or not an object, or the file holds
            no row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {_why_no_file(path)}")
    line, empty = 0, True
    # Bytes, because a text file would report bad UTF-8 without its line.
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip() in (b"", b"\xef\xbb\xbf"):
                continue
            empty = False
            yield Row(path, line, _parse(path, line, raw))
    if empty:
        raise ValueError(
            f"{path}: no rows in {line} lines; expected one JSON object per line"
        )


def _parse(path: Path, line: int, raw: bytes) -> dict[str, Any]:
    where = f"{path}, line {line}"
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {error.start} of the line ({error.reason});"
            " save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON: {error.msg} at column {error.colno}: "
            f"{_excerpt(text, error.pos)!r}; expected one complete JSON object per line"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: {_kind(value)}, expected a JSON object such as"
            ' {"id": ..., ...}, one per line'
        )
    return value


def _excerpt(text: str, position: int) -> str:
    start = max(0, position - 20)
    return text[start : position + 20].strip()


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string" if value.strip() else "a blank string"
    names = {bool: "true or false", dict: "an object", list: "a list"}
    return names.get(type(value), "a number")


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder, expected a JSONL file"
    if not path.parent.is_dir():
        return f"no such file, and no folder {path.parent} either"
    names = (entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"no such file; did you mean {near[0]}?" if near else "no such file"
