"""Datasets on disk to rows; ``layouts`` says which files these are."""

import codecs
import csv
import difflib
import gzip
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from radit_jax.data.jsonl import (
    GZIP_DAMAGE,
    MAX_LINE_BYTES,
    Damaged,
    RecordError,
    Row,
    gzip_error,
    open_bytes,
    read_lines,
    read_rows,
)
from radit_jax.data.layouts import builder_split, find_files, suffix_of

_CHUNK = 1 << 20  # bytes that are read at a time
_ARROW_FILE = b"ARROW1"
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_LFS_POINTER = b"version https://git-lfs"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how "surrogateescape" decodes a bad byte


def read_source(
    path: str | Path, split: str, config: str = "", damaged: Damaged | None = None
) -> Iterator[Row]:
    """Yield the records of a split, in constant memory.

    Values are plain Python: strings, numbers, lists and dicts. Nothing is unpickled.

    Args:
        path: As in ``find_files``.
        split: As in ``find_files``.
        config: As in ``find_files``.
        damaged: Called with the error about a record that cannot be read although
            those behind it can; reading goes on. None: the error is raised.

    Raises:
        FileNotFoundError: There is nothing at the path.
        RecordError: A record cannot be read.
        ValueError: As in ``find_files``, or a file is damaged, or there is no record.
    """
    empty = True
    for file in find_files(path, split, config):
        for row in _read(file, split, damaged):
            empty = False
            yield row
    if empty:
        raise ValueError(f'{path}: no record that can be read in split "{split}"')


def check_columns(row: Row, columns: Iterable[str], name: str) -> None:
    """Refuse a dataset whose first record lacks a column.

    Args:
        row: The first record.
        columns: Names of the fields that are read.
        name: Name of the dataset.

    Raises:
        ValueError: A column is missing.
    """
    there = ", ".join(f'"{key}"' for key in row.values) or "none"
    for column in columns:
        if column not in row.values:
            near = difflib.get_close_matches(column, row.values, n=1)
            hint = f'; did you mean it by "{near[0]}"?' if near else ""
            raise ValueError(
                f'{row.path}: the first record lacks the column "{column}" of dataset'
                f" {name} (columns there: {there}){hint}"
            )


def _read(file: Path, split: str, damaged: Damaged | None) -> Iterator[Row]:
    if file.is_dir():
        yield from _read_builder(file, split)
        return
    with file.open("rb") as start:
        if start.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{file}: only a pointer of Git LFS to the file; run git lfs pull in"
                " its repository"
            )
    rows = 0
    try:
        for row in READERS[suffix_of(file)](file, damaged):
            rows += 1
            yield row
    except GZIP_DAMAGE as error:
        raise gzip_error(file, rows, error) from error


def _report(error: RecordError, damaged: Damaged | None) -> None:
    if damaged is None:
        raise error
    damaged(error)


def _read_parquet(path: Path, damaged: Damaged | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    try:
        # Otherwise a row group would be read as a whole.
        with pq.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from _batch_rows(path, rows, batch, damaged)
                rows += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged_file(path, rows, error) from error


def _read_arrow(path: Path, damaged: Damaged | None) -> Iterator[Row]:
    import pyarrow as pa

    rows = 0
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
            source.seek(0)
            if is_file:
                file = pa.ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(source))
            for batch in batches:
                yield from _batch_rows(path, rows, batch, damaged)
                rows += batch.num_rows
            source.seek(source.size() - len(_ARROW_STREAM_END))
            # What is cut between two batches reads like a whole stream.
            if not is_file and source.read() != _ARROW_STREAM_END:
                raise _damaged_file(path, rows, "the mark of its end is missing")
    except (pa.ArrowException, OSError) as error:
        raise _damaged_file(path, rows, error) from error


def _batch_rows(
    path: Path, before: int, batch: Any, damaged: Damaged | None
) -> Iterator[Row]:
    """The records of an Arrow batch, of which there were some ``before``."""
    for at in range(batch.num_rows):
        row = Row(path, before + at + 1, {}, "record")
        try:
            (values,) = batch.slice(at, 1).to_pylist()
        except UnicodeDecodeError as error:
            _report(row.error(f"text that is not UTF-8 ({error.reason})"), damaged)
            continue
        row.values.update(values)
        yield row


def _damaged_file(path: Path, rows: int, error: Exception | str) -> ValueError:
    return ValueError(
        f"{path}: a damaged file ({error}); {rows} records were read whole before the"
        " damage; copy or download it again"
    )


def _read_table(path: Path, damaged: Damaged | None, **dialect: Any) -> Iterator[Row]:
    """Records of a CSV or TSV file, whose first line names the columns."""
    # For the whole process, but there is no other way, and longer fields harm no one.
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (raw.decode("utf-8", "surrogateescape") for _, raw in read_lines(path))
    reader = csv.reader(lines, strict=True, **dialect)
    try:
        header = next(filter(None, reader), [])
    except csv.Error as error:
        raise ValueError(f"{path}: no names of columns at the top: {error}") from error
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: a column's name occurs twice in {header}")
    while True:
        # A field may hold line breaks; a record stands where it begins.
        row = Row(path, reader.line_num + 1, {})
        try:
            fields = next(reader, None)
        except csv.Error as error:
            _report(row.error(f"malformed: {error}"), damaged)
            continue
        if fields is None:
            return
        if len(fields) == len(header) and not any(map(_NOT_UTF8.search, fields)):
            row.values.update(zip(header, fields, strict=True))
            yield row
        elif len(fields) == len(header):
            _report(row.error("not UTF-8; save the file as UTF-8"), damaged)
        elif fields:
            message = f"{len(fields)} fields, but {len(header)} columns have names"
            _report(row.error(message), damaged)


def _read_json(path: Path, damaged: Damaged | None) -> Iterator[Row]:
    """Records of a file that may hold JSON lines, an array, or an object.

    Of an object, those in the array "data", as of SQuAD; without one it is a record.
    Except in lines, a record may be of any size, and text that is not UTF-8 is damage
    of the file.
    """
    if _is_lines(path):
        yield from read_rows(path, damaged)
        return
    rows = 0
    try:
        prefix = _json_prefix(path)
        with _open_json(path) as file:
            for value in ijson.items(file, prefix, use_float=True):
                rows += 1
                if isinstance(value, dict):
                    yield Row(path, rows, value, "record")
                else:
                    other = Row(path, rows, {}, "record").error("not a JSON object")
                    _report(other, damaged)
    except ijson.JSONError as error:
        raise _damaged_file(path, rows, _json_message(error)) from error


def _json_prefix(path: Path) -> str:
    """Where in a JSON text its records are, as ijson calls it."""
    with _open_json(path) as file:
        for prefix, event, _ in ijson.parse(file):
            if event == "start_array" and prefix in ("", "data"):
                return "data.item" if prefix else "item"
    return ""


def _open_json(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """Open a file behind its byte order mark, which ijson would refuse."""
    file = open_bytes(path)
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


def _json_message(error: ijson.JSONError) -> str:
    """What ijson says, and the place it shows, in one line."""
    (message,) = error.args
    # Bytes where the place begins or ends within a character.
    if isinstance(message, bytes):
        message = message.decode("utf-8", "replace")
    what, _, place = message.partition("\n")
    place = place.partition("\n")[0].strip()
    return f"{what.rstrip('.')} at {place!r}" if place else what


def _is_lines(path: Path) -> bool:
    """Whether a file of JSON has an object on each of several lines.

    Told from what surrounds the first line break, without parsing.
    """
    last = b""  # of the first line
    ended = False
    with open_bytes(path) as file:
        for piece in iter(partial(file.readline, _CHUNK), b""):
            solid = piece.removeprefix(codecs.BOM_UTF8).strip()
            if solid and ended:
                return solid.startswith(b"{")
            if solid and not last and not solid.startswith(b"{"):
                return False
            last = solid[-1:] or last
            ended = bool(last) and piece.endswith(b"\n")
            if ended and last != b"}":
                return False
    return False


def _read_builder(folder: Path, split: str) -> Iterator[Row]:
    """Records of a folder of TensorFlow Datasets."""
    # Takes seconds to import, and few datasets come in its format.
    import tensorflow_datasets as tfds

    name = builder_split(folder, split)
    at = 0
    try:
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(name, file_format="array_record")
        for at in range(len(source)):
            yield Row(folder, at + 1, _plain(source[at]), "record")
    # Of whatever kind the first step is that trips over the damage.
    except Exception as error:
        raise _damaged_file(folder, at, error) from error


def _plain(value: Any) -> Any:
    """A value of TensorFlow Datasets as plain Python, its bytes as text."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bytes):
        # A bad byte becomes a lone surrogate, which is an error of the text it is in.
        return value.decode("utf-8", "surrogateescape")
    return value


_read_tsv = partial(_read_table, delimiter="\t", quoting=csv.QUOTE_NONE)

# How a file is read, by its suffix: one for each of ``layouts.SUFFIXES``.
READERS: dict[str, Callable[[Path, Damaged | None], Iterator[Row]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": read_rows,
    ".json": _read_json,
    ".jsonl.gz": read_rows,
    ".json.gz": _read_json,
    ".csv": _read_table,
    ".csv.gz": _read_table,
    ".tsv": _read_tsv,
    ".tsv.gz": _read_tsv,
}
