"""Records with errors that name file, place and field, and JSONL files of them."""

import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Longer lines are not records, and would fill the memory.
MAX_LINE_BYTES = 256 * 2**20

# What reading a .gz file raises where the file is damaged.
GZIP_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)

# No text holds these on purpose; tab, line feed and carriage return are left out.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")

# What two or more bytes of UTF-8 that were read as Windows-1252 stood for. Of these
# characters one is proof enough: letters and signs of Western Europe, punctuation and
# symbols, emoji.
_COMMON = re.compile("[\u00a0-\u00ff\u2000-\u2bff\U0001f000-\U0001ffff]")
# An accented capital before a curly quote, a dash or a trade mark (CAFÉ and U+2019)
# looks like the UTF-8 of these, which hardly occur in text.
_RARE = re.compile("[\u0180-\u036f]")


class RecordError(ValueError):
    """One record is not as it should be; the rest of its file may well be."""


Damaged = Callable[[RecordError], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, and where it stands."""

    path: Path
    line: int  # counts from 1
    values: dict[str, Any]
    unit: str = "line"  # what ``line`` counts: "line" or "record"
    inside: str = ""  # of the record, where this is an object nested in it

    @property
    def place(self) -> str:
        """Where the row stands: the file and the line or record in it."""
        return f"{self.path}, {self.unit} {self.line}{self.inside}"

    def error(self, message: str) -> RecordError:
        """An error that begins with the place of the row."""
        return RecordError(f"{self.place}: {message}")

    def text(
        self, name: str, default: str | None = None, *, checked: bool = True
    ) -> str:
        """The string in a field.

        Args:
            name: Name of the field.
            default: What an absent (or null) field means; None if it must be there.
            checked: Whether damaged text is an error: control characters, what a lost
                encoding leaves behind, and UTF-8 that was read as Windows-1252. Not
                for text that is cleaned afterwards.

        Raises:
            RecordError: The field is missing, is not a string, or is damaged.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        value = self._present(name)
        if not isinstance(value, str):
            raise self.error(f'field "{name}" is {_kind(value)}, expected a string')
        if checked:
            self._check_text(f'field "{name}"', value)
        return value

    def texts(
        self,
        name: str,
        default: tuple[str, ...] | None = None,
        *,
        checked: bool = True,
    ) -> tuple[str, ...]:
        """The strings in a field that is a list of them.

        Args:
            name: Name of the field.
            default: What an absent (or null) field means; None if it must be there.
            checked: As in ``text``.

        Raises:
            RecordError: The field is missing, is not a list of strings, or one of them
                is damaged.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        value = self._present(name)
        if not _is_list(value):
            raise self.error(
                f'field "{name}" is {_kind(value)}, expected a list of strings'
            )
        texts = tuple(value)
        for place, text in enumerate(texts, start=1):
            where = f'item {place} of "{name}"'
            if not isinstance(text, str):
                raise self.error(f"{where} is {_kind(text)}, expected a string")
            if checked:
                self._check_text(where, text)
        return texts

    def integer(self, name: str, default: int | None = None) -> int:
        """The integer in a field, also one that is written as a float or a string.

        CSV files hold strings only, and a column of integers with gaps becomes one of
        floats in many tools.

        Args:
            name: Name of the field.
            default: What an absent (or null) field means; None if it must be there.

        Raises:
            RecordError: The field is missing or is not an integer.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        value = self._present(name)
        if isinstance(value, int | np.integer) and not isinstance(value, bool):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value):
            return int(value)
        raise self.error(
            f'field "{name}" is {_kind(value)} ({str(value)[:40]!r}), expected an'
            " integer"
        )

    def identifier(self, name: str, default: str | None = None) -> str:
        """A non-blank string, or an integer written as one.

        Args:
            name: Name of the field.
            default: What an absent (or null) field means; None if it must be there.

        Raises:
            RecordError: The field is missing, blank, or neither string nor integer.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        value = self._present(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise self.error(
            f'field "{name}" is {_kind(value)}, expected a non-blank string'
            " or an integer"
        )

    def row(self, name: str) -> "Row":
        """The object in a field, as a row at the same place.

        Args:
            name: Name of the field.

        Raises:
            RecordError: The field is missing or is not an object.
        """
        value = self._present(name)
        if not isinstance(value, dict):
            raise self.error(f'field "{name}" is {_kind(value)}, expected an object')
        return self._nested(value, f', in "{name}"')

    def rows(self, name: str) -> list["Row"]:
        """The objects in a field that is a list of them, as rows at the same place.

        An object of lists of the same length counts as a list of objects: that is how
        Hugging Face and TensorFlow Datasets store one.

        Args:
            name: Name of the field.

        Raises:
            RecordError: The field is missing or is neither of the two.
        """
        value = self._present(name)
        if isinstance(value, dict):
            items: list[Any] = self._transposed(name, value)
        elif _is_list(value):
            items = list(value)
        else:
            raise self.error(
                f'field "{name}" is {_kind(value)}, expected a list of objects'
            )
        for place, item in enumerate(items, start=1):
            if not isinstance(item, dict):
                raise self.error(
                    f'item {place} of "{name}" is {_kind(item)}, expected an object'
                )
        return [
            self._nested(item, f', item {place} of "{name}"')
            for place, item in enumerate(items, start=1)
        ]

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse an unknown field that looks like a known one the row lacks.

        Other unknown fields are ignored: files often carry more than is read here.

        Args:
            known: Names of the fields that are read.

        Raises:
            RecordError: A field looks mistyped.
        """
        absent = [name for name in known if name not in self.values]
        for name in self.values.keys() - set(known):
            near = difflib.get_close_matches(name.lower(), absent, n=1, cutoff=0.75)
            if near:
                raise self.error(
                    f'unknown field "{name}"; did you mean "{near[0]}"?'
                    " (rename the field, or remove it)"
                )

    def _present(self, name: str) -> Any:
        if name not in self.values:
            near = difflib.get_close_matches(name, self.values, n=1)
            hint = f'; did you mean it by "{near[0]}"?' if near else ""
            there = ", ".join(f'"{key}"' for key in self.values) or "none"
            raise self.error(f'field "{name}" is missing (fields there: {there}){hint}')
        return self.values[name]

    def _check_text(self, where: str, text: str) -> None:
        found = _damage(text)
        if found is not None:
            kind, position = found
            raise self.error(f"{where} holds {kind}: {excerpt(text, position)!r}")

    def _nested(self, values: dict[str, Any], where: str) -> "Row":
        return Row(self.path, self.line, values, self.unit, self.inside + where)

    def _transposed(self, name: str, columns: Mapping[str, Any]) -> list[Any]:
        for column, values in columns.items():
            if not _is_list(values):
                raise self.error(
                    f'field "{name}" is an object whose "{column}" is {_kind(values)},'
                    " expected a list of objects (or an object of lists)"
                )
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise self.error(
                f'field "{name}" is an object of lists whose lengths differ: {lengths}'
            )
        return [
            dict(zip(columns, item, strict=True))
            for item in zip(*columns.values(), strict=True)
        ]


def read_rows(
    path: str | Path,
    damaged: Damaged | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Yield the objects of a JSONL file, one line in memory at a time.

    Blank lines are skipped, and so is a byte order mark. A file whose name ends in
    ``.gz`` is unpacked on the way.

    Args:
        path: A UTF-8 file with one JSON object per line.
        damaged: Called with the error about a line that is not UTF-8, not JSON or not
            an object; reading goes on with the next line. None: the error is raised.
        max_line_bytes: A longer line is an error, whatever it holds.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: A line is not UTF-8, not JSON or not an object.
        ValueError: The file holds no row, or a line that is too long, or is a damaged
            gzip file.
    """
    path = Path(path)
    line = rows = 0
    try:
        for line, raw in read_lines(path, max_line_bytes):
            if not raw.strip():
                continue
            try:
                row = _parse(path, line, raw)
            except RecordError as error:
                if damaged is None:
                    raise
                damaged(error)
                continue
            rows += 1
            yield row
    except GZIP_DAMAGE as error:
        raise gzip_error(path, rows, error) from error
    if not rows:
        raise ValueError(
            f"{path}: no rows in {line} lines; expected one JSON object per line"
        )


def read_lines(
    path: Path, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file and their numbers, without a byte order mark.

    Bytes, because a text file would report bad UTF-8 without its line.

    Args:
        path: A file; one whose name ends in ``.gz`` is unpacked on the way.
        max_line_bytes: A longer line is an error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is too long.
        EOFError: A gzip file is truncated. Other ``GZIP_DAMAGE`` is raised as well;
            see ``gzip_error``.
    """
    with open_bytes(path) as file:
        line = 0
        while raw := file.readline(max_line_bytes + 1):
            line += 1
            if len(raw) > max_line_bytes:
                raise ValueError(
                    f"{path}, line {line}: longer than {max_line_bytes:,} bytes;"
                    " expected one record per line"
                )
            yield line, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw


def open_bytes(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """Open a file for reading; one whose name ends in ``.gz`` is unpacked on the way.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {why_missing(path)}")
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(path)
    return path.open("rb")


def gzip_error(path: Path, rows: int, error: Exception) -> ValueError:
    """The error about a file that raised one of ``GZIP_DAMAGE``.

    Args:
        path: The file.
        rows: How many of its rows were read before that.
        error: What was raised.
    """
    if isinstance(error, EOFError):
        what = "a truncated gzip file"
    elif rows or not isinstance(error, gzip.BadGzipFile):
        what = "a damaged gzip file"
    else:
        what = "not a gzip file"
    return ValueError(
        f"{path}: {what} ({error}); {rows} rows were read whole before the damage;"
        " copy or download it again"
    )


def why_missing(path: Path) -> str:
    """What to say of a path that is not the file that was expected."""
    if path.is_dir():
        return "is a folder, expected a file"
    if not path.parent.is_dir():
        return f"no such file, and no folder {path.parent} either"
    near = nearest(path)
    return f"no such file; did you mean {near.name}?" if near else "no such file"


def nearest(path: Path) -> Path | None:
    """What there is of the most similar name, in the place of a path that is not."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return folder / near[0] if near else None


def _parse(path: Path, line: int, raw: bytes) -> Row:
    place = Row(path, line, {})
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise place.error(
            f"not UTF-8 at byte {error.start} of the line ({error.reason});"
            " save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise place.error(
            f"not JSON: {error.msg} at column {error.colno}:"
            f" {excerpt(text, error.pos)!r}; expected one complete JSON object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of brackets.
        raise place.error(f"JSON that cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise place.error(
            f"{_kind(value)}, expected a JSON object such as"
            ' {"id": ..., ...}, one per line'
        )
    return Row(path, line, value)


def _damage(text: str) -> tuple[str, int] | None:
    """What is wrong with a text, and where; None if nothing is."""
    found = _CONTROL.search(text)
    if found:
        return _control_name(found.group()), found.start()
    if text.isascii():
        return None
    try:
        meant = text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return None
    odd = [char for char in meant if not (char.isascii() or _RARE.match(char))]
    if len(odd) < 3 and not any(map(_COMMON.match, odd)):
        return None
    position = next(at for at, char in enumerate(text) if not char.isascii())
    return f'UTF-8 that was read as Windows-1252 (such as for "{odd[0]}")', position


def _control_name(char: str) -> str:
    if char == "\x00":
        return "a NUL character"
    code = f"U+{ord(char):04X}"
    if char == "\ufffd":
        return f"a replacement character ({code}), left by a lost encoding"
    if "\ud800" <= char <= "\udfff":
        return f"a lone surrogate ({code})"
    return f"a control character ({code})"


def excerpt(text: str, position: int) -> str:
    """What stands around a position."""
    start = max(0, position - 20)
    return text[start : position + 20].strip()


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string" if value.strip() else "a blank string"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float | np.number):
        return "a number"
    if isinstance(value, dict):
        return "an object"
    return "a list" if _is_list(value) else f"of type {type(value).__name__}"
